"""The packet filter's part of a network: what it lets through, masquerades and forwards, as nftables commands.

    nftables.run(install(document))  # one transaction: all of it or nothing
    nftables.run(remove("virbr0"))

Each network has a table of its own, named after its bridge: to install replaces all of it, to remove leaves nothing,
and no other ruleset is read or changed. nftables asks every base chain of a hook, and any of them may drop: "accept"
here therefore cannot override another table's "drop" (`probe.py` finds that), and "reject" holds whatever others say.

What is let through is libvirt's (https://libvirt.org/firewall.html): guests reach each other; with forwarding they
reach out, from the network's own addresses only; what comes in is answers (nat), or what is addressed to it (route).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any

from kvik.conf.network import Network, NetworkPortForward
from kvik.conf.network_addresses import ip_interface, route_destination
from kvik.errors import ConfigUnsupported

__all__ = ["add", "install", "needs_table", "remove", "table_name"]

Command = dict[str, Any]
Expression = dict[str, Any]
Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network

FAMILY = "inet"
PORTS = (1024, 65535)  # that masqueraded connections come from, unless <nat><port> says others
# What a guest sends to its own segment's groups is not for the world: link-local multicast and limited broadcast.
_LOCAL_GROUPS = {4: ("224.0.0.0/24", "255.255.255.255/32"), 6: ("ff02::/16",)}
_PRIORITY_FILTER, _PRIORITY_DSTNAT, _PRIORITY_SRCNAT = 0, -100, 100  # linux/netfilter_ipv4.h, NF_IP_PRI_*
MAX_FORWARDED_PORTS = 4096  # of one <portForward> whose ports are renumbered: one map element each


def table_name(bridge: str) -> str:
    return f"kvik-{bridge}"


def needs_table(document: Network) -> bool:
    """False for mode "open" (the administrator's own rules alone decide) and where the bridge is not the network's."""
    return document.owns_bridge and document.mode != "open"


def install(document: Network) -> list[Command]:
    """The commands that make the network's table, replacing what it held. Raises ConfigUnsupported."""
    return remove(document.bridge_name or "") + add(document)


def add(document: Network) -> list[Command]:
    """The commands that make the network's table where there is none. Raises ConfigUnsupported."""
    bridge = document.bridge_name or ""
    commands: list[Command] = [{"add": {"table": {"family": FAMILY, "name": table_name(bridge)}}}]
    chains = [
        _Chain(bridge, "forward", "filter", "forward", priority=_PRIORITY_FILTER, rules=_forward(document, bridge))
    ]
    if document.mode == "nat":
        chains.append(
            _Chain(bridge, "masquerade", "nat", "postrouting", priority=_PRIORITY_SRCNAT, rules=_masquerade(document))
        )
    ports = document.forward.port_forwards if document.forward else []
    if ports:
        translated = [[*_addressed(port), _translation(port)] for port in ports]
        chains.append(_Chain(bridge, "incoming", "nat", "prerouting", priority=_PRIORITY_DSTNAT, rules=translated))
        # The host's own connections to one of its addresses are not routed in from anywhere: they have their own hook.
        chains.append(_Chain(bridge, "outgoing", "nat", "output", priority=_PRIORITY_DSTNAT, rules=translated))
    for chain in chains:
        commands += chain.commands()
    return commands


def remove(bridge: str) -> list[Command]:
    """The commands that remove the table of the network with this bridge, whether or not it exists."""
    # "add" makes it if it is not there, so that "delete" cannot fail.
    table = {"family": FAMILY, "name": table_name(bridge)}
    return [{"add": {"table": table}}, {"delete": {"table": table}}]


class _Chain:
    def __init__(
        self, bridge: str, name: str, kind: str, hook: str, *, priority: int, rules: Iterable[list[Expression]]
    ) -> None:
        self.place = {"family": FAMILY, "table": table_name(bridge)}
        self.name, self.kind, self.hook, self.priority, self.rules = name, kind, hook, priority, rules

    def commands(self) -> list[Command]:
        chain = {"name": self.name, "type": self.kind, "hook": self.hook, "prio": self.priority, "policy": "accept"}
        made: list[Command] = [{"add": {"chain": {**self.place, **chain}}}]
        made += [{"add": {"rule": {**self.place, "chain": self.name, "expr": rule}}} for rule in self.rules]
        return made


# Expressions (libnftables-json(5)) ------------------------------------------------------------------------------


def _match(left: Expression, right: Any, op: str = "==") -> Expression:
    return {"match": {"op": op, "left": left, "right": right}}


def _meta(key: str, value: Any) -> Expression:
    return _match({"meta": {"key": key}}, value)


def _payload(protocol: str, field: str) -> Expression:
    return {"payload": {"protocol": protocol, "field": field}}


def _ip(field: str, subnet: Subnet | str, op: str = "==") -> Expression:
    network = ipaddress.ip_network(subnet)
    value: Any = {"prefix": {"addr": str(network.network_address), "len": network.prefixlen}}
    if network.prefixlen == network.max_prefixlen:
        value = str(network.network_address)
    return _match(_payload("ip" if network.version == 4 else "ip6", field), value, op)


_ACCEPT: Expression = {"accept": None}
_RETURN: Expression = {"return": None}
_REJECT: Expression = {"reject": {"type": "icmpx", "expr": "port-unreachable"}}  # at once, not after a time-out
_ANSWERS = _match({"ct": {"key": "state"}}, ["established", "related"], "in")
_TRANSLATED = _match({"ct": {"key": "status"}}, "dnat", "in")


# Rules ----------------------------------------------------------------------------------------------------------


def _subnets(document: Network) -> list[Subnet]:
    """Those of its own addresses and those that it routes to."""
    own: list[Subnet] = [ip_interface(ip).network for ip in document.ips if ip.address is not None]
    return own + [route_destination(route, "/network/route") for route in document.routes]


def _devices(document: Network) -> list[str]:
    """The interfaces that traffic may leave and come by; none named: all."""
    if document.forward is None:
        return []
    named = [interface.dev for interface in document.forward.interfaces]
    return named or ([document.forward.dev] if document.forward.dev else [])


def _by(key: str, devices: list[str]) -> list[Expression]:
    return [_meta(key, devices[0] if len(devices) == 1 else {"set": devices})] if devices else []


def _forward(document: Network, bridge: str) -> list[list[Expression]]:
    inside, outside = _meta("iifname", bridge), _meta("oifname", bridge)
    rules = [[inside, outside, _ACCEPT]]
    if document.forward is not None:
        devices = _devices(document)
        for port in document.forward.port_forwards:
            rules.append([outside, _TRANSLATED, *_guest(port), _ACCEPT])
        for subnet in _subnets(document):
            coming = [*_by("iifname", devices), outside, _ip("daddr", subnet)]
            if _is_masqueraded(document, subnet):
                coming.append(_ANSWERS)
            rules.append([*coming, _ACCEPT])
            rules.append([inside, *_by("oifname", devices), _ip("saddr", subnet), _ACCEPT])
    return [*rules, [inside, _REJECT], [outside, _REJECT]]


def _is_masqueraded(document: Network, subnet: Subnet) -> bool:
    """IPv6 has addresses enough: it is masqueraded only where <nat ipv6='yes'> says so, else routed."""
    if document.mode != "nat" or document.forward is None:
        return False
    return subnet.version == 4 or bool(document.forward.nat and document.forward.nat.ipv6)


def _masquerade(document: Network) -> list[list[Expression]]:
    rules: list[list[Expression]] = []
    nat = document.forward.nat if document.forward else None
    ports = [nat.port.start, nat.port.end] if nat and nat.port else list(PORTS)
    devices = _by("oifname", _devices(document))
    for subnet in _subnets(document):
        if not _is_masqueraded(document, subnet):
            continue
        ours = _ip("saddr", subnet)
        rules += [[ours, _ip("daddr", group), _RETURN] for group in _LOCAL_GROUPS[subnet.version]]
        if document.forward and document.forward.port_forwards:
            # A guest that calls a forwarded port of the host: without this the other guest would answer it directly,
            # from an address that it never called.
            rules.append([ours, _ip("daddr", subnet), _TRANSLATED, {"masquerade": None}])
        leaving = [ours, _ip("daddr", subnet, "!="), *devices]
        target: Expression = {}
        if nat and nat.address and ipaddress.ip_address(nat.address.start).version == subnet.version:
            first, last = nat.address.start, nat.address.end
            target = {
                "addr": first if first == last else {"range": [first, last]},
                "family": "ip" if subnet.version == 4 else "ip6",
            }
        verb = "snat" if target else "masquerade"
        rules.append(
            [*leaving, _meta("l4proto", {"set": ["tcp", "udp"]}), {verb: {**target, "port": {"range": ports}}}]
        )
        rules.append([*leaving, {verb: target or None}])
    return rules


# Ports of the host, handed to a guest ---------------------------------------------------------------------------


def _ends(port: NetworkPortForward) -> tuple[int, int, int]:
    """First and last port of the host, first of the guest."""
    last = port.end if port.end is not None else port.start
    return port.start, last, port.to if port.to is not None else port.start


def _range(first: int, last: int) -> Any:
    return first if first == last else {"range": [first, last]}


def _guest(port: NetworkPortForward) -> list[Expression]:
    first, last, to = _ends(port)
    return [_ip("daddr", port.guest), _match(_payload(port.proto, "dport"), _range(to, to + last - first))]


def _addressed(port: NetworkPortForward) -> list[Expression]:
    """Packets to one of the host's own addresses (of the guest's family), or to the one that is named."""
    first, last, _ = _ends(port)
    version = ipaddress.ip_address(port.guest).version
    rule = [_meta("nfproto", "ipv4" if version == 4 else "ipv6")]
    if port.address is not None:
        rule.append(_ip("daddr", port.address))
    else:
        rule.append(_match({"fib": {"result": "type", "flags": ["daddr"]}}, "local"))
        # Loopback's packets must not leave by another interface (the kernel drops "martians").
        rule.append(_ip("daddr", "127.0.0.0/8" if version == 4 else "::1/128", "!="))
    return [*rule, _match(_payload(port.proto, "dport"), _range(first, last))]


def _translation(port: NetworkPortForward) -> Expression:
    first, last, to = _ends(port)
    target: Expression = {
        "addr": port.guest,
        "family": "ip" if ipaddress.ip_address(port.guest).version == 4 else "ip6",
    }
    if first == last:
        target["port"] = to
    elif first != to:
        if last - first >= MAX_FORWARDED_PORTS:
            raise ConfigUnsupported(
                f"port forward {port.proto} {first}-{last} renumbers {last - first + 1} ports; "
                f"{MAX_FORWARDED_PORTS} are the most",
                path="/network/forward/portForward",
                remedy="leave out `to`, so that the ports keep their numbers",
            )
        pairs = [[number, number - first + to] for number in range(first, last + 1)]
        target["port"] = {"map": {"key": _payload(port.proto, "dport"), "data": {"set": pairs}}}
    return {"dnat": target}
