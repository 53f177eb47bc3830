"""Routes over rtnetlink: listed, looked up, added, deleted (rtnetlink(7), ip-route(8))."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from dataclasses import dataclass

from kvik.errors import HostError
from kvik.host.netlink import CREATE, DUMP, EXCL, REPLACE, Netlink
from kvik.host.netlink_attributes import Attributes, attribute, attributes, u32, u32_attribute, unpack_head

# linux/rtnetlink.h
NEWROUTE, GETROUTE = 24, 26
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_NEXTHOP = struct.Struct("=HBBi")  # rtnexthop: length, flags, hops, index
_DST, _OIF, _GATEWAY, _PRIORITY, _PREFSRC, _MULTIPATH, _TABLE, _VIA = 1, 4, 5, 6, 7, 9, 15, 18
_CLONED = 0x200
_ONLINK = 4
MAIN, LOCAL = 254, 255  # RT_TABLE_*
_LINK, _UNIVERSE = 253, 0  # RT_SCOPE_*
_KINDS = ("unspec", "unicast", "local", "broadcast", "anycast", "multicast", "blackhole", "unreachable", "prohibit")
_PROTOCOLS = {0: "unspec", 1: "redirect", 2: "kernel", 3: "boot", 4: "static", 9: "ra", 16: "dhcp"}
_NUMBERS = {name: number for number, name in _PROTOCOLS.items()}

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class NextHop:
    """One way of a route with several."""

    gateway: IPAddress | None
    index: int
    weight: int


@dataclass(frozen=True, slots=True)
class Route:
    """One route. `network` of prefix length 0 is the default route."""

    network: IPNetwork
    gateway: IPAddress | None
    index: int  # of the interface that it leaves by; 0: none, or several ways
    metric: int
    source: IPAddress | None  # preferred address of our own
    table: int  # 254: the main one
    kind: str  # "unicast", "local", "blackhole", ...
    protocol: str  # who made it: "kernel", "boot", "static", "dhcp", "ra", ... or a number
    scope: int
    ways: tuple[NextHop, ...] = ()

    @property
    def default(self) -> bool:
        return self.network.prefixlen == 0


def routes(netlink: Netlink, *, family: int = socket.AF_UNSPEC, table: int | None = MAIN) -> list[Route]:
    """The routes of IPv4, IPv6 or both, of one table or (None) of all; without the cache's copies."""
    families = [family] if family else [socket.AF_INET, socket.AF_INET6]
    found: list[Route] = []
    for each in families:
        request = _ROUTE.pack(each, 0, 0, 0, 0, 0, 0, 0, 0)
        answers = netlink.request("list routes", GETROUTE, DUMP, request)
        found += [route for answer in answers if (route := parse_route(answer))]
    return [route for route in found if table in (None, route.table)]


def add_route(
    netlink: Netlink,
    network: str,
    *,
    gateway: str | None = None,
    index: int = 0,
    metric: int = 0,
    source: str | None = None,
    table: int = MAIN,
    protocol: str = "static",
    kind: str = "unicast",
    onlink: bool = False,
    replace: bool = False,
) -> None:
    """`network` is like "198.51.100.0/24" or "default" ("::/0" for IPv6). With `onlink` the gateway need not lie in a
    network of the interface's."""
    action = f"add the route to {network}"
    how = CREATE | (REPLACE if replace else EXCL)
    request = _encode(action, network, gateway, index, metric, source, table, protocol, kind, onlink)
    netlink.change(action, NEWROUTE, how, request)


def _family(ip: IPAddress | IPNetwork) -> int:
    return socket.AF_INET if ip.version == 4 else socket.AF_INET6


def _encode(  # noqa: PLR0917  the columns of a route
    action: str,
    network: str,
    gateway: str | None,
    index: int,
    metric: int,
    source: str | None,
    table: int,
    protocol: str,
    kind: str,
    onlink: bool,
) -> bytes:
    try:
        way = ipaddress.ip_address(gateway) if gateway is not None else None
        if network == "default":
            network = "::/0" if way is not None and way.version == 6 else "0.0.0.0/0"
        target = ipaddress.ip_network(network)
        own = ipaddress.ip_address(source) if source is not None else None
        number = _KINDS.index(kind) if kind else 0
        by = _NUMBERS[protocol]
    except (ValueError, KeyError) as error:
        raise HostError(f"cannot {action}: {error}", errno=errno.EINVAL) from error
    if {ip.version for ip in (way, own) if ip is not None} - {target.version}:
        raise HostError(f"cannot {action}: addresses of IPv4 and IPv6 do not mix", errno=errno.EINVAL)
    # What has no gateway ends on the link (fib_check_nh).
    scope = _LINK if way is None and kind == "unicast" and target.version == 4 else _UNIVERSE
    short = table if table < 256 else 0
    flags = _ONLINK if onlink else 0
    data = _ROUTE.pack(_family(target), target.prefixlen, 0, 0, short, by, scope, number, flags)
    data += attribute(_DST, target.network_address.packed) + u32_attribute(_TABLE, table)
    if way is not None:
        data += attribute(_GATEWAY, way.packed)
    if index:
        data += u32_attribute(_OIF, index)
    if metric:
        data += u32_attribute(_PRIORITY, metric)
    if own is not None:
        data += attribute(_PREFSRC, own.packed)
    return data


def _address(data: bytes) -> IPAddress | None:
    return ipaddress.ip_address(data) if len(data) in (4, 16) else None


def _gateway(found: Attributes) -> IPAddress | None:
    via = found.get(_VIA, b"")  # a gateway of the other family: two bytes of family, then its address (RFC 5549)
    return _address(found.get(_GATEWAY, b"")) or _address(via[2:])


def _ways(data: bytes) -> tuple[NextHop, ...]:
    found = []
    while len(data) >= _NEXTHOP.size:
        length, _, hops, index = _NEXTHOP.unpack_from(data)
        if not _NEXTHOP.size <= length <= len(data):
            break
        found.append(NextHop(_gateway(attributes(data[:length], _NEXTHOP.size)), index, hops + 1))
        data = data[(length + 3) & ~3 :]
    return tuple(found)


def parse_route(data: bytes) -> Route | None:
    """Decode an RTM_NEWROUTE; None for other families and for copies in a cache."""
    family, prefix, _, _, table, protocol, scope, kind, flags = unpack_head(_ROUTE, data)
    size = {socket.AF_INET: 4, socket.AF_INET6: 16}.get(family)
    if size is None or prefix > size * 8 or flags & _CLONED:
        return None
    found = attributes(data, _ROUTE.size)
    target = found.get(_DST) or bytes(size)
    if len(target) != size:
        return None
    network = ipaddress.ip_network((target, prefix), strict=False)
    return Route(
        network=network,
        gateway=_gateway(found),
        index=u32(found.get(_OIF, b"")),
        metric=u32(found.get(_PRIORITY, b"")),
        source=_address(found.get(_PREFSRC, b"")),
        table=u32(found.get(_TABLE, b"")) or table,
        kind=_KINDS[kind] if kind < len(_KINDS) else str(kind),
        protocol=_PROTOCOLS.get(protocol, str(protocol)),
        scope=scope,
        ways=_ways(found.get(_MULTIPATH, b"")),
    )
