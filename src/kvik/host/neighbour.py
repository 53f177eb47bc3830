"""Who is where: a bridge's forwarding database (FDB), and the neighbour tables of ARP and ND (linux/neighbour.h).

Both tables are rtnetlink's RTM_*NEIGH; what guests send makes them grow, so a list is bounded (`netlink.MAX_ANSWERS`).
Ages are seconds; the kernel counts hundredths (USER_HZ).
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from dataclasses import dataclass

from kvik.errors import HostError
from kvik.host.netlink import CREATE, DUMP, EXCL, REPLACE, Netlink
from kvik.host.netlink_attributes import attribute, attributes, parse_mac, u32, u32_attribute, unpack_head

NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30
_NEIGH = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type
_DST, _LLADDR, _CACHEINFO, _VLAN, _MASTER = 1, 2, 3, 5, 9
_CACHE = struct.Struct("=IIII")  # nda_cacheinfo: confirmed, used, updated ago; references
_USE_MASTER, _EXT_LEARNED, _STICKY, _ROUTER = 0x04, 0x10, 0x40, 0x80  # NTF_*
_REACHABLE, _NOARP, _PERMANENT = 0x02, 0x40, 0x80
_STATES = {
    0x01: "incomplete", 0x02: "reachable", 0x04: "stale", 0x08: "delay",
    0x10: "probe", 0x20: "failed", 0x40: "noarp", 0x80: "permanent",
}  # fmt: skip
_HZ = 100
# How an FDB entry lives -> its state: a local one is the host's own address, a static one stays at its port, a dynamic
# one is forgotten after the bridge's ageing time unless it is seen.
KINDS = {"local": _PERMANENT, "static": _NOARP, "dynamic": _REACHABLE}


@dataclass(frozen=True, slots=True)
class FdbEntry:
    """Behind which port of a bridge a MAC address is."""

    mac: str
    index: int  # of the port, or of the bridge for its own addresses
    bridge: int
    vlan: int  # 0: of a bridge without VLANs, or of every VLAN
    kind: str  # one of KINDS
    age: float  # since a frame from it was last seen
    used: float  # since a frame was last sent to it
    ext_learned: bool  # told by a program, not seen
    sticky: bool  # does not move to another port


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Which MAC address an IP address has on a link."""

    index: int
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    mac: str  # empty while it is not known
    state: str  # "reachable", "stale", "failed", "permanent", ...
    router: bool
    confirmed: float  # since it answered
    updated: float  # since its entry changed

    @property
    def usable(self) -> bool:
        return bool(self.mac) and self.state not in ("incomplete", "failed")


def fdb(netlink: Netlink, *, bridge: int = 0, port: int = 0) -> list[FdbEntry]:
    """The entries of one bridge, of one port, or of all bridges."""
    request = _NEIGH.pack(socket.AF_BRIDGE, port, 0, 0, 0)
    if bridge:
        request += u32_attribute(_MASTER, bridge)
    answers = netlink.request("list a bridge's addresses", GETNEIGH, DUMP, request)
    found = [entry for answer in answers if (entry := parse_fdb(answer))]
    return [entry for entry in found if bridge in (0, entry.bridge) and port in (0, entry.index)]


def add_fdb(
    netlink: Netlink, port: int, mac: str, *, kind: str = "static", vlan: int = 0, sticky: bool = False,
    replace: bool = False,
) -> None:  # fmt: skip
    """Say that `mac` is behind `port`, in one VLAN or (0) in all that the port is in. With `replace` it may be known
    already, also at another port; else that is refused with EEXIST."""
    if kind not in KINDS:
        raise HostError(f"cannot add {mac}: {kind!r} is no kind of entry ({', '.join(KINDS)})", errno=errno.EINVAL)
    how = CREATE | (REPLACE if replace else EXCL)
    flags = _USE_MASTER | (_STICKY if sticky else 0)
    request = _fdb_request(port, mac, vlan, KINDS[kind], flags)
    netlink.change(f"add {mac} to the addresses behind bridge port {port}", NEWNEIGH, how, request)


def delete_fdb(netlink: Netlink, port: int, mac: str, *, vlan: int = 0) -> None:
    """`HostError` with ENOENT if there is no such entry."""
    request = _fdb_request(port, mac, vlan, 0, _USE_MASTER)
    netlink.change(f"delete {mac} from the addresses behind bridge port {port}", DELNEIGH, 0, request)


def _fdb_request(port: int, mac: str, vlan: int, state: int, flags: int) -> bytes:
    if not 0 <= vlan <= 4094:
        raise HostError(f"{vlan} is no VLAN (1 to 4094)", errno=errno.EINVAL)
    request = _NEIGH.pack(socket.AF_BRIDGE, port, state, flags, 0) + attribute(_LLADDR, parse_mac(mac))
    return request + (attribute(_VLAN, struct.pack("=H", vlan)) if vlan else b"")


def parse_fdb(data: bytes) -> FdbEntry | None:
    """Decode an RTM_NEWNEIGH or RTM_DELNEIGH; None unless it is of a bridge's table."""
    family, index, state, flags, _ = unpack_head(_NEIGH, data)
    if family != socket.AF_BRIDGE:
        return None
    found = attributes(data, _NEIGH.size)
    mac, bridge = found.get(_LLADDR, b""), u32(found.get(_MASTER, b""))
    if len(mac) != 6 or not bridge:  # without a bridge: the addresses that a card listens to
        return None
    _, used, updated = _ages(found.get(_CACHEINFO, b""))
    return FdbEntry(
        mac=mac.hex(":"),
        index=index,
        bridge=bridge,
        vlan=int.from_bytes(found.get(_VLAN, b"")[:2], "little"),
        kind="local" if state & _PERMANENT else "static" if state & _NOARP else "dynamic",
        age=updated,
        used=used,
        ext_learned=bool(flags & _EXT_LEARNED),
        sticky=bool(flags & _STICKY),
    )


def neighbours(netlink: Netlink, *, index: int = 0, family: int = socket.AF_UNSPEC) -> list[Neighbour]:
    """Of one interface or of all; of IPv4, IPv6 or both. What needs no neighbour (loopback, multicast) is left out."""
    request = _NEIGH.pack(family, 0, 0, 0, 0)
    answers = netlink.request("list neighbours", GETNEIGH, DUMP, request)
    found = [entry for answer in answers if (entry := parse_neighbour(answer))]
    return [entry for entry in found if index in (0, entry.index)]


def _ages(cache: bytes) -> tuple[float, float, float]:
    confirmed, used, updated, _ = _CACHE.unpack_from(cache) if len(cache) >= _CACHE.size else (0, 0, 0, 0)
    return confirmed / _HZ, used / _HZ, updated / _HZ


def parse_neighbour(data: bytes) -> Neighbour | None:
    """Decode an RTM_NEWNEIGH or RTM_DELNEIGH; None for another family's, and for what needs no neighbour."""
    family, index, state, flags, _ = unpack_head(_NEIGH, data)
    found = attributes(data, _NEIGH.size)
    packed = found.get(_DST, b"")
    if (family, len(packed)) not in ((socket.AF_INET, 4), (socket.AF_INET6, 16)) or state & _NOARP:
        return None
    confirmed, _, updated = _ages(found.get(_CACHEINFO, b""))
    return Neighbour(
        index=index,
        address=ipaddress.ip_address(packed),
        mac=found.get(_LLADDR, b"").hex(":"),
        state=_STATES.get(state, "none"),
        router=bool(flags & _ROUTER),
        confirmed=confirmed,
        updated=updated,
    )
