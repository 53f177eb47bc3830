"""The host's Linux bridges: `Bridges(connection)`, one method a procedure of our own program."""

from __future__ import annotations

from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvik.client.connection import Connection

    Setting = bool | int | float | str


class Bridge(NamedTuple):
    """A bridge. Times in seconds; counters in bytes and packets of what the host itself sends and receives by it."""

    name: str
    mac: str
    up: bool
    carrier: bool
    mtu: int
    stp: bool
    priority: int
    forward_delay: float
    hello_time: float
    max_age: float
    ageing_time: float
    vlan_filtering: bool
    vlan_default_pvid: int
    multicast_snooping: bool
    bridge_id: str
    root_id: str
    root_port: int
    root_path_cost: int
    topology_change: bool
    fdb_learned: int
    fdb_max_learned: int
    addresses: list[str]
    ports: list[str]
    rx_bytes: int
    rx_packets: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_dropped: int


class BridgePort(NamedTuple):
    """A port; `rx` is what came in by it. `machine`: whose tap it is, None for an interface of the host."""

    name: str
    mac: str
    number: int
    state: str
    carrier: bool
    machine: str | None
    cost: int
    priority: int
    isolated: bool
    learning: bool
    flood: bool
    hairpin: bool
    guard: bool
    fast_leave: bool
    neigh_suppress: bool
    designated_bridge: str
    designated_port: int
    designated_cost: int
    rx_bytes: int
    rx_packets: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_dropped: int


class FdbEntry(NamedTuple):
    """A MAC address and the port it is behind; `age` in seconds since a frame came from there."""

    mac: str
    port: str
    vlan: int
    kind: str
    age: float


class PortVlans(NamedTuple):
    port: str
    first: int
    last: int
    pvid: bool
    untagged: bool


class Bridges:
    """Errors are the daemon's: `NotFound`, `InvalidArgument`, `HostError` with the kernel's words."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def all(self) -> list[Bridge]:
        return [_bridge(row) for row in self.connection.call_kvik("BRIDGE_LIST")[0]]

    def show(self, name: str) -> tuple[Bridge, list[BridgePort]]:
        bridge, ports = self.connection.call_kvik("BRIDGE_SHOW", name)
        return _bridge(bridge), [_port(row) for row in ports]

    def add(self, name: str, mac: str | None = None, **settings: Setting) -> None:
        """Settings by the kernel's names: stp, priority, forward_delay, hello_time, max_age, ageing_time,
        vlan_filtering, vlan_default_pvid, multicast_snooping, fdb_max_learned, group_fwd_mask."""
        self.connection.call_kvik("BRIDGE_ADD", name, mac, _params(settings))

    def delete(self, name: str, *, force: bool = False) -> None:
        self.connection.call_kvik("BRIDGE_DELETE", name, int(force))

    def add_port(self, bridge: str, port: str) -> None:
        self.connection.call_kvik("BRIDGE_ADD_PORT", bridge, port)

    def delete_port(self, bridge: str, port: str) -> None:
        self.connection.call_kvik("BRIDGE_DELETE_PORT", bridge, port)

    def set(self, name: str, **settings: Setting) -> None:
        self.connection.call_kvik("BRIDGE_SET", name, _params(settings))

    def set_port(self, bridge: str, port: str, **settings: Setting) -> None:
        """Settings by the kernel's names: cost, priority, state, isolated, learning, flood, hairpin, guard, ..."""
        self.connection.call_kvik("BRIDGE_SET_PORT", bridge, port, _params(settings))

    def fdb(self, name: str) -> list[FdbEntry]:
        return [FdbEntry(*row) for row in self.connection.call_kvik("BRIDGE_FDB", name)[0]]

    def change_fdb(self, bridge: str, port: str, mac: str, *, vlan: int = 0, remove: bool = False) -> None:
        self.connection.call_kvik("BRIDGE_CHANGE_FDB", bridge, port, mac, vlan, int(remove))

    def flush_fdb(self, name: str) -> None:
        self.connection.call_kvik("BRIDGE_FLUSH_FDB", name)

    def vlans(self, name: str) -> list[PortVlans]:
        rows = self.connection.call_kvik("BRIDGE_VLAN", name)[0]
        return [PortVlans(port, first, last, bool(pvid), bool(bare)) for port, first, last, pvid, bare in rows]

    def change_vlan(
        self,
        bridge: str,
        port: str,
        first: int,
        last: int,
        *,
        pvid: bool = False,
        untagged: bool = False,
        remove: bool = False,
    ) -> None:
        self.connection.call_kvik(
            "BRIDGE_CHANGE_VLAN", bridge, port, first, last, int(pvid), int(untagged), int(remove)
        )


def _params(settings: Mapping[str, Setting]) -> object:
    from kvik.rpc.typed_params import from_dict

    return from_dict(settings)


_TRUTHS = frozenset(
    (
        "up", "carrier", "stp", "vlan_filtering", "multicast_snooping", "topology_change", "isolated", "learning",
        "flood", "hairpin", "guard", "fast_leave", "neigh_suppress",
    )
)  # fmt: skip


def _bridge(row: tuple[object, ...]) -> Bridge:
    return Bridge._make(_values(Bridge._fields, row))


def _port(row: tuple[object, ...]) -> BridgePort:
    return BridgePort._make(_values(BridgePort._fields, row))


def _values(names: tuple[str, ...], row: tuple[object, ...]) -> list[object]:
    return [bool(value) if name in _TRUTHS else value for name, value in zip(names, row, strict=True)]
