"""VLANs of a bridge's ports (802.1Q; linux/if_bridge.h, net/bridge/br_vlan.c).

They count once the bridge's `vlan_filtering` is on. A frame without a tag belongs to the VLAN that is its port's PVID;
a frame leaves a port only if the port is in its VLAN, and without its tag where the VLAN is `untagged`.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass

from kvik.errors import HostError
from kvik.host.bridge import NO_VLAN_FILTERING
from kvik.host.netlink import DELLINK, DUMP, GETLINK, SETLINK, Netlink
from kvik.host.netlink_attributes import attribute, attributes, iterate_attributes, u32_attribute, unpack_head

_LINK = struct.Struct("=BxHiII")
_IFLA_AF_SPEC, _IFLA_EXT_MASK = 26, 29
_NESTED = 0x8000
_BRIDGE_FLAGS, _BRIDGE_VLAN_INFO = 0, 2  # IFLA_BRIDGE_*
_FLAG_SELF = 2  # BRIDGE_FLAGS_SELF: the bridge itself, not the port that it may be of another
_FILTER_COMPRESSED = 1 << 2  # RTEXT_FILTER_BRVLAN_COMPRESSED: ranges, not each VLAN
_PVID, _UNTAGGED, _RANGE_BEGIN, _RANGE_END = 1 << 1, 1 << 2, 1 << 3, 1 << 4
_INFO = struct.Struct("=HH")  # bridge_vlan_info: flags, vid
LAST = 4094


@dataclass(frozen=True, slots=True)
class PortVlan:
    """VLANs `first` to `last` of one port (or of the bridge itself, by its own index)."""

    index: int
    first: int
    last: int
    pvid: bool
    untagged: bool

    def __str__(self) -> str:
        """As in "10", "100-199", "1 PVID untagged"."""
        numbers = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        return numbers + (" PVID" if self.pvid else "") + (" untagged" if self.untagged else "")


def port_vlans(netlink: Netlink, index: int = 0) -> list[PortVlan]:
    """Of one port, or of all ports and bridges. Empty where the kernel has no VLAN filtering."""
    request = _LINK.pack(socket.AF_BRIDGE, 0, 0, 0, 0) + u32_attribute(_IFLA_EXT_MASK, _FILTER_COMPRESSED)
    answers = netlink.request("list the VLANs of bridge ports", GETLINK, DUMP, request)
    return [vlan for answer in answers for vlan in parse_vlans(answer) if index in (0, vlan.index)]


def add_vlan(
    netlink: Netlink, index: int, first: int, last: int | None = None, *, pvid: bool = False, untagged: bool = False,
    bridge: bool = False,
) -> None:  # fmt: skip
    """Put a port into VLANs `first` to `last`; `pvid` needs one alone. For the bridge itself, say `bridge`."""
    if pvid and last not in (None, first):
        raise HostError(f"VLANs {first} to {last} cannot all be the PVID of a port", errno=errno.EINVAL)
    flags = (_PVID if pvid else 0) | (_UNTAGGED if untagged else 0)
    _change("add", netlink, SETLINK, _request(index, first, last, flags, bridge), index)


def delete_vlan(netlink: Netlink, index: int, first: int, last: int | None = None, *, bridge: bool = False) -> None:
    """Take a port out of VLANs `first` to `last`; those that it is not in do not matter."""
    _change("delete", netlink, DELLINK, _request(index, first, last, 0, bridge), index)


def _change(verb: str, netlink: Netlink, kind: int, request: bytes, index: int) -> None:
    try:
        netlink.change(f"{verb} VLANs of bridge port {index}", kind, 0, request)
    except HostError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise HostError(
                f"{error.message}: {NO_VLAN_FILTERING}, or {index} is no port", errno=error.errno
            ) from error
        raise


def _request(index: int, first: int, last: int | None, flags: int, bridge: bool) -> bytes:
    last = first if last is None else last
    if not 1 <= first <= last <= LAST:
        raise HostError(f"{first} to {last} are no VLANs (1 to {LAST})", errno=errno.EINVAL)
    spec = attribute(_BRIDGE_FLAGS, struct.pack("=H", _FLAG_SELF)) if bridge else b""
    if first == last:
        spec += attribute(_BRIDGE_VLAN_INFO, _INFO.pack(flags, first))
    else:
        spec += attribute(_BRIDGE_VLAN_INFO, _INFO.pack(flags | _RANGE_BEGIN, first))
        spec += attribute(_BRIDGE_VLAN_INFO, _INFO.pack(flags | _RANGE_END, last))
    return _LINK.pack(socket.AF_BRIDGE, 0, index, 0, 0) + attribute(_IFLA_AF_SPEC | _NESTED, spec)


def parse_vlans(answer: bytes) -> list[PortVlan]:
    """Decode an RTM_NEWLINK of the family AF_BRIDGE that was asked for VLANs."""
    index = unpack_head(_LINK, answer)[2]
    spec = attributes(answer, _LINK.size).get(_IFLA_AF_SPEC, b"")
    found = []
    begun = 0
    for kind, data in iterate_attributes(spec):
        if kind != _BRIDGE_VLAN_INFO or len(data) < _INFO.size:
            continue
        flags, number = _INFO.unpack_from(data)
        if flags & _RANGE_BEGIN:
            begun = number
            continue
        first = begun if flags & _RANGE_END and 0 < begun <= number else number
        begun = 0
        found.append(PortVlan(index, first, number, bool(flags & _PVID), bool(flags & _UNTAGGED)))
    return found
