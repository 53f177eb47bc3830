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
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

from kvik.conf.network import Network
from kvik.conf.network_addresses import ip_interface
from kvik.errors import HostError, KvikError
from kvik.host import nftables
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.host.route import add_route
from kvik.network import dhcp
from kvik.network.bridge import find_bridge
from kvik.network.nat import FAMILY, table_name
from kvik.network.subnet import taken_subnets
from kvik.network.trace import Step, Tracer

__all__ = ["Finding", "probe"]

WORLDS = ("192.0.2.0/30", "198.51.100.0/30", "203.0.113.0/30")  # for documentation (RFC 5737): in nobody's use
DHCP_WAIT, PACKET_WAIT = 2.0, 0.3  # seconds
TRIES = 3  # of each packet
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
    """Walk it through, in the calling thread's network namespace; nothing found: it works. Blocks some 50 ms, with STP
    4 s, and some seconds when nobody answers. Empty too for a network that serves no IPv4 addresses to walk with."""
    own = next((ip for ip in document.ips if ip.address and ip.dhcp and ip_interface(ip).version == 4), None)
    if own is None or not document.owns_bridge:
        return []
    stop = cancelled or threading.Event()
    gateway = ip_interface(own)
    assert isinstance(gateway, IPv4Interface)
    with Netlink() as netlink, Namespace() as guest, Namespace() as world, ExitStack() as undo:
        bridge = find_bridge(netlink, document.bridge_name or "")
        if bridge is None:
            return []
        port = _wire(netlink, guest, undo, mtu=bridge.mtu)
        netlink.set_link(port.index, master=bridge.index)
        wait = DHCP_WAIT + (STP_WAIT if document.bridge and document.bridge.stp else 0)
        with Tracer() as tracer:
            undo.enter_context(_Mark(port.name, bridge.name))
            offer = None
            deadline = time.monotonic() + wait
            while offer is None and time.monotonic() < deadline and not stop.is_set():
                offer = guest.run(lambda: dhcp.discover("eth0", min(0.5, wait)))
            if stop.is_set():
                return []
            if offer is None:
                return [_explain(document, "a guest gets no answer to its DHCP request", tracer.steps(), "input")]
            if document.mode != "nat" or (document.forward and document.forward.interfaces):
                return []  # no way out, or one that is not ours to pretend
            tracer.steps()
            walk = _Walk(netlink, guest, world, undo)
            place = walk.world_for(offer.address, gateway)
            broken = walk.out_and_back(place) if place is not None else ""
            return [_explain(document, broken, tracer.steps(), "forward")] if broken else []


def _wire(netlink: Netlink, inside: Namespace, undo: ExitStack, mtu: int = 1500) -> Any:
    """An interface here whose other end is eth0 in there, both up. It goes with either namespace, so also with us."""
    name = f"kvikp{os.urandom(4).hex()}"
    made = netlink.add_veth(name, "eth0", namespace=inside.fd)
    undo.callback(_delete, netlink, made.index)
    if mtu != made.mtu:
        netlink.set_link(made.index, mtu=mtu)

    def far() -> None:
        with Netlink() as there:
            for each in ("lo", "eth0"):
                there.set_link(there.link(each).index, up=True)

    inside.run(far)
    netlink.set_link(made.index, up=True)
    return made


def _delete(netlink: Netlink, index: int) -> None:
    with suppress(HostError):
        netlink.delete_link(index)


class _Walk:
    """From the guest to the world and back."""

    def __init__(self, netlink: Netlink, guest: Namespace, world: Namespace, undo: ExitStack) -> None:
        self.netlink, self.guest, self.world, self.undo = netlink, guest, world, undo

    def world_for(self, address: IPv4Address, gateway: IPv4Interface) -> IPv4Address | None:
        """Give both ends their addresses; the world's, or None where this host uses all that it could have."""
        taken = taken_subnets(self.netlink)
        place = next((IPv4Network(text) for text in WORLDS if not any(_overlap(text, other) for other in taken)), None)
        if place is None:
            return None
        outside = _wire(self.netlink, self.world, self.undo)
        self.netlink.add_address(outside.index, f"{place[1]}/{place.prefixlen}")
        self.world.run(lambda: _settle(f"{place[2]}/{place.prefixlen}", str(place[1])))
        self.guest.run(lambda: _settle(f"{address}/{gateway.network.prefixlen}", str(gateway.ip)))
        return place[2]

    def out_and_back(self, there: IPv4Address) -> str:
        """What does not work, or ""."""
        with self.world.run(_datagrams) as answering, self.guest.run(_datagrams) as asking:
            source = None
            for _ in range(TRIES):
                asking.sendto(b"kvik", (str(there), _PORT))
                with suppress(TimeoutError):
                    _, source = answering.recvfrom(64)
                    break
            if source is None:
                return "a guest's packet does not reach the world"
            for _ in range(TRIES):
                answering.sendto(b"kvik", source)
                with suppress(TimeoutError):
                    asking.recv(64)
                    return ""
        return "an answer from the world does not reach the guest"


def _settle(address: str, gateway: str) -> None:
    with Netlink() as netlink:
        index = netlink.link("eth0").index
        netlink.add_address(index, address)
        add_route(netlink, "0.0.0.0/0", gateway=gateway, index=index)


def _overlap(text: str, other: Any) -> bool:
    return other.version == 4 and IPv4Network(text).overlaps(other)


def _datagrams() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
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
        for field, port in (("dport", 67), ("dport", _PORT), ("sport", _PORT)):
            udp = {"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": field}}, "right": port}}
            mark = {"mangle": {"key": {"meta": {"key": "nftrace"}}, "value": 1}}
            commands.append({"add": {"rule": {**self.place, "chain": self.chain["name"], "expr": [udp, mark]}}})
        with suppress(KvikError):  # then there is a finding without a name
            nftables.run(commands)

    def __exit__(self, *exc: object) -> None:
        with suppress(KvikError):
            nftables.run([{"flush": {"chain": self.chain}}, {"delete": {"chain": self.chain}}])


# Whose rule it is, and what to do about it ----------------------------------------------------------------------


def _explain(document: Network, what: str, steps: list[Step], hook: str) -> Finding:
    own = table_name(document.bridge_name or "")
    killer = next((step for step in reversed(steps) if step.dropped and step.table != own), None)
    if killer is None:
        return Finding(f"{what}, and no nftables rule says why (look at: iptables-legacy -S, sysctl net.ipv4, ss -lun)")
    owner = _owner(killer)
    remedies = _remedies(killer, owner, document.bridge_name or "", hook)
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


def _remedies(killer: Step, owner: str, bridge: str, hook: str) -> tuple[str, ...]:
    """Commands that let through what this network needs, and nothing else."""
    if owner == "firewalld":
        return (f"firewall-cmd --permanent --zone=trusted --add-interface={bridge}", "firewall-cmd --reload")
    if owner == "ufw":
        if hook == "forward":
            return (f"ufw route allow in on {bridge}",)
        return tuple(f"ufw allow in on {bridge} to any port {port}" for port in ("67 proto udp", "53"))
    answers = "-m conntrack --ctstate RELATED,ESTABLISHED"
    if killer.family in ("ip", "ip6") and killer.chain.isupper():
        tool = "iptables" if killer.family == "ip" else "ip6tables"
        chain = "DOCKER-USER" if owner == "Docker" else killer.chain
        if hook == "forward":
            return (f"{tool} -I {chain} -i {bridge} -j ACCEPT", f"{tool} -I {chain} -o {bridge} {answers} -j ACCEPT")
        return tuple(f"{tool} -I {chain} -i {bridge} -p udp --dport {port} -j ACCEPT" for port in (53, 67))
    insert = f"nft insert rule {killer.family} {killer.table} {killer.chain}"
    if hook == "forward":
        return (f"{insert} iifname {bridge} accept", f"{insert} oifname {bridge} ct state established,related accept")
    return (f"{insert} iifname {bridge} udp dport '{{ 53, 67 }}' accept",)
