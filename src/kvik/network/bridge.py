"""A network's own bridge: made with its addresses and routes, and taken away again.

A bridge is ours if it is a bridge and has the MAC address that the network's document gives it, which is set in the
request that makes it: a bridge of somebody else's by the same name is neither used nor deleted.
"""

from __future__ import annotations

import errno
import logging
from contextlib import ExitStack, suppress
from pathlib import Path

from kvik.conf.devices.interface import Rate as DocumentRate
from kvik.conf.network import Network
from kvik.conf.network_addresses import ip_interface, route_destination
from kvik.errors import AlreadyExists, HostError
from kvik.host.bridge import NO_VLAN_FILTERING, BridgeSettings, create_bridge
from kvik.host.netlink import Link, Netlink
from kvik.host.netlink_attributes import check_name
from kvik.host.route import add_route
from kvik.host.traffic import Rate, set_traffic, sweep_ifbs

__all__ = ["add_routes", "find_bridge", "is_ours", "make_bridge", "remove_bridge", "set_forwarding"]

logger = logging.getLogger(__name__)

ETHERNET_MTU, MTU_MAX = 1500, 65535
ALIAS, ALIAS_MAX = "kvik network ", 200  # characters; the kernel takes 255 bytes (IFALIASZ)
DEFAULT_METRIC = 1  # of a <route> that says none, as in libvirt
SYSCTL = Path("/proc/sys/net")  # shows the network namespace of the thread that opens it


def find_bridge(netlink: Netlink, name: str) -> Link | None:
    """The interface with this name, whatever it is."""
    try:
        return netlink.link(name)
    except HostError as error:
        if error.errno == errno.ENODEV:
            return None
        raise


def is_ours(link: Link, document: Network) -> bool:
    return link.kind == "bridge" and document.mac is not None and link.mac == document.mac.address.lower()


def make_bridge(netlink: Netlink, document: Network, undo: ExitStack, owner: str) -> Link:
    """The bridge of the network, up and with its addresses; `undo` takes it away. About a millisecond. `owner`, which
    daemon's it is, becomes its alias (`ip link` shows it): another daemon says by that who has it.

    Raises AlreadyExists if there is an interface by that name, HostError for what the kernel refuses.
    """
    assert document.bridge is not None
    name = check_name(document.bridge_name or "")
    there = find_bridge(netlink, name)
    if there is not None:
        raise _taken(document, there)
    undo.callback(_quietly_remove, netlink, document)  # it may be made, and only the answer lost
    try:
        link = _create(netlink, name, document)
    except HostError as error:
        there = find_bridge(netlink, name) if error.errno == errno.EEXIST else None
        raise (_taken(document, there) if there is not None else error) from error  # another was quicker
    netlink.set_link(link.index, alias=f"{ALIAS}{document.name} of {owner}"[:ALIAS_MAX])
    _set_up_ipv6(name, document)
    for ip in document.ips:
        if ip.address is None:
            continue
        interface = ip_interface(ip)
        subnet = interface.network
        broadcast = str(subnet.broadcast_address) if subnet.version == 4 and subnet.prefixlen < 31 else None
        # Nobody else can have the address on a bridge that has no port yet: there is nothing to detect.
        netlink.add_address(link.index, str(interface), broadcast=broadcast, detect_duplicates=False)
    _bound(netlink, document, link.index)
    netlink.set_link(link.index, mtu=_mtu(document), up=True)
    return netlink.link(link.index)


def _taken(document: Network, there: Link) -> AlreadyExists:
    who = f", {there.alias}" if there.alias.isprintable() and there.alias else ""
    return AlreadyExists(
        f"network {document.name!r} cannot make bridge {there.name}: there is an interface of that name already "
        f"({there.kind or 'hardware'}, {there.mac or 'no MAC'}{who})",
        remedy="give the network's <bridge> another name, or "
        + ("stop that network" if there.alias.startswith(ALIAS) else "delete that interface if nobody needs it"),
    )


def _create(netlink: Netlink, name: str, document: Network) -> Link:
    assert document.bridge is not None
    settings: BridgeSettings = {"stp": bool(document.bridge.stp), "forward_delay": document.bridge.delay or 0}
    mac = document.mac.address if document.mac else None
    # One off what it is to have: to set it then is a change, and the kernel leaves alone what was changed. Else a
    # machine with a smaller MTU would bring the whole network down to its own (br_mtu_auto_adjust in br_if.c).
    mtu = _mtu(document)
    mtu += 1 if mtu < MTU_MAX else -1
    if document.bridge.mac_table_manager == "libvirt":
        # With the kernel's VLAN filter a port takes no frame of a VLAN that it was not put into, as libvirt has it.
        filtering: BridgeSettings = {**settings, "vlan_filtering": True}
        try:
            return create_bridge(netlink, name, mac=mac, mtu=mtu, **filtering).link
        except HostError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            logger.warning("network %s: %s; its bridge does without", document.name, NO_VLAN_FILTERING)
    return create_bridge(netlink, name, mac=mac, mtu=mtu, **settings).link


def _mtu(document: Network) -> int:
    return document.mtu.size if document.mtu else ETHERNET_MTU


def _bound(netlink: Netlink, document: Network, index: int) -> None:
    """The network's <bandwidth>: of what passes between the guests together and the host or the world."""
    if document.bandwidth is not None:
        inbound, outbound = (_rate(each) for each in (document.bandwidth.inbound, document.bandwidth.outbound))
        set_traffic(netlink, index, inbound=inbound, outbound=outbound, floors=inbound is not None)


def _rate(rate: DocumentRate | None) -> Rate | None:
    if rate is None or rate.average is None:
        return None
    return Rate(average=rate.average, peak=rate.peak or 0, burst=rate.burst or 0)


def remove_bridge(netlink: Netlink, document: Network) -> bool:
    """Delete the network's bridge, its addresses and routes with it. False if it is gone, or is not ours."""
    link = find_bridge(netlink, document.bridge_name or "")
    deleted = False
    if link is not None and is_ours(link, document):
        try:
            netlink.delete_link(link.index)
            deleted = True
        except HostError as error:
            if error.errno != errno.ENODEV:
                raise
    if document.bandwidth is not None:
        sweep_ifbs(netlink)  # an interface that bounded the bridge's traffic does not go with it
    return deleted


def _quietly_remove(netlink: Netlink, document: Network) -> None:
    """For undoing: what fails there has its cause told already."""
    try:
        remove_bridge(netlink, document)
    except HostError as error:
        logger.warning("%s", error)


def _set_up_ipv6(name: str, document: Network) -> None:
    """Without an IPv6 address on it the host takes no part in the bridge's IPv6: guests cannot reach it by a link-local
    address that nobody meant to give it. With one, the host is the router: it listens to no other one's adverts."""
    has_address = any(ip_interface(ip).version == 6 for ip in document.ips if ip.address is not None)
    settings = SYSCTL / "ipv6" / "conf" / name
    if has_address:
        _write(settings / "accept_ra", "0")
        _write(settings / "autoconf", "0")
        _write(settings / "disable_ipv6", "0")
    else:
        _write(settings / "disable_ipv6", "1")


def set_forwarding(document: Network) -> None:
    """Have the kernel route, for the families that the network has addresses of. It is not set back when the network
    ends: by then others may count on it."""
    if document.forward is None:
        return
    versions = {ip_interface(ip).version for ip in document.ips if ip.address is not None}
    if 4 in versions:
        _switch_on(SYSCTL / "ipv4" / "ip_forward")
    if 6 in versions:
        # A router ignores router advertisements unless told that it may listen (accept_ra 2): an interface that has its
        # own default route from one must not lose it (networking/ip-sysctl in the kernel's documentation).
        with suppress(OSError):
            for interface in (SYSCTL / "ipv6" / "conf").iterdir():
                if interface.name not in ("all", "default", document.bridge_name):
                    with suppress(OSError):
                        if (interface / "accept_ra").read_text("ascii").strip() == "1":
                            (interface / "accept_ra").write_text("2", "ascii")
        _switch_on(SYSCTL / "ipv6" / "conf" / "all" / "forwarding")


def _switch_on(path: Path) -> None:
    with suppress(OSError):
        if path.read_text("ascii").strip() == "1":
            return
    _write(path, "1")


def _write(path: Path, value: str) -> None:
    try:
        path.write_text(value, "ascii")
    except FileNotFoundError:
        return  # a kernel without IPv6 has nothing to switch off
    except OSError as error:
        raise HostError(f"cannot set {path} to {value}: {error.strerror}", errno=error.errno or 0) from error


def add_routes(netlink: Netlink, document: Network, index: int) -> None:
    """The network's <route>s, through a guest that is a router. They go with the bridge."""
    for number, route in enumerate(document.routes):
        destination = route_destination(route, f"/network/route[{number + 1}]")
        add_route(netlink, str(destination), gateway=route.gateway, index=index, metric=route.metric or DEFAULT_METRIC)
