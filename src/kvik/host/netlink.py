"""A small rtnetlink: links and addresses, blocking, for the hot paths (rtnetlink(7), netlink(7)).

    with Netlink() as netlink:
        index = netlink.link("tap0").index
        netlink.set_link(index, up=True, master=netlink.link("br0").index)

One request, one answer: a request takes some 20 us, so it may be called from an event loop. Kernel refusals are
`HostError`s with the errno and, where the kernel gives them (NLM extended acknowledgement), its own words.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kvik.errors import HostError

# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_F_REQUEST, _F_ACK, _F_ROOT, _F_MATCH, _F_EXCL, _F_CREATE = 0x1, 0x4, 0x100, 0x200, 0x200, 0x400
_F_CAPPED, _F_ACK_TLVS = 0x100, 0x200
_NEWLINK, _DELLINK, _GETLINK, _NEWADDR, _DELADDR, _GETADDR = 16, 17, 18, 20, 21, 22
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 4, 10, 18
_IFLA_OPERSTATE, _IFLA_STATS64 = 16, 23
_IFLA_INFO_KIND = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFF_UP = 1
_SOL_NETLINK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 270, 11, 12
_NLMSGERR_ATTR_MSG = 1

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change mask
_ADDR = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_ATTRIBUTE = struct.Struct("=HH")
_BUFFER = 1 << 17
MAX_NAME = 15  # IFNAMSIZ less the terminating zero

Attributes = dict[int, bytes]


@dataclass(frozen=True, slots=True)
class Link:
    """One network interface."""

    index: int
    name: str
    kind: str  # "bridge", "tun", "veth", ...; empty for hardware and loopback
    mac: str
    mtu: int
    master: int  # index of the bridge that it is a port of; 0: none
    up: bool  # administratively
    rx_bytes: int = 0
    rx_packets: int = 0
    rx_errors: int = 0
    rx_dropped: int = 0
    tx_bytes: int = 0
    tx_packets: int = 0
    tx_errors: int = 0
    tx_dropped: int = 0


@dataclass(frozen=True, slots=True)
class Address:
    """An interface's address, such as 192.0.2.1/24."""

    index: int
    interface: ipaddress.IPv4Interface | ipaddress.IPv6Interface


def check_name(name: str) -> str:
    """An interface name that the kernel accepts (dev_valid_name in net/core/dev.c), or `HostError`."""
    good = 0 < len(name.encode()) <= MAX_NAME and name not in (".", "..") and name.isascii() and name.isprintable()
    if not good or any(letter in name for letter in "/: "):
        raise HostError(f"{name!r} is no name for a network interface", errno=errno.EINVAL)
    return name


def _attribute(kind: int, payload: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _attributes(data: bytes) -> Attributes:
    found: Attributes = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            break
        found[kind & 0x3FFF] = data[_ATTRIBUTE.size : length]  # less the flags "nested" and "net byte order"
        data = data[(length + 3) & ~3 :]
    return found


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "replace")


def _u32(data: bytes) -> int:
    return int.from_bytes(data[:4], "little") if len(data) >= 4 else 0


def parse_mac(mac: str) -> bytes:
    try:
        octets = bytes(int(part, 16) for part in mac.split(":"))
    except ValueError:
        octets = b""
    if len(octets) != 6:
        raise HostError(f"{mac!r} is no MAC address", errno=errno.EINVAL)
    return octets


class Netlink:
    """A NETLINK_ROUTE socket in the network namespace of the thread that made it."""

    def __init__(self, timeout: float = 5.0) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.settimeout(timeout)
        self._socket.bind((0, 0))
        for option in (_NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            try:
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            except OSError:
                pass  # an old kernel: only its words are lost
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Links

    def links(self) -> list[Link]:
        request = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        answers = self._call("list network interfaces", _GETLINK, _F_ROOT | _F_MATCH, request)
        return [_parse_link(answer) for answer in answers]

    def link(self, name_or_index: str | int) -> Link:
        """One interface; `HostError` with ENODEV if there is none."""
        if isinstance(name_or_index, int):
            request = _LINK.pack(socket.AF_UNSPEC, 0, name_or_index, 0, 0)
        else:
            name = check_name(name_or_index).encode() + b"\0"
            request = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _attribute(_IFLA_IFNAME, name)
        answers = list(self._call(f"look up network interface {name_or_index}", _GETLINK, 0, request))
        if not answers:
            raise HostError(f"there is no network interface {name_or_index}", errno=errno.ENODEV)
        return _parse_link(answers[0])

    def set_link(
        self,
        index: int,
        *,
        up: bool | None = None,
        master: int | None = None,
        mtu: int | None = None,
        mac: str | None = None,
        name: str | None = None,
    ) -> None:
        """Change what is given, in one request. `master` 0 takes it out of its bridge."""
        flags = _IFF_UP if up else 0
        request = _LINK.pack(socket.AF_UNSPEC, 0, index, flags, _IFF_UP if up is not None else 0)
        if mac is not None:
            request += _attribute(_IFLA_ADDRESS, parse_mac(mac))
        if mtu is not None:
            request += _attribute(_IFLA_MTU, struct.pack("=I", mtu))
        if master is not None:
            request += _attribute(_IFLA_MASTER, struct.pack("=I", master))
        if name is not None:
            request += _attribute(_IFLA_IFNAME, check_name(name).encode() + b"\0")
        self._do(f"change network interface {index}", _NEWLINK, 0, request)

    def add_link(self, name: str, kind: str) -> Link:
        """Make an interface, such as a bridge or a dummy."""
        info = _attribute(_IFLA_INFO_KIND, kind.encode())
        request = (
            _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
            + _attribute(_IFLA_IFNAME, check_name(name).encode() + b"\0")
            + _attribute(_IFLA_LINKINFO, info)
        )
        self._do(f"make {kind} {name}", _NEWLINK, _F_CREATE | _F_EXCL, request)
        return self.link(name)

    def delete_link(self, index: int) -> None:
        self._do(f"delete network interface {index}", _DELLINK, 0, _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0))

    # Addresses

    def addresses(self, index: int = 0) -> list[Address]:
        """Of one interface, or of all."""
        request = _ADDR.pack(socket.AF_UNSPEC, 0, 0, 0, index)
        answers = self._call("list addresses", _GETADDR, _F_ROOT | _F_MATCH, request)
        found = [address for answer in answers if (address := _parse_address(answer))]
        return [address for address in found if index in (0, address.index)]

    def add_address(self, index: int, interface: str) -> None:
        """`interface` is like "192.0.2.1/24" or "2001:db8::1/64"."""
        self._change_address(f"add address {interface}", _NEWADDR, _F_CREATE | _F_EXCL, index, interface)

    def delete_address(self, index: int, interface: str) -> None:
        self._change_address(f"delete address {interface}", _DELADDR, 0, index, interface)

    def _change_address(self, action: str, kind: int, flags: int, index: int, interface: str) -> None:
        try:
            value = ipaddress.ip_interface(interface)
        except ValueError as error:
            raise HostError(f"cannot {action}: {error}", errno=errno.EINVAL) from error
        family = socket.AF_INET if value.version == 4 else socket.AF_INET6
        request = _ADDR.pack(family, value.network.prefixlen, 0, 0, index)
        request += _attribute(_IFA_LOCAL, value.ip.packed) + _attribute(_IFA_ADDRESS, value.ip.packed)
        self._do(action, kind, flags, request)

    # Requests and answers

    def _do(self, action: str, kind: int, flags: int, payload: bytes) -> None:
        for _ in self._call(action, kind, flags | _F_ACK, payload):
            pass

    def _call(self, action: str, kind: int, flags: int, payload: bytes) -> list[bytes]:
        """Send one request; the payloads of its answers up to the end of the dump, the acknowledgement or the one."""
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        header = _HEADER.pack(_HEADER.size + len(payload), kind, flags | _F_REQUEST, self._sequence, 0)
        try:
            self._socket.send(header + payload)
            return list(self._answers(action, bool(flags & (_F_ROOT | _F_ACK))))
        except OSError as error:  # includes the time-out
            raise HostError(f"cannot {action}: {error.strerror or error}", errno=error.errno or 0) from error

    def _answers(self, action: str, until_end: bool) -> Iterator[bytes]:
        while True:
            data = self._socket.recv(_BUFFER)
            while len(data) >= _HEADER.size:
                length, kind, flags, sequence, _ = _HEADER.unpack_from(data)
                if not _HEADER.size <= length <= len(data):
                    raise HostError(f"cannot {action}: the kernel's answer is cut short", errno=errno.EBADMSG)
                payload, data = data[_HEADER.size : length], data[(length + 3) & ~3 :]
                if sequence != self._sequence:
                    continue  # of an earlier request that timed out
                if kind == _NLMSG_ERROR:
                    _raise_refusal(action, payload, flags)
                    return
                if kind == _NLMSG_DONE:
                    return
                yield payload
                if not until_end:
                    return


def _raise_refusal(action: str, payload: bytes, flags: int) -> None:
    number = -struct.unpack_from("=i", payload)[0]
    if not number:
        return
    words = ""
    if flags & _F_ACK_TLVS:
        # After the error code: our request's header, and unless capped all of our request.
        request = _HEADER.unpack_from(payload, 4)[0]
        start = 4 + (_HEADER.size if flags & _F_CAPPED else (request + 3) & ~3)
        words = _text(_attributes(payload[start:]).get(_NLMSGERR_ATTR_MSG, b""))
    remedy = "run as root, or with CAP_NET_ADMIN" if number in (errno.EPERM, errno.EACCES) else ""
    reason = os.strerror(number) + (f" ({words})" if words else "")
    raise HostError(f"cannot {action}: {reason}", errno=number, remedy=remedy)


def _parse_link(data: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(data)
    found = _attributes(data[_LINK.size :])
    info = _attributes(found.get(_IFLA_LINKINFO, b""))
    stats = found.get(_IFLA_STATS64, b"")
    rx_packets, tx_packets, rx_bytes, tx_bytes, rx_errors, tx_errors, rx_dropped, tx_dropped = (
        struct.unpack_from("=8Q", stats) if len(stats) >= 64 else (0,) * 8
    )
    return Link(
        index=index,
        name=_text(found.get(_IFLA_IFNAME, b"")),
        kind=_text(info.get(_IFLA_INFO_KIND, b"")),
        mac=found.get(_IFLA_ADDRESS, b"").hex(":"),
        mtu=_u32(found.get(_IFLA_MTU, b"")),
        master=_u32(found.get(_IFLA_MASTER, b"")),
        up=bool(flags & _IFF_UP),
        rx_bytes=rx_bytes,
        rx_packets=rx_packets,
        rx_errors=rx_errors,
        rx_dropped=rx_dropped,
        tx_bytes=tx_bytes,
        tx_packets=tx_packets,
        tx_errors=tx_errors,
        tx_dropped=tx_dropped,
    )


def _parse_address(data: bytes) -> Address | None:
    family, prefix, _, _, index = _ADDR.unpack_from(data)
    found = _attributes(data[_ADDR.size :])
    # For point-to-point links ADDRESS is the peer's: LOCAL, where there is one, is ours.
    packed = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS) or b""
    if (family, len(packed)) == (socket.AF_INET, 4):
        return Address(index, ipaddress.IPv4Interface((packed, prefix)))
    if (family, len(packed)) == (socket.AF_INET6, 16):
        return Address(index, ipaddress.IPv6Interface((packed, prefix)))
    return None
