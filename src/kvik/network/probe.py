"""Does the network work? A DHCP exchange and a packet to the world and back, walked through for real.

A guest that is none (a network namespace on a port of the bridge) asks for an address, and with the one that it is
offered (and does not take) sends a datagram to a world that is none (another namespace, behind an interface and a route
of this host that exist for that moment), which answers. Nothing leaves the host. Where a packet dies, the kernel's own
trace tells by which rule: then the finding names the rule set, its owner and the scoped rule that lets it through.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_network
from typing import Any

from kvik.conf.network import Network, NetworkIp
from kvik.conf.network_addresses import ip_interface
from kvik.errors import HostError, KvikError
from kvik.host import nftables
from kvik.host.namespace import Namespace
from kvik.host.netlink import Link, Netlink
from kvik.host.route import add_route
from kvik.network import dhcp, probe6
from kvik.network.bridge import find_bridge
from kvik.network.nat import FAMILY, table_name
from kvik.network.subnet import taken_subnets
from kvik.network.trace import Step, Tracer

__all__ = ["Finding", "probe"]

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface

WORLDS = ("192.0.2.0/30", "198.51.100.0/30", "203.0.113.0/30")  # for documentation (RFC 5737): in nobody's use
DHCP_WAIT, PACKET_WAIT = 2.0, 0.3  # seconds
SIX_WAIT = 6.0  # the bridge's own addresses are tentative for up to two seconds once it has a port (RFC 4862, 5.4)
# Of each packet: longer than the second after which a neighbour is asked for again (RFC 4861, 10), and than slow links.
TRIES = 8
STP_WAIT = 5.0  # more, while a bridge with STP listens and learns
_PORT = 9  # discard
_RAW = -300  # priority of the chain that marks, before all others: NF_IP_PRI_RAW


@dataclass(frozen=True, slots=True)
class Finding:
    """What does not work. `rule` is nftables' handle, 0 for the policy of the chain or if none is known."""

    what: str
    family: str = ""
    table: str = ""
    chain: str = ""
    rule: int = 0
    owner: str = ""
    remedies: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.table:
            return self.what
        by = f"rule {self.rule} of" if self.rule else "the policy of"
        text = f"{self.what}: dropped by {by} chain {self.chain} in table {self.family} {self.table} ({self.owner})"
        return text + (f"; to let it through: {' && '.join(self.remedies)}" if self.remedies else "")


def probe(document: Network, cancelled: threading.Event | None = None) -> list[Finding]:
    """Walk it through, in the calling thread's network namespace; nothing found: it works. Blocks some 50 ms, with IPv6
    up to 3 s (the bridge sees first whether its addresses are its own), with STP 4 s, and some seconds when nobody
    answers. Empty too for a network that serves no addresses to walk with."""
    served = [(ip, ip_interface(ip)) for ip in document.ips if ip.address]
    four = next((own for ip, own in served if own.version == 4 and ip.dhcp), None)
    six = next(((ip, own) for ip, own in served if own.version == 6), None)
    if not document.owns_bridge or (four is None and six is None):
        return []
    stop = cancelled or threading.Event()
    with Netlink() as netlink, Namespace() as guest, Namespace() as world, ExitStack() as undo:
        bridge = find_bridge(netlink, document.bridge_name or "")
        if bridge is None:
            return []
        port = wire(netlink, guest, undo, mtu=bridge.mtu, prepare=probe6.listen_to_routers if six else None)
        netlink.set_link(port.index, master=bridge.index)
        more = STP_WAIT if document.bridge and document.bridge.stp else 0
        with Tracer() as tracer:
            undo.enter_context(_Mark(port.name, bridge.name))
            walk = _Walk(document, netlink, guest, world, undo, tracer, stop)
            found = []
            if isinstance(four, IPv4Interface):
                found.append(_walk4(walk, four, DHCP_WAIT + more))
            if six is not None and not stop.is_set():
                found.append(_walk6(walk, *six, SIX_WAIT + more))
            return [finding for finding in found if finding is not None]


def _goes_out(document: Network) -> bool:
    """Whether it has a way out that is ours to pretend."""
    return document.mode in ("nat", "route") and not (document.forward and document.forward.interfaces)


def _walk4(walk: _Walk, gateway: IPv4Interface, wait: float) -> Finding | None:
    document, tracer, stop = walk.document, walk.tracer, walk.stop
    offer, deadline = None, time.monotonic() + wait
    transaction = int.from_bytes(os.urandom(4))  # one for all rounds: the answer may take longer than a round
    while offer is None and time.monotonic() < deadline and not stop.is_set():
        offer = walk.guest.run(lambda: dhcp.discover("eth0", min(0.5, wait), transaction))
    if stop.is_set():
        return None
    if offer is None:
        return _explain(document, "a guest gets no answer to its DHCP request", tracer.steps(), "input", 67)
    if not _goes_out(document):
        return None
    tracer.steps()
    place = walk.world_for(WORLDS)
    if place is None:
        return None
    walk.guest.run(lambda: _settle(f"{offer.address}/{gateway.network.prefixlen}", str(gateway.ip)))
    broken = walk.out_and_back(place, "packet")
    return _explain(document, broken, tracer.steps(), "forward") if broken else None


def _walk6(walk: _Walk, ip: NetworkIp, gateway: Interface, wait: float) -> Finding | None:
    document, tracer, stop = walk.document, walk.tracer, walk.stop
    deadline = time.monotonic() + wait
    managed = ip.dhcp is not None and bool(ip.dhcp.ranges or ip.dhcp.hosts)
    answered, address = probe6.address(walk.guest, gateway.network, deadline, stop, managed=managed)
    if stop.is_set():
        return None
    if not answered:
        what = "no answer to its DHCPv6 request" if managed else "no IPv6 router's advertisement"
        return _explain(document, f"a guest gets {what}", tracer.steps(), "input", 547 if managed else 0)
    if address is None or not _goes_out(document):  # with static hosts alone there is none for a stranger
        return None
    if not probe6.has_default_route(walk.guest, deadline, stop):
        if stop.is_set():
            return None
        return _explain(document, "a guest gets no IPv6 router's advertisement", tracer.steps(), "input", 0)
    tracer.steps()
    place = walk.world_for(probe6.WORLDS)
    broken = walk.out_and_back(place, "IPv6 packet") if place is not None else ""
    return _explain(document, broken, tracer.steps(), "forward") if broken else None


def wire(
    netlink: Netlink,
    inside: Namespace,
    undo: ExitStack,
    *,
    mtu: int = 1500,
    prepare: Callable[[], None] | None = None,
) -> Link:
    """An interface here whose other end is eth0 in there, both up; `prepare` is called in there before. It goes with
    either namespace, so also with us."""
    name = f"kvikp{os.urandom(4).hex()}"
    made = netlink.add_veth(name, "eth0", namespace=inside.fd)
    undo.callback(_delete, netlink, made.index)
    if mtu != made.mtu:
        netlink.set_link(made.index, mtu=mtu)

    def far() -> None:
        probe6.use_at_once("eth0")
        if prepare is not None:
            prepare()
        with Netlink() as there:
            for each in ("lo", "eth0"):
                there.set_link(there.link(each).index, up=True)

    inside.run(far)
    probe6.use_at_once(name)
    netlink.set_link(made.index, up=True)
    return made


def _delete(netlink: Netlink, index: int) -> None:
    with suppress(HostError):
        netlink.delete_link(index)


@dataclass(slots=True)
class _Walk:
    """From the guest to the world and back."""

    document: Network
    netlink: Netlink
    guest: Namespace
    world: Namespace
    undo: ExitStack
    tracer: Tracer
    stop: threading.Event
    outside: int | None = None  # this host's end of the wire to the world

    def world_for(self, places: Sequence[str]) -> Address | None:
        """Where the world is, which has all the addresses of the family behind it; None where this host uses all that
        it could have."""
        taken = taken_subnets(self.netlink)
        networks = [ip_network(text) for text in places]
        place = next((one for one in networks if not any(_overlap(one, other) for other in taken)), None)
        if place is None:
            return None
        if self.outside is None:
            self.outside = wire(self.netlink, self.world, self.undo).index
        self.netlink.add_address(self.outside, f"{place[1]}/{place.prefixlen}", detect_duplicates=False)
        self.world.run(lambda: _settle(f"{place[2]}/{place.prefixlen}", str(place[1])))
        if place.version == 6:
            probe6.wait_for_link_local(self.netlink, self.outside)
            self.world.run(probe6.wait_for_link_local)
        return place[2]

    def out_and_back(self, there: Address, what: str) -> str:
        """What does not work, or ""."""
        version = there.version
        opened = partial(_datagrams, version)
        with self.world.run(opened) as answering, self.guest.run(opened) as asking:
            source = None
            for _ in range(TRIES):
                with suppress(TimeoutError, ConnectionRefusedError):  # an earlier one may have been rejected
                    asking.sendto(b"kvik", (str(there), _PORT))
                    _, source = answering.recvfrom(64)
                    break
            if source is None:
                return f"a guest's {what} does not reach the world"
            for _ in range(TRIES):
                answering.sendto(b"kvik", source)
                with suppress(TimeoutError):
                    asking.recv(64)
                    return ""
        return f"an answer from the world{' by IPv6' if version == 6 else ''} does not reach the guest"


def _settle(address: str, gateway: str) -> None:
    with Netlink() as netlink:
        index = netlink.link("eth0").index
        netlink.add_address(index, address, detect_duplicates=False)
        add_route(netlink, "::/0" if ":" in gateway else "0.0.0.0/0", gateway=gateway, index=index)


def _overlap(one: Any, other: Any) -> bool:
    return bool(other.version == one.version and one.overlaps(other))


def _datagrams(version: int) -> socket.socket:
    made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    made.bind(("", _PORT))
    made.settimeout(PACKET_WAIT)
    return made


class _Mark:
    """Has the kernel trace the packets of a probe: by a chain in the network's own table, which goes with that if we
    are killed."""

    def __init__(self, port: str, bridge: str) -> None:
        self.place = {"family": FAMILY, "table": table_name(bridge)}
        self.chain = {**self.place, "name": f"probe-{port}"}
        self.bridge = bridge

    def __enter__(self) -> None:
        hook = {"type": "filter", "hook": "prerouting", "prio": _RAW, "policy": "accept"}
        commands: list[nftables.Command] = [{"add": {"chain": {**self.chain, **hook}}}]
        for protocol, field, value in (
            ("udp", "dport", 67),
            ("udp", "dport", 547),
            ("icmpv6", "type", "nd-router-solicit"),
            ("udp", "dport", _PORT),
            ("udp", "sport", _PORT),
        ):
            ours = {"match": {"op": "==", "left": {"payload": {"protocol": protocol, "field": field}}, "right": value}}
            mark = {"mangle": {"key": {"meta": {"key": "nftrace"}}, "value": 1}}
            commands.append({"add": {"rule": {**self.place, "chain": self.chain["name"], "expr": [ours, mark]}}})
        with suppress(KvikError):  # then there is a finding without a name
            nftables.run(commands)

    def __exit__(self, *exc: object) -> None:
        with suppress(KvikError):
            nftables.run([{"flush": {"chain": self.chain}}, {"delete": {"chain": self.chain}}])


# Whose rule it is, and what to do about it ----------------------------------------------------------------------


def _explain(document: Network, what: str, steps: list[Step], hook: str, port: int = 0) -> Finding:
    """At the hook `input`, UDP to `port` did not get through, or (0) ICMPv6."""
    own = table_name(document.bridge_name or "")
    killer = next((step for step in reversed(steps) if step.dropped and step.table != own), None)
    if killer is None:
        return Finding(
            f"{what}, and no nftables rule says why (look at: iptables-legacy -S, sysctl net.ipv4 net.ipv6, ss -lun)"
        )
    owner = _owner(killer)
    remedies = _remedies(killer, owner, document.bridge_name or "", hook, port)
    return Finding(what, killer.family, killer.table, killer.chain, killer.rule, owner, remedies)


def _chains() -> set[tuple[str, str, str]]:
    with suppress(KvikError):
        chains = [item["chain"] for item in nftables.run([{"list": {"chains": None}}]) if "chain" in item]
        return {(chain["family"], chain["table"], chain["name"]) for chain in chains}
    return set()


_OWNERS = {  # a chain's first letters -> whose it is
    "DOCKER": "Docker", "LIBVIRT_": "libvirt", "ufw": "ufw", "KUBE-": "Kubernetes", "cali-": "Calico",
    "f2b-": "fail2ban",
}  # fmt: skip


def _owner(killer: Step) -> str:
    """By the names that each program is known to use."""
    if killer.table == "firewalld":
        return "firewalld"
    for prefix, name in _OWNERS.items():
        if killer.chain.startswith(prefix):
            return name
    # Docker sets the policy of iptables' own chain FORWARD, and leaves DOCKER-USER beside it; so does ufw.
    if killer.chain in ("FORWARD", "INPUT"):
        names = {chain for family, table, chain in _chains() if (family, table) == (killer.family, killer.table)}
        if "DOCKER-USER" in names and killer.chain == "FORWARD":
            return "Docker"
        if any(name.startswith("ufw") for name in names):
            return "ufw"
        return "iptables"
    return "an nftables rule set of this host"


def _remedies(killer: Step, owner: str, bridge: str, hook: str, port: int) -> tuple[str, ...]:
    """Commands that let through what this network needs, and nothing else."""
    if owner == "firewalld":
        return (f"firewall-cmd --permanent --zone=trusted --add-interface={bridge}", "firewall-cmd --reload")
    if owner == "ufw":
        if hook == "forward":
            return (f"ufw route allow in on {bridge}",)
        if not port:
            return ()  # ufw has no words for ICMPv6
        return tuple(f"ufw allow in on {bridge} to any port {one}" for one in (f"{port} proto udp", "53"))
    answers = "-m conntrack --ctstate RELATED,ESTABLISHED"
    if killer.family in ("ip", "ip6") and killer.chain.isupper():
        tool = "iptables" if killer.family == "ip" else "ip6tables"
        chain = "DOCKER-USER" if owner == "Docker" else killer.chain
        if hook == "forward":
            return (f"{tool} -I {chain} -i {bridge} -j ACCEPT", f"{tool} -I {chain} -o {bridge} {answers} -j ACCEPT")
        if not port:
            return (f"{tool} -I {chain} -i {bridge} -p icmpv6 -j ACCEPT",)
        return tuple(f"{tool} -I {chain} -i {bridge} -p udp --dport {one} -j ACCEPT" for one in (53, port))
    insert = f"nft insert rule {killer.family} {killer.table} {killer.chain}"
    if hook == "forward":
        return (f"{insert} iifname {bridge} accept", f"{insert} oifname {bridge} ct state established,related accept")
    if not port:
        return (f"{insert} iifname {bridge} meta l4proto ipv6-icmp accept",)
    return (f"{insert} iifname {bridge} udp dport '{{ 53, {port} }}' accept",)
