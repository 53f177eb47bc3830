"""Linux bridges as a switch to look at and to change: ports, spanning tree, addresses (FDB), VLANs. Blocking.

Names in, the host's own typed records out (`host/bridge.py` and its neighbours). What would cut the host off from its
network, or take a bridge from what runs on it, is refused with the way that does not.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any, cast

from kvik.errors import AlreadyExists, HostError, InvalidArgument, NotFound, OperationInvalid, ResourceBusy
from kvik.host import bridge as kernel
from kvik.host import bridge_vlan, neighbour
from kvik.host.bridge import Bridge, BridgePort, BridgeSettings, PortSettings
from kvik.host.netlink import Link, Netlink
from kvik.host.netlink_attributes import check_name

_LINK_LOCAL = 253  # RT_SCOPE_LINK


@dataclass(frozen=True, slots=True)
class BridgeView:
    """A bridge with its ports (by number) and its own addresses, such as "192.0.2.1/24"."""

    bridge: Bridge
    ports: list[BridgePort]
    addresses: list[str]


@dataclass(frozen=True, slots=True)
class FdbRow:
    """`port` is the bridge's own name for its own addresses; `age` in seconds since a frame came from there."""

    mac: str
    port: str
    vlan: int
    kind: str
    age: float


@dataclass(frozen=True, slots=True)
class VlanRow:
    port: str
    first: int
    last: int
    pvid: bool
    untagged: bool


def listing() -> list[BridgeView]:
    with Netlink() as netlink:
        ports = kernel.bridge_ports(netlink)
        addresses = netlink.addresses()
        return [
            BridgeView(
                bridge,
                sorted((port for port in ports if port.link.master == bridge.index), key=lambda port: port.number),
                [str(one.interface) for one in addresses if one.index == bridge.index and one.scope != _LINK_LOCAL],
            )
            for bridge in sorted(kernel.bridges(netlink), key=lambda bridge: bridge.name)
        ]


def show(name: str) -> BridgeView:
    found = next((view for view in listing() if view.bridge.name == name), None)
    if found is None:
        _bridge_missing(name)
    assert found is not None
    return found


def _bridge_missing(name: str) -> None:
    with Netlink() as netlink:
        _bridge(netlink, name)


def _bridge(netlink: Netlink, name: str) -> Link:
    link = _link(netlink, name, "bridge")
    if link.kind != "bridge":
        raise OperationInvalid(f"{name} is no bridge", remedy="'kvik bridge list' shows the bridges")
    return link


def _link(netlink: Netlink, name: str, what: str = "interface") -> Link:
    try:
        return netlink.link(check_name(name))
    except HostError as error:
        if error.errno == errno.EINVAL:
            raise InvalidArgument(str(error)) from error
        if error.errno != errno.ENODEV:
            raise
        remedy = (
            "'kvik bridge list' shows the bridges" if what == "bridge" else "'kvik iface-list' shows the interfaces"
        )
        raise NotFound(f"there is no {what} {name}", remedy=remedy) from error


def _port(netlink: Netlink, bridge: str, name: str) -> Link:
    index = _bridge(netlink, bridge).index
    link = _link(netlink, name)
    if link.master != index:
        raise OperationInvalid(
            f"{name} is no port of {bridge}" + (f" but of {netlink.link(link.master).name}" if link.master else "")
        )
    return link


# Changes ----------------------------------------------------------------------------------------------------------


def add(name: str, mac: str | None, settings: dict[str, Any]) -> None:
    """Make a bridge and bring it up."""
    chosen = _settings(settings, BridgeSettings.__annotations__, "a bridge")
    # The kernel's 15 s would keep a machine's first packets back; with STP on it needs them (802.1D, 8.10.2).
    chosen.setdefault("forward_delay", 15 if chosen.get("stp") else 0)
    with Netlink() as netlink:
        try:
            kernel.create_bridge(netlink, check_name(name), mac=mac, up=True, **cast(BridgeSettings, chosen))
        except HostError as error:
            if error.errno == errno.EEXIST:
                raise AlreadyExists(f"{name} exists already", remedy="'kvik bridge show' shows it") from error
            raise


def delete(name: str, force: bool = False) -> None:
    """Delete a bridge. One with ports or addresses only with `force`: what is on it loses its network."""
    view = show(name)
    names = [port.name for port in view.ports]
    if names and not force:
        raise ResourceBusy(
            f"{name} has ports: {', '.join(names[:8])}", remedy="take them out with 'kvik bridge delif', or use --force"
        )
    if view.addresses and not force:
        raise ResourceBusy(
            f"{name} has the address {view.addresses[0]}", remedy="the host loses it with the bridge: --force if meant"
        )
    with Netlink() as netlink:
        netlink.delete_link(view.bridge.index)


def add_port(bridge: str, name: str) -> None:
    """Make an interface a port. One with addresses is refused: they would be unreachable from then on."""
    with Netlink() as netlink:
        index = _bridge(netlink, bridge).index
        link = _link(netlink, name)
        if link.master == index:
            return
        if link.master:
            raise ResourceBusy(
                f"{name} is a port of {netlink.link(link.master).name}", remedy="take it out there first"
            )
        addresses = [one for one in netlink.addresses(link.index) if one.scope != _LINK_LOCAL]
        if addresses:
            raise OperationInvalid(
                f"{name} has the address {addresses[0].interface}, which a port of a bridge cannot use",
                remedy=f"'kvik iface-bridge {name} {bridge}' moves it to the bridge, and back if it goes wrong",
            )
        netlink.set_link(link.index, master=index, up=True)


def delete_port(bridge: str, name: str) -> None:
    with Netlink() as netlink:
        netlink.set_link(_port(netlink, bridge, name).index, master=0)


def change(name: str, settings: dict[str, Any]) -> None:
    chosen = _settings(settings, BridgeSettings.__annotations__, "a bridge")
    with Netlink() as netlink:
        kernel.set_bridge(netlink, _bridge(netlink, name).index, **cast(BridgeSettings, chosen))


def change_port(bridge: str, name: str, settings: dict[str, Any]) -> None:
    chosen = _settings(settings, PortSettings.__annotations__, "a port")
    with Netlink() as netlink:
        kernel.set_port(netlink, _port(netlink, bridge, name).index, **cast(PortSettings, chosen))


def _settings(settings: dict[str, Any], known: dict[str, Any], what: str) -> dict[str, Any]:
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise InvalidArgument(f"{what} has no setting {unknown[0]!r}", remedy=f"it has {', '.join(sorted(known))}")
    for name, value in settings.items():
        kind = known[name] if isinstance(known[name], str) else getattr(known[name], "__forward_arg__", "")
        good = {"bool": value in (0, 1), "int": type(value) is int, "str": isinstance(value, str)}.get(
            kind, type(value) in (int, float)
        )
        if not good:
            words = {"bool": "on or off", "int": "a whole number", "str": "a word"}.get(kind, "a number of seconds")
            raise InvalidArgument(f"{name} of {what} is {words}, not {value!r}")
    return dict(settings)


# Addresses and VLANs ----------------------------------------------------------------------------------------------


def fdb(name: str) -> list[FdbRow]:
    with Netlink() as netlink:
        bridge = _bridge(netlink, name)
        names = {link.index: link.name for link in netlink.links()}
        found = neighbour.fdb(netlink, bridge=bridge.index)
        rows = [FdbRow(one.mac, names.get(one.index, f"#{one.index}"), one.vlan, one.kind, one.age) for one in found]
    return sorted(rows, key=lambda row: (row.port, row.vlan, row.mac))


def change_fdb(bridge: str, port: str, mac: str, vlan: int, delete: bool) -> None:
    """Add a static entry (it does not age, and no frame moves it), or delete one of any kind."""
    with Netlink() as netlink:
        index = _port(netlink, bridge, port).index
        try:
            if delete:
                neighbour.delete_fdb(netlink, index, mac, vlan=vlan)
            else:
                neighbour.add_fdb(netlink, index, mac, kind="static", vlan=vlan, sticky=True, replace=True)
        except HostError as error:
            if error.errno == errno.ENOENT:
                raise NotFound(
                    f"{port} has no entry for {mac}", remedy=f"'kvik bridge fdb {bridge}' shows them"
                ) from error
            raise


def flush_fdb(name: str) -> None:
    """Forget all that was learned; frames are flooded until it is learned again."""
    with Netlink() as netlink:
        kernel.flush_fdb(netlink, _bridge(netlink, name).index)


def vlans(name: str) -> list[VlanRow]:
    """VLANs of the bridge itself, then of its ports."""
    with Netlink() as netlink:
        bridge = _bridge(netlink, name)
        names = {link.index: link.name for link in netlink.links() if link.master == bridge.index}
        found = bridge_vlan.port_vlans(netlink)
    names[bridge.index] = name
    rows = [
        VlanRow(names[one.index], one.first, one.last, one.pvid, one.untagged) for one in found if one.index in names
    ]
    return sorted(rows, key=lambda row: (row.port != name, row.port, row.first))


@dataclass(frozen=True, slots=True)
class VlanChange:
    """VLANs `first` to `last`; a PVID is one alone."""

    first: int
    last: int
    pvid: bool = False
    untagged: bool = False
    remove: bool = False


def change_vlan(bridge: str, port: str, change: VlanChange) -> None:
    """Put `port` (the bridge's own name: the bridge itself) into VLANs, or take it out."""
    first, last = change.first, change.last
    with Netlink() as netlink:
        own = port == bridge
        index = _bridge(netlink, bridge).index if own else _port(netlink, bridge, port).index
        if change.remove:
            bridge_vlan.delete_vlan(netlink, index, first, last, bridge=own)
        else:
            untagged, pvid = change.untagged, change.pvid
            bridge_vlan.add_vlan(netlink, index, first, last, pvid=pvid, untagged=untagged, bridge=own)
