"""Hands all addresses and routes of one network interface over to another, in one go (rtnetlink(7)).

What an interface has is kept as the kernel told it and sent back as it was, with another interface's index in it: so
labels, lifetimes, scopes, metrics, tables, preferred sources and multiple next hops stay, known to us or not (the way
of `ip address save` and `ip route save`). All messages of a handover go in one system call: the kernel has worked
through all of them when it returns, and a process that is killed leaves all of it done or nothing.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvik.errors import HostError
from kvik.host.netlink import CREATE, DELADDR, DUMP, EXCL, GETADDR, NEWADDR, NEWLINK, Netlink, raise_refusal
from kvik.host.netlink_attributes import attribute, attributes, iterate_attributes, text, u32

# linux/rtnetlink.h, linux/if_addr.h, linux/if_link.h
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst, src length, tos, table, protocol, scope, type, flags
_ADDR = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_LINK = struct.Struct("=BxHiII")
_HOP = struct.Struct("=HBBi")  # rtnexthop: length, flags, hops, index
_IFA_LABEL, _IFA_FLAGS = 3, 8
_IFA_KEPT = frozenset({1, 2, _IFA_LABEL, 4, 6, 9, 11})  # address, local, label, broadcast, lifetimes, priority, origin
_IFA_F_NODAD, _IFA_F_KEPT = 0x02, 0x10 | 0x100 | 0x200 | 0x400  # home, manage temporary, no prefix route, autojoin
_RTA_OIF, _RTA_MULTIPATH, _RTA_CACHEINFO, _RTA_TABLE, _RTA_EXPIRES = 4, 9, 12, 15, 23
# dst, src, oif, gateway, priority, prefsrc, metrics, multipath, table, via, pref, encapsulation
_RTA_KEPT = frozenset({1, 2, _RTA_OIF, 5, 6, 7, 8, _RTA_MULTIPATH, _RTA_TABLE, 18, 20, 21, 22})
_RTN_UNICAST, _TABLE_LOCAL, _CLONED, _ONLINK = 1, 255, 0x200, 0x4
_USER_HZ = 100
_IFLA_MASTER, _IFLA_AF_SPEC, _INET6_ADDR_GEN_MODE = 10, 26, 8
PORT_GEN_MODE = 1  # IN6_ADDR_GEN_MODE_NONE
_NESTED = 0x8000
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_NLMSG_ERROR = 2
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFER = 8 << 20
_GONE = frozenset({errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENODEV})

Message = tuple[str, int, int, bytes, frozenset[int]]  # action, type, flags, payload, errors that do not matter


@dataclass(slots=True)
class Belongings:
    """What an interface has, as the kernel's own messages. `gen_mode`: how it makes its link-local address."""

    name: str
    index: int
    mac: str
    up: bool
    master: str
    gen_mode: int
    addresses: list[bytes] = field(default_factory=list)
    routes: list[bytes] = field(default_factory=list)


def belongings(netlink: Netlink, name: str) -> Belongings:
    """All that `name` has: addresses and routes of both families. `HostError` if there is no such interface."""
    link = netlink.link(name)
    master = netlink.link(link.master).name if link.master else ""
    ask = _ADDR.pack(socket.AF_UNSPEC, 0, 0, 0, link.index)
    answers = netlink.request(f"list the addresses of {name}", GETADDR, DUMP, ask)
    found = Belongings(name, link.index, link.mac, link.up, master, _gen_mode(netlink, name))
    found.addresses = [data for data in answers if _ADDR.unpack_from(data)[4] == link.index]
    for family in (socket.AF_INET, socket.AF_INET6):
        ask = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        try:
            answers = netlink.request("list routes", _GETROUTE, DUMP, ask)
        except HostError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT) and family == socket.AF_INET6:
                continue  # a kernel without IPv6
            raise
        found.routes += [data for data in answers if _is_of(data, link.index)]
    # Those without a gateway first: the others need them to be there.
    found.routes.sort(key=lambda data: 5 in attributes(data[_ROUTE.size :]))
    return found


def _gen_mode(netlink: Netlink, name: str) -> int:
    answer = netlink.link_answer(name)
    families = attributes(attributes(answer[_LINK.size :]).get(_IFLA_AF_SPEC, b""))
    mode = attributes(families.get(socket.AF_INET6, b"")).get(_INET6_ADDR_GEN_MODE, b"")
    return mode[0] if mode else -1


def _is_of(data: bytes, index: int) -> bool:
    """A route that somebody made, or the kernel for an address, through this interface; no cache, not itself local."""
    _, _, _, _, table, _, _, kind, flags = _ROUTE.unpack_from(data)
    found = attributes(data[_ROUTE.size :])
    table = u32(found[_RTA_TABLE]) if _RTA_TABLE in found else table
    if kind != _RTN_UNICAST or table == _TABLE_LOCAL or flags & _CLONED:
        return False
    if _RTA_MULTIPATH in found:
        return index in [hop for hop, _, _ in _hops(found[_RTA_MULTIPATH])]
    return u32(found.get(_RTA_OIF, b"")) == index


def _hops(data: bytes) -> Iterable[tuple[int, bytes, bytes]]:
    """(interface's index, the header's first half, attributes) of each next hop."""
    while len(data) >= _HOP.size:
        length, flags, hops, index = _HOP.unpack_from(data)
        if not _HOP.size <= length <= len(data):
            return
        yield index, struct.pack("=HBB", length, flags & _ONLINK, hops), data[_HOP.size : length]
        data = data[(length + 3) & ~3 :]


# Messages ---------------------------------------------------------------------------------------------------------


def _route(data: bytes, old: int, new: int) -> bytes:
    """The route as a request, through interface `new` where it was through `old`."""
    family, dst, src, tos, table, protocol, scope, kind, flags = _ROUTE.unpack_from(data)
    out = _ROUTE.pack(family, dst, src, tos, table, protocol, scope, kind, flags & _ONLINK)
    for number, value in iterate_attributes(data[_ROUTE.size :]):
        if number == _RTA_CACHEINFO and len(value) >= 12:
            # rta_cacheinfo: uses, last use, expires (ticks; 0: never). Routes from router advertisements have it.
            ticks = struct.unpack_from("=i", value, 8)[0]
            if ticks > 0:
                out += attribute(_RTA_EXPIRES, struct.pack("=I", max(1, ticks // _USER_HZ)))
            continue
        if number not in _RTA_KEPT:
            continue
        if number == _RTA_OIF:
            value = struct.pack("=I", new if u32(value) == old else u32(value))
        elif number == _RTA_MULTIPATH:
            hops = b""
            for index, head, rest in _hops(value):
                hop = head + struct.pack("=i", new if index == old else index) + rest
                hops += hop + bytes(-len(hop) % 4)
            value = hops
        out += attribute(number, value)
    return out


def _address(data: bytes, index: int, name: str) -> bytes:
    """The address as a request for interface `index`, which is called `name`."""
    family, prefix, flags, scope, _ = _ADDR.unpack_from(data)
    found = attributes(data[_ADDR.size :])
    wide = u32(found[_IFA_FLAGS]) if _IFA_FLAGS in found else flags
    # It was ours a moment ago: duplicate detection would only make it unusable for a second (RFC 4862, 5.4).
    wide = wide & _IFA_F_KEPT | (_IFA_F_NODAD if family == socket.AF_INET6 else 0)
    out = _ADDR.pack(family, prefix, wide & 0xFF, scope, index)
    for number, value in iterate_attributes(data[_ADDR.size :]):
        if number not in _IFA_KEPT:
            continue
        if number == _IFA_LABEL:
            _, colon, alias = text(value).partition(":")
            label = f"{name}:{alias}" if colon and len(name) + 1 + len(alias) < 16 else name
            value = label.encode() + b"\0"
        out += attribute(number, value)
    return out + attribute(_IFA_FLAGS, struct.pack("=I", wide))


def _set_master(index: int, name: str, master: int) -> Message:
    request = _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0) + attribute(_IFLA_MASTER, struct.pack("=I", master))
    return (f"change the bridge of {name}", NEWLINK, 0, request, frozenset())


def _set_mode(index: int, name: str, gen_mode: int) -> list[Message]:
    if gen_mode < 0:
        return []  # a kernel without IPv6
    inet6 = attribute(_INET6_ADDR_GEN_MODE, bytes([gen_mode]))
    spec = attribute(_IFLA_AF_SPEC | _NESTED, attribute(socket.AF_INET6 | _NESTED, inet6))
    request = _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0) + spec
    return [(f"set how {name} makes its link-local address", NEWLINK, 0, request, frozenset())]


def _take(things: Belongings, index: int, name: str) -> list[Message]:
    """Take them from interface `name`: routes, then addresses, the last one first (a primary takes its secondaries
    with it). What is gone already is no error."""
    messages: list[Message] = [
        (f"delete a route of {name}", _DELROUTE, 0, _route(data, things.index, index), _GONE)
        for data in reversed(things.routes)
    ]
    return messages + [
        (f"delete an address of {name}", DELADDR, 0, _address(data, index, name), _GONE)
        for data in reversed(things.addresses)
    ]


def _give(things: Belongings, index: int, name: str) -> list[Message]:
    """Give them to interface `name`. What the kernel made with an address, or is there already, is no error."""
    exists = frozenset({errno.EEXIST})
    messages: list[Message] = []
    for data in things.addresses:
        request = _address(data, index, name)
        if request[0] == socket.AF_INET6:
            # The kernel may just have made the link-local one itself, and be at detecting duplicates of it.
            messages.append((f"delete an address of {name}", DELADDR, 0, request, _GONE))
        messages.append((f"add an address to {name}", NEWADDR, CREATE | EXCL, request, exists))
    return messages + [
        (f"add a route to {name}", _NEWROUTE, CREATE | EXCL, _route(data, things.index, index), exists)
        for data in things.routes
    ]


def hand_over(
    netlink: Netlink, things: Belongings, source: str, target: str, *, port: str, master: str, gen_mode: int
) -> None:
    """In one system call: `port` becomes a port of `master` (empty: of none), `things` go from `source` to `target`.

    May be repeated: what is done already stays so. `HostError` with the kernel's first refusal that matters; the rest
    was tried nevertheless, and handing over the other way round undoes it.
    """
    messages: list[Message] = []
    port_index = netlink.link(port).index
    try:
        messages += _take(things, netlink.link(source).index, source)
    except HostError as error:
        if error.errno != errno.ENODEV:
            raise  # gone, and all that it had with it
    messages.append(_set_master(port_index, port, netlink.link(master).index if master else 0))
    mode = _set_mode(port_index, port, gen_mode)
    given = _give(things, netlink.link(target).index, target)
    # A port keeps no link-local address: it would be the bridge's own once more. One that is a port no longer gets its
    # back with the others, before the kernel would make it anew.
    messages += [*mode, *given] if master else [*given, *mode]
    send_together(messages)


def send_together(messages: Sequence[Message], timeout: float = 5.0) -> None:
    """Send requests in one system call, within which the kernel works through all of them, whatever becomes of us.

    Raises the first refusal that is none of a message's own exceptions, after all were tried.
    """
    acknowledge, request_flag = 0x4, 0x1
    data = b""
    for number, (_, kind, flags, payload, _) in enumerate(messages, 1):
        one = _HEADER.pack(_HEADER.size + len(payload), kind, flags | acknowledge | request_flag, number, 0) + payload
        data += one + bytes(-len(one) % 4)
    first: HostError | None = None
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(timeout)
        sock.bind((0, 0))
        sock.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        sock.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):  # all answers wait in the socket at once
            try:
                sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
            except OSError:
                pass  # without privileges the change itself is refused, and its reason is the better message
        try:
            sock.send(data)
            left = len(messages)
            while left:
                answer = sock.recv(1 << 17)
                while len(answer) >= _HEADER.size:
                    length, kind, flags, number, _ = _HEADER.unpack_from(answer)
                    if kind == _NLMSG_ERROR and 0 < number <= len(messages):
                        left -= 1
                        action, _, _, _, harmless = messages[number - 1]
                        try:
                            raise_refusal(action, answer[_HEADER.size : length], flags)
                        except HostError as error:
                            if first is None and error.errno not in harmless:
                                first = error
                    answer = answer[(max(length, _HEADER.size) + 3) & ~3 :]
        except OSError as error:
            raise HostError(
                f"cannot hand an interface over: {error.strerror or error}", errno=error.errno or 0
            ) from error
    if first is not None:
        raise first
