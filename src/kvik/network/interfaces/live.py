"""What the host's interfaces are now, as documents. Blocking."""

from __future__ import annotations

import errno
import socket

from kvik.conf.interface import (
    Autoconf,
    BridgeInterface,
    Interface,
    InterfaceDhcp,
    InterfaceGateway,
    InterfaceIp,
    InterfaceLink,
    InterfaceMac,
    InterfaceMtu,
    Kind,
    Protocol,
    VlanInterface,
)
from kvik.errors import HostError
from kvik.host.bridge import read_bridge
from kvik.host.netlink import Link, Netlink, link_data
from kvik.host.route import routes

# Machines' own: they come and go with them and are nobody's to configure.
_MACHINES = frozenset({"tun", "macvtap", "ipvtap", "ifb"})
_KINDS: dict[str, Kind] = {"bridge": "bridge", "vlan": "vlan", "bond": "bond"}
_VLAN_ID = 1  # IFLA_VLAN_ID
_LINK_LOCAL = 253  # RT_SCOPE_LINK


def interfaces(netlink: Netlink) -> list[Link]:
    """The host's interfaces, without those of machines, by name."""
    return sorted((link for link in netlink.links() if link.kind not in _MACHINES), key=lambda link: link.name)


def describe(netlink: Netlink, name: str, *, origins: bool = False) -> Interface | None:
    """The document of an interface as it is; None if there is none.

    `origins`: what to write to have it again: an address that was given for a time is not said, but where it is from.
    """
    try:
        answer = netlink.link_answer(name)
        link = netlink.link(name)
    except HostError as error:
        if error.errno in (errno.ENODEV, errno.EINVAL):
            return None
        raise
    links = {one.index: one for one in netlink.links()}
    document = _basic(link)
    document.link = InterfaceLink(state=link.state if link.state in ("up", "down") else None)
    document.mtu = InterfaceMtu(size=link.mtu)
    document.protocols = _protocols(netlink, link, origins)
    if document.type == "bridge":
        bridge = read_bridge(netlink, link.index)
        ports = [_basic(one) for one in links.values() if one.master == link.index]
        document.bridge = BridgeInterface(stp=bridge.stp, delay=f"{bridge.forward_delay:g}", ports=ports)
    elif document.type == "vlan":
        tag = int.from_bytes(link_data(answer).get(_VLAN_ID, b"\0\0")[:2], "little")
        base = links.get(link.lower)
        document.vlan = VlanInterface(tag=tag, base=Interface(name=base.name if base else "?"))
    return document


def _basic(link: Link) -> Interface:
    document = Interface(type=_KINDS.get(link.kind, "ethernet"), name=link.name)
    if len(link.mac) == 17:
        document.mac = InterfaceMac(address=link.mac)
    return document


def _protocols(netlink: Netlink, link: Link, origins: bool) -> list[Protocol]:
    v4, v6 = Protocol(family="ipv4"), Protocol(family="ipv6")
    for address in netlink.addresses(link.index):
        if address.scope == _LINK_LOCAL:
            continue
        ip = address.interface
        protocol = v4 if ip.version == 4 else v6
        if origins and not address.permanent:
            if ip.version == 4:
                v4.dhcp = InterfaceDhcp()
            else:
                v6.autoconf = Autoconf()
            continue
        protocol.ips.append(InterfaceIp(address=str(ip.ip), prefix=ip.network.prefixlen))
    for family, protocol in ((socket.AF_INET, v4), (socket.AF_INET6, v6)):
        try:
            found = routes(netlink, family=family)
        except HostError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
                continue
            raise
        for route in found:
            if origins and route.protocol in ("dhcp", "ra"):
                continue
            if route.default and route.index == link.index and route.gateway is not None:
                protocol.routes.append(InterfaceGateway(gateway=str(route.gateway)))
    if v4.ips:
        v4.dhcp = None  # a document has one of them, and the fixed ones are what somebody decided
    if v4.dhcp:
        v4.routes = []
    return [one for one in (v4, v6) if one.ips or one.routes or one.dhcp or one.autoconf]
