"""A small rtnetlink: the socket, links and addresses, blocking, for the hot paths (rtnetlink(7), netlink(7)).

    with Netlink() as netlink:
        index = netlink.link("tap0").index
        netlink.set_link(index, up=True, master=netlink.link("br0").index)

One request, one answer: a request takes some 20 us, so it may be called from an event loop. Kernel refusals are
`HostError`s with the errno and, where the kernel gives them (NLM extended acknowledgement), its own words.

Beside it, on the same socket: `bridge.py`, `bridge_vlan.py`, `neighbour.py` (FDB, ARP, ND), `route.py`, `traffic.py`.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass

from kvik.errors import HostError
from kvik.host.netlink_attributes import (
    Attributes,
    attribute,
    attributes,
    check_name,
    name_attribute,
    parse_mac,
    text,
    u32,
    u32_attribute,
    unpack_head,
)

# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_F_REQUEST, _F_ACK, _F_DUMP_INTR = 0x1, 0x4, 0x10
_F_CAPPED, _F_ACK_TLVS = 0x100, 0x200
DUMP, REPLACE, EXCL, CREATE, APPEND = 0x300, 0x100, 0x200, 0x400, 0x800  # flags for `request` and `change`
NEWLINK, DELLINK, GETLINK, SETLINK, NEWADDR, DELADDR, GETADDR = 16, 17, 18, 19, 20, 21, 22
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 4, 5, 10, 18
_IFLA_OPERSTATE, _IFLA_IFALIAS, _IFLA_STATS64, _IFLA_NET_NS_FD, _IFLA_CARRIER = 16, 20, 23, 28, 33
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _IFLA_INFO_SLAVE_KIND = 1, 2, 4
_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL, _IFA_BROADCAST, _IFA_CACHEINFO, _IFA_FLAGS = 1, 2, 3, 4, 6, 8
_IFF_UP, _IFF_PROMISC, _IFF_ALLMULTI = 0x1, 0x100, 0x200
_IFA_F_SECONDARY, _IFA_F_NODAD, _IFA_F_DADFAILED, _IFA_F_DEPRECATED = 0x01, 0x02, 0x08, 0x20
_IFA_F_TENTATIVE, _IFA_F_PERMANENT, _IFA_F_NOPREFIXROUTE = 0x40, 0x80, 0x200
_FOREVER = 0xFFFFFFFF
_VETH_INFO_PEER, _IFLA_MACVLAN_MODE, _IFLA_VLAN_ID = 1, 1, 1
_SOL_NETLINK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 270, 11, 12
_NLMSGERR_ATTR_MSG = 1

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change mask
_ADDR = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_CACHEINFO = struct.Struct("=IIII")  # ifa_cacheinfo: seconds preferred, seconds valid, made, changed
_ERROR = struct.Struct("=i")
_BUFFER = 1 << 17
_DUMP_TRIES = 5

MAX_ANSWERS = 1 << 20  # of one dump: what an untrusted guest can grow (an FDB, a neighbour table) stays bounded

_STATES = ("unknown", "notpresent", "down", "lowerlayerdown", "testing", "dormant", "up")  # IF_OPER_*, RFC 2863
MACVTAP_MODES = {"private": 1, "vepa": 2, "bridge": 4, "passthrough": 8}  # libvirt's word for each MACVLAN_MODE_*


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
    state: str = "unknown"  # operational: "up", "down", "lowerlayerdown", ...
    carrier: bool = False
    lower: int = 0  # index of the interface beneath (macvtap, vlan) or of the peer (veth); 0: none
    promiscuous: bool = False
    alias: str = ""
    master_kind: str = ""  # "bridge", "openvswitch", "bond", ...: what `master` is


@dataclass(frozen=True, slots=True)
class Address:
    """An interface's address, such as 192.0.2.1/24."""

    index: int
    interface: ipaddress.IPv4Interface | ipaddress.IPv6Interface
    scope: int = 0  # 0: the world, 253: the link, 254: this host (RT_SCOPE_*)
    label: str = ""
    broadcast: str = ""
    peer: str = ""  # of a point-to-point link
    permanent: bool = True  # not from DHCP or a router's advertisement
    tentative: bool = False  # duplicate address detection is not through
    duplicate: bool = False  # it failed: somebody else has the address
    deprecated: bool = False
    temporary: bool = False  # a secondary IPv4 address; an IPv6 privacy address
    valid: int | None = None  # seconds left; None: for ever
    preferred: int | None = None


class Netlink:
    """A NETLINK_ROUTE socket in the network namespace of the thread that made it; threads may share it."""

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
        self._one_at_a_time = threading.Lock()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Links

    def links(self, *, master: int | None = None, kind: str = "") -> list[Link]:
        """All interfaces, or the ports of the bridge `master`, or those of one kind."""
        request = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        if master is not None:
            request += u32_attribute(_IFLA_MASTER, master)
        if kind:
            request += attribute(_IFLA_LINKINFO, attribute(_IFLA_INFO_KIND, kind.encode()))
        found = [parse_link(answer) for answer in self.request("list network interfaces", GETLINK, DUMP, request)]
        # Once more here: a kernel before 4.20 does not filter.
        return [link for link in found if master in (None, link.master) and kind in ("", link.kind)]

    def link(self, name_or_index: str | int) -> Link:
        """One interface; `HostError` with ENODEV if there is none."""
        return parse_link(self.link_answer(name_or_index))

    def link_answer(self, name_or_index: str | int) -> bytes:
        """The kernel's answer about one interface, undecoded, for what is particular to its kind."""
        if isinstance(name_or_index, int):
            request = _LINK.pack(socket.AF_UNSPEC, 0, name_or_index, 0, 0)
        else:
            request = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + name_attribute(_IFLA_IFNAME, name_or_index)
        answers = self.request(f"look up network interface {name_or_index}", GETLINK, 0, request)
        if not answers:
            raise HostError(f"there is no network interface {name_or_index}", errno=errno.ENODEV)
        return answers[0]

    def set_link(
        self,
        index: int,
        *,
        up: bool | None = None,
        master: int | None = None,
        mtu: int | None = None,
        mac: str | None = None,
        name: str | None = None,
        alias: str | None = None,
        promiscuous: bool | None = None,
        all_multicast: bool | None = None,
        namespace: int | None = None,
    ) -> None:
        """Change what is given, in one request. `master` 0 takes it out of its bridge; `namespace` is the descriptor
        of a network namespace, into which it moves."""
        flags = mask = 0
        for bit, wanted in ((_IFF_UP, up), (_IFF_PROMISC, promiscuous), (_IFF_ALLMULTI, all_multicast)):
            flags |= bit if wanted else 0
            mask |= bit if wanted is not None else 0
        request = _LINK.pack(socket.AF_UNSPEC, 0, index, flags, mask)
        if mac is not None:
            request += attribute(_IFLA_ADDRESS, parse_mac(mac))
        if mtu is not None:
            request += u32_attribute(_IFLA_MTU, mtu)
        if master is not None:
            request += u32_attribute(_IFLA_MASTER, master)
        if name is not None:
            request += name_attribute(_IFLA_IFNAME, name)
        if alias is not None:
            request += attribute(_IFLA_IFALIAS, alias.encode())
        if namespace is not None:
            request += u32_attribute(_IFLA_NET_NS_FD, namespace)
        self.change(f"change network interface {index}", NEWLINK, 0, request)

    def add_link(
        self,
        name: str,
        kind: str,
        *,
        data: bytes = b"",
        lower: int = 0,
        mac: str | None = None,
        mtu: int | None = None,
        master: int | None = None,
        up: bool = False,
    ) -> Link:
        """Make an interface, such as a bridge or a dummy. `data` are attributes particular to the kind; `lower` is the
        interface that it stands on. If it cannot be made as asked, there is none afterwards."""
        info = attribute(_IFLA_INFO_KIND, kind.encode()) + (attribute(_IFLA_INFO_DATA, data) if data else b"")
        flags = _IFF_UP if up else 0
        request = _LINK.pack(socket.AF_UNSPEC, 0, 0, flags, flags) + name_attribute(_IFLA_IFNAME, name)
        if mac is not None:
            request += attribute(_IFLA_ADDRESS, parse_mac(mac))
        if mtu is not None:
            request += u32_attribute(_IFLA_MTU, mtu)
        if lower:
            request += u32_attribute(_IFLA_LINK, lower)
        if master:
            request += u32_attribute(_IFLA_MASTER, master)
        request += attribute(_IFLA_LINKINFO, info)
        self.change(f"make {kind} {name}", NEWLINK, CREATE | EXCL, request)
        return self.link(name)

    def add_veth(self, name: str, peer: str, *, namespace: int | None = None, up: bool = False) -> Link:
        """Make a pair of interfaces joined by a wire; the peer in another namespace, if its descriptor is given, where
        `up` does not reach it."""
        other = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + name_attribute(_IFLA_IFNAME, peer)
        if namespace is not None:
            other += u32_attribute(_IFLA_NET_NS_FD, namespace)
        made = self.add_link(name, "veth", data=attribute(_VETH_INFO_PEER, other))
        if up:  # only now: an end that is made up finds no peer yet (ENOTCONN, veth_open)
            self.set_link(made.index, up=True)
            if namespace is None:
                self.set_link(made.lower, up=True)
            made = self.link(made.index)
        return made

    def add_macvtap(self, name: str, lower: int, mode: str, *, mac: str | None = None, up: bool = False) -> Link:
        """Make a macvtap on an interface; `mode` is "private", "vepa", "bridge" or "passthrough"."""
        if mode not in MACVTAP_MODES:
            known = ", ".join(MACVTAP_MODES)
            raise HostError(f"cannot make macvtap {name}: {mode!r} is no mode ({known})", errno=errno.EINVAL)
        data = u32_attribute(_IFLA_MACVLAN_MODE, MACVTAP_MODES[mode])
        return self.add_link(name, "macvtap", data=data, lower=lower, mac=mac, up=up)

    def add_vlan(self, name: str, lower: int, vlan: int, *, up: bool = False) -> Link:
        """Make the interface that carries one VLAN (1 to 4094) of another interface."""
        if not 1 <= vlan <= 4094:
            raise HostError(f"cannot make VLAN interface {name}: {vlan} is no VLAN (1 to 4094)", errno=errno.EINVAL)
        return self.add_link(name, "vlan", data=attribute(_IFLA_VLAN_ID, struct.pack("=H", vlan)), lower=lower, up=up)

    def delete_link(self, index: int) -> None:
        self.change(f"delete network interface {index}", DELLINK, 0, _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0))

    # Addresses

    def addresses(self, index: int = 0) -> list[Address]:
        """Of one interface, or of all."""
        request = _ADDR.pack(socket.AF_UNSPEC, 0, 0, 0, index)
        answers = self.request("list addresses", GETADDR, DUMP, request)
        found = [address for answer in answers if (address := parse_address(answer))]
        return [address for address in found if index in (0, address.index)]

    def add_address(
        self,
        index: int,
        interface: str,
        *,
        broadcast: str | None = None,
        label: str | None = None,
        valid: int | None = None,
        preferred: int | None = None,
        detect_duplicates: bool = True,
        prefix_route: bool = True,
        replace: bool = False,
    ) -> None:
        """`interface` is like "192.0.2.1/24" or "2001:db8::1/64". Lifetimes are in seconds, None for ever; an IPv6
        address without `detect_duplicates` is of use at once; without `prefix_route` its network gets no route."""
        flags = (0 if detect_duplicates else _IFA_F_NODAD) | (0 if prefix_route else _IFA_F_NOPREFIXROUTE)
        more = b""
        try:
            if broadcast is not None:
                more += attribute(_IFA_BROADCAST, ipaddress.IPv4Address(broadcast).packed)
        except ValueError as error:
            raise HostError(f"cannot add address {interface}: {error}", errno=errno.EINVAL) from error
        if label is not None:
            check_name(label.replace(":", "", 1))  # like "eth0:1"
            more += attribute(_IFA_LABEL, label.encode() + b"\0")
        if valid is not None or preferred is not None:
            # valid >= preferred > 0, else EINVAL (inet_validate_link_lft); for ever is all ones.
            times = [_FOREVER if value is None else value for value in (preferred, valid)]
            more += attribute(_IFA_CACHEINFO, _CACHEINFO.pack(*times, 0, 0))
        if flags:
            more += u32_attribute(_IFA_FLAGS, flags)
        how = CREATE | (REPLACE if replace else EXCL)
        self._change_address(f"add address {interface}", NEWADDR, how, (index, interface), more)

    def delete_address(self, index: int, interface: str) -> None:
        self._change_address(f"delete address {interface}", DELADDR, 0, (index, interface))

    def _change_address(self, action: str, kind: int, flags: int, address: tuple[int, str], more: bytes = b"") -> None:
        index, interface = address
        try:
            value = ipaddress.ip_interface(interface)
        except ValueError as error:
            raise HostError(f"cannot {action}: {error}", errno=errno.EINVAL) from error
        family = socket.AF_INET if value.version == 4 else socket.AF_INET6
        request = _ADDR.pack(family, value.network.prefixlen, 0, 0, index)
        request += attribute(_IFA_LOCAL, value.ip.packed) + attribute(_IFA_ADDRESS, value.ip.packed)
        self.change(action, kind, flags, request + more)

    # Requests and answers

    def change(self, action: str, kind: int, flags: int, payload: bytes) -> None:
        """Send one request that the kernel acknowledges or refuses (`HostError`: "cannot ACTION: ...", with the name of
        an interface that ACTION gives by its index)."""
        try:
            self.request(action, kind, flags | _F_ACK, payload)
        except HostError as error:
            raise HostError(_named(error.message), errno=error.errno, remedy=error.remedy) from error.__cause__

    def request(self, action: str, kind: int, flags: int, payload: bytes) -> list[bytes]:
        """Send one request; the payloads of its answers up to the end of the dump, the acknowledgement or the one.

        A list that changed while it was read is read again, as NLM_F_DUMP_INTR asks for.
        """
        for _ in range(_DUMP_TRIES - 1):
            answers, torn = self._exchange(action, kind, flags, payload)
            if not torn:
                return answers
        return self._exchange(action, kind, flags, payload)[0]  # on a host this busy no list stays true for long

    def _exchange(self, action: str, kind: int, flags: int, payload: bytes) -> tuple[list[bytes], bool]:
        with self._one_at_a_time:
            return self._exchange_alone(action, kind, flags, payload)

    def _exchange_alone(self, action: str, kind: int, flags: int, payload: bytes) -> tuple[list[bytes], bool]:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        header = _HEADER.pack(_HEADER.size + len(payload), kind, flags | _F_REQUEST, self._sequence, 0)
        try:
            self._socket.send(header + payload)
            return self._answers(action, flags & DUMP == DUMP or bool(flags & _F_ACK))
        except OSError as error:  # includes the time-out
            raise HostError(f"cannot {action}: {error.strerror or error}", errno=error.errno or 0) from error

    def _answers(self, action: str, until_end: bool) -> tuple[list[bytes], bool]:
        """The answers, and whether the kernel said that they do not fit together."""
        answers: list[bytes] = []
        torn = overflow = False
        while True:
            data = self._socket.recv(_BUFFER)
            start = 0
            while start + _HEADER.size <= len(data):
                length, kind, flags, sequence, _ = _HEADER.unpack_from(data, start)
                if not _HEADER.size <= length <= len(data) - start:
                    raise HostError(f"cannot {action}: the kernel's answer is cut short", errno=errno.EBADMSG)
                payload = data[start + _HEADER.size : start + length]
                start += (length + 3) & ~3
                if sequence != self._sequence:
                    continue  # of an earlier request that timed out
                torn |= bool(flags & _F_DUMP_INTR)
                if kind == _NLMSG_ERROR:
                    raise_refusal(action, payload, flags)
                    return answers, torn
                if kind == _NLMSG_DONE:
                    if len(payload) >= 4 and u32(payload):  # a dump that failed halfway says so at its end
                        raise_refusal(action, payload, flags)
                    if overflow:
                        raise HostError(f"cannot {action}: more than {MAX_ANSWERS} entries", errno=errno.E2BIG)
                    return answers, torn
                if len(answers) >= MAX_ANSWERS:
                    overflow = True  # read on: a dump that is left halfway makes the next one fail (EBUSY)
                    continue
                answers.append(payload)
                if not until_end:
                    return answers, torn


def _named(words: str) -> str:
    """Names where interfaces are given by index, as far as they are there."""

    def name(found: re.Match[str]) -> str:
        try:
            return f"{found[1]} {socket.if_indextoname(int(found[2]))}"
        except (OSError, OverflowError):
            return found[0]

    return re.sub(r"\b(interface|bridge) (\d+)\b", name, words)


def raise_refusal(action: str, payload: bytes, flags: int) -> None:
    """Raise what an nlmsgerr says, with the kernel's own words where it has any; nothing if it says 0."""
    number = -unpack_head(_ERROR, payload)[0]
    if not number:
        return
    words = ""
    if flags & _F_ACK_TLVS and len(payload) >= 4 + _HEADER.size:
        # After the error code: our request's header, and unless capped all of our request.
        request = _HEADER.unpack_from(payload, 4)[0]
        start = 4 + (_HEADER.size if flags & _F_CAPPED else (request + 3) & ~3)
        words = text(attributes(payload, start).get(_NLMSGERR_ATTR_MSG, b""))
    remedy = "run as root, or with CAP_NET_ADMIN" if number in (errno.EPERM, errno.EACCES) else ""
    reason = os.strerror(number) + (f" ({words})" if words else "")
    raise HostError(f"cannot {action}: {reason}", errno=number, remedy=remedy)


def link_data(answer: bytes) -> Attributes:
    """Of an answer about a link: what is particular to its kind (IFLA_INFO_DATA)."""
    info = attributes(attributes(answer, _LINK.size).get(_IFLA_LINKINFO, b""))
    return attributes(info.get(_IFLA_INFO_DATA, b""))


def parse_link(data: bytes) -> Link:
    """Decode an RTM_NEWLINK or RTM_DELLINK."""
    _, _, index, flags, _ = unpack_head(_LINK, data)
    found = attributes(data, _LINK.size)
    info = attributes(found.get(_IFLA_LINKINFO, b""))
    stats = found.get(_IFLA_STATS64, b"")
    rx_packets, tx_packets, rx_bytes, tx_bytes, rx_errors, tx_errors, rx_dropped, tx_dropped = (
        struct.unpack_from("=8Q", stats) if len(stats) >= 64 else (0,) * 8
    )
    state = found.get(_IFLA_OPERSTATE, b"\0")[0]
    return Link(
        index=index,
        name=text(found.get(_IFLA_IFNAME, b"")),
        kind=text(info.get(_IFLA_INFO_KIND, b"")),
        mac=found.get(_IFLA_ADDRESS, b"").hex(":"),
        mtu=u32(found.get(_IFLA_MTU, b"")),
        master=u32(found.get(_IFLA_MASTER, b"")),
        up=bool(flags & _IFF_UP),
        rx_bytes=rx_bytes,
        rx_packets=rx_packets,
        rx_errors=rx_errors,
        rx_dropped=rx_dropped,
        tx_bytes=tx_bytes,
        tx_packets=tx_packets,
        tx_errors=tx_errors,
        tx_dropped=tx_dropped,
        state=_STATES[state] if state < len(_STATES) else "unknown",
        carrier=found.get(_IFLA_CARRIER, b"\0")[:1] == b"\1",
        lower=u32(found.get(_IFLA_LINK, b"")),
        promiscuous=bool(flags & _IFF_PROMISC),
        alias=text(found.get(_IFLA_IFALIAS, b"")),
        master_kind=text(info.get(_IFLA_INFO_SLAVE_KIND, b"")),
    )


def parse_address(data: bytes) -> Address | None:
    """Decode an RTM_NEWADDR or RTM_DELADDR; None for another family's."""
    family, prefix, short_flags, scope, index = unpack_head(_ADDR, data)
    found = attributes(data, _ADDR.size)
    # For point-to-point links ADDRESS is the peer's: LOCAL, where there is one, is ours.
    other = found.get(_IFA_ADDRESS, b"")
    packed = found.get(_IFA_LOCAL) or other
    size = {socket.AF_INET: 4, socket.AF_INET6: 16}.get(family)
    if size is None or len(packed) != size or prefix > size * 8:
        return None
    flags = u32(found[_IFA_FLAGS]) if _IFA_FLAGS in found else short_flags
    times = found.get(_IFA_CACHEINFO, b"")
    preferred, valid = _CACHEINFO.unpack_from(times)[:2] if len(times) >= _CACHEINFO.size else (_FOREVER, _FOREVER)
    return Address(
        index,
        ipaddress.IPv4Interface((packed, prefix)) if size == 4 else ipaddress.IPv6Interface((packed, prefix)),
        scope=scope,
        label=text(found.get(_IFA_LABEL, b"")),
        broadcast=str(ipaddress.ip_address(sent)) if len(sent := found.get(_IFA_BROADCAST, b"")) == size else "",
        peer=str(ipaddress.ip_address(other)) if len(other) == size and other != packed else "",
        permanent=bool(flags & _IFA_F_PERMANENT),
        tentative=bool(flags & _IFA_F_TENTATIVE),
        duplicate=bool(flags & _IFA_F_DADFAILED),
        deprecated=bool(flags & _IFA_F_DEPRECATED),
        temporary=bool(flags & _IFA_F_SECONDARY),
        valid=None if valid == _FOREVER else valid,
        preferred=None if preferred == _FOREVER else preferred,
    )
