"""The IPv6 part of a probe's guest: what it hears of routers and servers, in its own network namespace."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from functools import partial
from ipaddress import IPv6Address
from pathlib import Path

from kvik.conf.network_addresses import Subnet
from kvik.errors import HostError
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.host.route import routes
from kvik.network.dhcp6 import duid_of_mac, solicit

__all__ = ["WORLDS", "address", "has_default_route", "listen_to_routers", "use_at_once", "wait_for_link_local"]

WORLDS = ("2001:db8:6b76::/64", "3fff:6b76::/64")  # for documentation (RFC 3849, RFC 9637): in nobody's use
LOOK = 0.02  # seconds
ROUND = 0.5
LINK_WAIT = 2.0  # the kernel tells of carriers once a second at the latest (net/core/link_watch.c)


SYSCTL = Path("/proc/sys/net/ipv6")  # of the calling thread's namespace


def use_at_once(interface: str) -> None:
    """Before it is up: its link-local address is of use at once, without which it asks for nobody else's (the kernel's
    ndisc_send_ns), and a question that is lost is asked again at once. Nothing to be done without IPv6."""
    with suppress(OSError):
        (SYSCTL / "conf" / interface / "accept_dad").write_text("0", "ascii")
        (SYSCTL / "neigh" / interface / "retrans_time_ms").write_text("100", "ascii")


def listen_to_routers() -> None:
    """Before eth0 is up: it asks for routers at once, and makes its address of what they say. HostError."""
    for name, value in (
        ("accept_ra", 2), ("autoconf", 1), ("router_solicitation_delay", 0), ("router_solicitation_interval", 1),
        ("use_tempaddr", 0),
    ):  # fmt: skip
        try:
            (SYSCTL / "conf/eth0" / name).write_text(str(value), "ascii")
        except OSError as error:
            raise HostError(f"cannot set {name} of a probe: {error.strerror}", errno=error.errno or 0) from error


def address(
    guest: Namespace, subnet: Subnet, deadline: float, stop: threading.Event, *, managed: bool
) -> tuple[bool, IPv6Address | None]:
    """Whether anybody answered, and the guest's address, which it has then: as a DHCPv6 server offers it (`managed`),
    or made of what a router advertises."""
    ask = partial(_ask, int.from_bytes(os.urandom(3)))  # one transaction: an answer may take longer than a round
    while time.monotonic() < deadline and not stop.is_set():
        if managed:
            found = guest.run(ask)
            if found is None:
                continue
            offered = found[0]
            if offered is not None:
                guest.run(partial(_take, offered, subnet.prefixlen))
            return True, offered
        made = guest.run(lambda: _made(subnet))
        if made is not None:
            return True, made
        time.sleep(LOOK)
    return False, None


def wait_for_link_local(netlink: Netlink | None = None, index: int = 0) -> None:
    """Of an interface here, or of this namespace's eth0: it comes with the carrier, a moment after both ends are up."""
    if netlink is None:
        with Netlink() as here:
            wait_for_link_local(here, here.link("eth0").index)
        return
    deadline = time.monotonic() + LINK_WAIT
    while time.monotonic() < deadline:
        if any(one.interface.is_link_local and not one.tentative for one in netlink.addresses(index)):
            return
        time.sleep(LOOK)


def _ask(transaction: int) -> tuple[IPv6Address | None] | None:
    with Netlink() as netlink:
        mac = bytes.fromhex(netlink.link("eth0").mac.replace(":", ""))
    found = solicit("eth0", duid_of_mac(mac), ROUND, transaction=transaction)
    return (found.address,) if found is not None else None


def _take(offered: IPv6Address, prefix: int) -> None:
    with Netlink() as netlink:
        netlink.add_address(netlink.link("eth0").index, f"{offered}/{prefix}", detect_duplicates=False)


def _made(subnet: Subnet) -> IPv6Address | None:
    with Netlink() as netlink:
        found = [one.interface.ip for one in netlink.addresses(netlink.link("eth0").index)]
    return next((one for one in found if isinstance(one, IPv6Address) and one in subnet), None)


def has_default_route(guest: Namespace, deadline: float, stop: threading.Event) -> bool:
    """A router has said that it is one."""

    def known() -> bool:
        with Netlink() as netlink:
            return any(str(route.network) == "::/0" and route.gateway for route in routes(netlink))

    while not stop.is_set():
        if guest.run(known):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK)
    return False
