"""Linux bridges and their ports over rtnetlink: made, read, changed (linux/if_link.h, net/bridge/br_netlink.c).

    with Netlink() as netlink:
        bridge = create_bridge(netlink, "virbr0", stp=True, forward_delay=0, mac="52:54:00:00:00:01", up=True)
        ports = bridge_ports(netlink, bridge.index)

The figures' names are the kernel's. Times are seconds; the kernel counts hundredths (USER_HZ, always 100 on x86).
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from kvik.errors import HostError
from kvik.host.netlink import DUMP, GETLINK, NEWLINK, SETLINK, Link, Netlink, link_data, parse_link
from kvik.host.netlink_attributes import Attributes, attribute, attributes, u32, unpack_head

_LINK = struct.Struct("=BxHiII")
_IFLA_LINKINFO, _IFLA_PROTINFO = 18, 12
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_NESTED = 0x8000
_HZ = 100
# IFLA_BR_*
_ROOT_ID, _BRIDGE_ID, _ROOT_PORT, _ROOT_PATH_COST, _TOPOLOGY_CHANGE, _TOPOLOGY_CHANGE_DETECTED = 10, 11, 12, 13, 14, 15
_HELLO_TIMER, _TCN_TIMER, _TOPOLOGY_CHANGE_TIMER, _GC_TIMER, _GROUP_ADDR, _FDB_FLUSH = 16, 17, 18, 19, 20, 21
_FDB_N_LEARNED = 48
# IFLA_BRPORT_*
_STATE, _PORT_ROOT_ID, _PORT_BRIDGE_ID, _DESIGNATED_PORT, _DESIGNATED_COST, _PORT_ID, _PORT_NO = (
    1,
    13,
    14,
    15,
    16,
    17,
    18,
)
STATES = ("disabled", "listening", "learning", "forwarding", "blocking")  # BR_STATE_*

NO_VLAN_FILTERING = "this kernel's bridge has no VLAN filtering (CONFIG_BRIDGE_VLAN_FILTERING)"
_RANGES = "with STP on forward_delay is 2 to 30 s, hello_time 1 to 10 s and max_age 6 to 40 s"  # 802.1D-1998, table 8-3


class BridgeSettings(TypedDict, total=False):
    """What can be chosen of a bridge; what is not given stays as it is."""

    stp: bool
    priority: int  # of its bridge identifier: 0 (root) to 65535 (802.1D-1998, 8.5.5.1)
    forward_delay: float  # 2 to 30; with STP off also 0. The kernel makes 0 to 2 when STP is set on
    hello_time: float  # 1 to 10
    max_age: float  # 6 to 40
    ageing_time: float  # of a learned address; 0: learned addresses are forgotten at once, all is flooded
    vlan_filtering: bool
    vlan_default_pvid: int  # of a new port; 0: none
    group_fwd_mask: int  # which of 01:80:c2:00:00:0X are forwarded, bit X (not 0, 1, 2)
    multicast_snooping: bool
    fdb_max_learned: int  # at most so many learned addresses; 0: no bound (kernel 6.7 and later)


class PortSettings(TypedDict, total=False):
    """What can be chosen of a port; what is not given stays as it is."""

    state: str  # with STP off: "disabled" or "forwarding" (the kernel itself opens what is "blocking" then)
    priority: int  # 0 to 63
    cost: int  # 1 to 65535
    hairpin: bool  # frames may leave by the port they came in
    guard: bool  # BPDU guard: a BPDU that comes in disables the port
    root_block: bool  # never the root port
    fast_leave: bool  # a multicast leave takes effect at once
    learning: bool
    flood: bool  # frames for an unknown unicast address go out here
    mcast_flood: bool
    bcast_flood: bool
    neigh_suppress: bool  # the bridge answers ARP and ND itself
    isolated: bool  # never reaches another isolated port
    locked: bool  # only frames from addresses in the FDB come in
    proxy_arp: bool


# Each setting: attribute, struct format, units of the kernel in one of ours.
_BRIDGE: dict[str, tuple[int, str, int]] = {
    "forward_delay": (1, "=I", _HZ),
    "hello_time": (2, "=I", _HZ),
    "max_age": (3, "=I", _HZ),
    "ageing_time": (4, "=I", _HZ),
    "stp": (5, "=I", 1),
    "priority": (6, "=H", 1),
    "vlan_filtering": (7, "=B", 1),
    "group_fwd_mask": (9, "=H", 1),
    "multicast_snooping": (23, "=B", 1),
    "vlan_default_pvid": (39, "=H", 1),
    "fdb_max_learned": (49, "=I", 1),
}
_PORT: dict[str, tuple[int, str, int]] = {
    "state": (1, "=B", 1),
    "priority": (2, "=H", 1),
    "cost": (3, "=I", 1),
    "hairpin": (4, "=B", 1),
    "guard": (5, "=B", 1),
    "root_block": (6, "=B", 1),
    "fast_leave": (7, "=B", 1),
    "learning": (8, "=B", 1),
    "flood": (9, "=B", 1),
    "proxy_arp": (10, "=B", 1),
    "mcast_flood": (27, "=B", 1),
    "bcast_flood": (30, "=B", 1),
    "neigh_suppress": (32, "=B", 1),
    "isolated": (33, "=B", 1),
    "locked": (39, "=B", 1),
}


@dataclass(frozen=True, slots=True)
class Bridge:
    """A bridge, with the figures of its spanning tree. Identifiers are like "8000.525400123456"."""

    link: Link
    stp: bool
    stp_by: str  # "off", "kernel" or "user" (a daemon of RSTP)
    priority: int
    forward_delay: float
    hello_time: float
    max_age: float
    ageing_time: float
    vlan_filtering: bool
    vlan_default_pvid: int
    group_fwd_mask: int
    multicast_snooping: bool
    bridge_id: str
    root_id: str
    root_port: int  # the number of the port that leads to the root; 0: this is the root
    root_path_cost: int
    topology_change: bool
    topology_change_detected: bool
    hello_timer: float  # seconds left
    tcn_timer: float
    topology_change_timer: float
    gc_timer: float
    group_address: str
    fdb_learned: int  # addresses learned by now; 0 also from a kernel that does not count them
    fdb_max_learned: int

    @property
    def index(self) -> int:
        return self.link.index

    @property
    def name(self) -> str:
        return self.link.name

    @property
    def is_root(self) -> bool:
        return self.bridge_id == self.root_id


@dataclass(frozen=True, slots=True)
class BridgePort:
    """A port of a bridge, with its part in the spanning tree."""

    link: Link
    number: int
    port_id: int
    state: str  # one of STATES
    priority: int
    cost: int
    hairpin: bool
    guard: bool
    root_block: bool
    fast_leave: bool
    learning: bool
    flood: bool
    mcast_flood: bool
    bcast_flood: bool
    neigh_suppress: bool
    isolated: bool
    locked: bool
    proxy_arp: bool
    designated_root: str
    designated_bridge: str
    designated_port: int
    designated_cost: int

    @property
    def name(self) -> str:
        return self.link.name


def _encode(table: dict[str, tuple[int, str, int]], settings: dict[str, Any], what: str) -> bytes:
    data = b""
    for name, value in settings.items():
        kind, form, units = table[name]
        if name == "state":
            if value not in STATES:
                raise HostError(f"{value!r} is no state of a port ({', '.join(STATES)})", errno=errno.EINVAL)
            value = STATES.index(value)
        try:
            data += attribute(kind, struct.pack(form, round(value * units)))
        except (struct.error, TypeError, ValueError, OverflowError) as error:
            raise HostError(f"cannot set {name} of {what} to {value!r}: {error}", errno=errno.EINVAL) from error
    return data


def _number(found: Attributes, kind: int) -> int:
    return int.from_bytes(found.get(kind, b"")[:8], "little")


def _identifier(data: bytes) -> str:
    """struct ifla_bridge_id: two bytes of priority, six of a MAC address."""
    return f"{data[:2].hex()}.{data[2:8].hex()}" if len(data) >= 8 else ""


def _refused(error: HostError, settings: BridgeSettings) -> HostError:
    """The kernel says neither what it lacks (of a bridge only VLANs are optional) nor what is out of range."""
    if error.errno == errno.EOPNOTSUPP and settings.get("vlan_filtering"):
        return HostError(f"{error.message}: {NO_VLAN_FILTERING}", errno=error.errno)
    if error.errno == errno.ERANGE:
        return HostError(f"{error.message}: {_RANGES}", errno=error.errno)
    return error


def create_bridge(
    netlink: Netlink,
    name: str,
    *,
    mac: str | None = None,
    mtu: int | None = None,
    up: bool = False,
    **settings: Unpack[BridgeSettings],
) -> Bridge:
    """Make a bridge as asked in one request; on an error there is none. A given `mac` stays whatever ports come."""
    data = _encode(_BRIDGE, dict(settings), f"bridge {name}")
    try:
        netlink.add_link(name, "bridge", data=data, mac=mac, mtu=mtu, up=up)
    except HostError as error:
        raise _refused(error, settings) from error
    return read_bridge(netlink, name)


def set_bridge(netlink: Netlink, index: int, **settings: Unpack[BridgeSettings]) -> None:
    """Change what is given, in one request (two where STP is set off: the kernel would judge the times before that)."""
    if settings.get("stp") is False and len(settings) > 1:
        set_bridge(netlink, index, stp=False)
    data = _encode(_BRIDGE, dict(settings), f"bridge {index}")
    info = attribute(_IFLA_INFO_KIND, b"bridge") + attribute(_IFLA_INFO_DATA, data)
    request = _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0) + attribute(_IFLA_LINKINFO, info)
    try:
        netlink.change(f"change bridge {index}", NEWLINK, 0, request)
    except HostError as error:
        raise _refused(error, settings) from error


def flush_fdb(netlink: Netlink, index: int) -> None:
    """Forget every learned address of a bridge."""
    info = attribute(_IFLA_INFO_KIND, b"bridge") + attribute(_IFLA_INFO_DATA, attribute(_FDB_FLUSH, b""))
    request = _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0) + attribute(_IFLA_LINKINFO, info)
    netlink.change(f"flush the addresses of bridge {index}", NEWLINK, 0, request)


def read_bridge(netlink: Netlink, name_or_index: str | int) -> Bridge:
    """One bridge; `HostError` with ENODEV if there is none, EINVAL if it is no bridge."""
    answer = netlink.link_answer(name_or_index)
    bridge = parse_bridge(answer)
    if bridge is None:
        raise HostError(f"{parse_link(answer).name} is no bridge", errno=errno.EINVAL)
    return bridge


def bridges(netlink: Netlink) -> list[Bridge]:
    request = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attribute(
        _IFLA_LINKINFO, attribute(_IFLA_INFO_KIND, b"bridge")
    )
    answers = netlink.request("list bridges", GETLINK, DUMP, request)
    return [bridge for answer in answers if (bridge := parse_bridge(answer))]


def parse_bridge(answer: bytes) -> Bridge | None:
    """Decode an RTM_NEWLINK; None if it is about something else than a bridge."""
    link = parse_link(answer)
    if link.kind != "bridge":
        return None
    found = link_data(answer)
    values = {name: _number(found, kind) for name, (kind, _, _) in _BRIDGE.items()}
    return Bridge(
        link=link,
        stp=values["stp"] != 0,
        stp_by=("off", "kernel", "user")[min(values["stp"], 2)],
        priority=values["priority"],
        forward_delay=values["forward_delay"] / _HZ,
        hello_time=values["hello_time"] / _HZ,
        max_age=values["max_age"] / _HZ,
        ageing_time=values["ageing_time"] / _HZ,
        vlan_filtering=values["vlan_filtering"] != 0,
        vlan_default_pvid=values["vlan_default_pvid"],
        group_fwd_mask=values["group_fwd_mask"],
        multicast_snooping=values["multicast_snooping"] != 0,
        bridge_id=_identifier(found.get(_BRIDGE_ID, b"")),
        root_id=_identifier(found.get(_ROOT_ID, b"")),
        root_port=_number(found, _ROOT_PORT),
        root_path_cost=_number(found, _ROOT_PATH_COST),
        topology_change=_number(found, _TOPOLOGY_CHANGE) != 0,
        topology_change_detected=_number(found, _TOPOLOGY_CHANGE_DETECTED) != 0,
        hello_timer=_number(found, _HELLO_TIMER) / _HZ,
        tcn_timer=_number(found, _TCN_TIMER) / _HZ,
        topology_change_timer=_number(found, _TOPOLOGY_CHANGE_TIMER) / _HZ,
        gc_timer=_number(found, _GC_TIMER) / _HZ,
        group_address=found.get(_GROUP_ADDR, b"").hex(":"),
        fdb_learned=u32(found.get(_FDB_N_LEARNED, b"")),
        fdb_max_learned=values["fdb_max_learned"],
    )


# Ports: whoever is made one with Netlink.set_link(index, master=bridge).


def set_port(netlink: Netlink, index: int, **settings: Unpack[PortSettings]) -> None:
    """Change what is given of a port, in one request."""
    data = _encode(_PORT, dict(settings), f"bridge port {index}")
    request = _LINK.pack(socket.AF_BRIDGE, 0, index, 0, 0) + attribute(_IFLA_PROTINFO | _NESTED, data)
    netlink.change(f"change bridge port {index}", SETLINK, 0, request)


def bridge_ports(netlink: Netlink, bridge: int = 0) -> list[BridgePort]:
    """The ports of one bridge, or of all."""
    request = _LINK.pack(socket.AF_BRIDGE, 0, 0, 0, 0)
    answers = netlink.request("list bridge ports", GETLINK, DUMP, request)
    links = {link.index: link for link in netlink.links(master=bridge or None)}
    found = [port for answer in answers if (port := parse_port(answer, links))]
    return [port for port in found if bridge in (0, port.link.master)]


def parse_port(answer: bytes, links: dict[int, Link]) -> BridgePort | None:
    """Decode an RTM_NEWLINK of the family AF_BRIDGE; None for the bridge itself, which is listed among its ports.

    The answer has no counters: `links` brings them.
    """
    index = unpack_head(_LINK, answer)[2]
    protocol = attributes(answer, _LINK.size).get(_IFLA_PROTINFO)
    if protocol is None or index not in links:
        return None
    found = attributes(protocol)
    state = _number(found, _STATE)
    values = {name: _number(found, kind) for name, (kind, _, _) in _PORT.items() if name != "state"}
    flags = {name: values[name] != 0 for name in values if name not in ("priority", "cost")}
    return BridgePort(
        link=links[index],
        number=_number(found, _PORT_NO),
        port_id=_number(found, _PORT_ID),
        state=STATES[state] if state < len(STATES) else str(state),
        priority=values["priority"],
        cost=values["cost"],
        designated_root=_identifier(found.get(_PORT_ROOT_ID, b"")),
        designated_bridge=_identifier(found.get(_PORT_BRIDGE_ID, b"")),
        designated_port=_number(found, _DESIGNATED_PORT),
        designated_cost=_number(found, _DESIGNATED_COST),
        **flags,
    )
