"""Where an interface of a machine goes: its own document and that of its network, put together.

    attachment = resolve(interface, networks)      # reads memory, in the loop
    with ExitStack() as close:
        files = open_taps([interface], close, {alias: attachment})      # blocks, in a thread

What an interface says goes before what its portgroup says, and that before what the network says.
https://libvirt.org/formatnetwork.html#portgroups
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar, get_args
from uuid import uuid4

from kvik.conf.devices.interface import (
    Bandwidth,
    Interface,
    InterfaceSource,
    VirtualPort,
    VirtualPortParameters,
    Vlan,
)
from kvik.conf.network import Network
from kvik.conf.tree import clone
from kvik.errors import ConfigError, ConfigUnsupported, OperationInvalid
from kvik.network.floors import check_floor

__all__ = ["Attachment", "NetworkLike", "NetworkLookup", "macvtap_mode", "resolve", "resolve_network"]

T = TypeVar("T")
MacvtapMode = Literal["bridge", "private", "vepa", "passthrough"]
Kind = Literal["none", "bridge", "openvswitch", "macvtap", "switch", "hostdev"]


class NetworkLike(Protocol):
    """What `NetworkObject` has of this."""

    @property
    def name(self) -> str: ...
    @property
    def is_active(self) -> bool: ...
    @property
    def document(self) -> Network: ...
    @property
    def ports(self) -> Mapping[str, str]: ...
    @property
    def devices(self) -> Mapping[str, str]: ...


class NetworkLookup(Protocol):
    def lookup_name(self, name: str) -> NetworkLike: ...


@dataclass(frozen=True, slots=True)
class Attachment:
    """`device` is the bridge, or for macvtap the interface below; empty for kind none (a tap left alone), and for a
    session's switch, which is no device of the host; for hostdev a PCI function, like 0000:01:10.0."""

    kind: Kind
    device: str = ""
    mode: MacvtapMode | None = None
    network: str = ""
    port_id: str = ""
    vlan: Vlan | None = None
    virtualport: VirtualPort | None = None
    bandwidth: Bandwidth | None = None
    isolated: bool = False
    mtu: int | None = None
    owns_bridge: bool = False  # the network made it, so it may be set as this needs
    managed: bool = False  # a PCI function is taken from its driver and given back to it
    floor: int = 0  # kB/s of the network's inbound rate that it is promised
    at_once: bool = False  # the network's document asks for no delay: its port forwards from the start, STP or not
    static_fdb: bool = False  # macTableManager='libvirt': the bridge learns nothing, the guest's MAC is entered


def resolve(interface: Interface, networks: NetworkLookup | None) -> Attachment | None:
    """None for a type that needs nothing of the host's network here (user, server, vhostuser, ...).

    Raises NoNetwork, OperationInvalid (the network is not active), ConfigUnsupported (what cannot be done yet).
    """
    own = Attachment(
        "none",
        vlan=interface.vlan,
        virtualport=interface.virtualport,
        bandwidth=interface.bandwidth,
        isolated=bool(interface.port and interface.port.isolated),
        mtu=interface.mtu.size if interface.mtu else None,
    )
    source = interface.source or InterfaceSource()
    if interface.type == "ethernet":
        managed = interface.target is None or interface.target.managed is not False
        return own if managed else None
    if interface.type == "bridge":
        if not source.bridge:
            raise ConfigUnsupported(
                f"interface {_alias(interface)} of type bridge names no bridge",
                path="/domain/devices/interface/source",
            )
        return replace(own, kind=_bridge_kind(own.virtualport), device=source.bridge)
    if interface.type == "direct":
        if not source.dev:
            raise ConfigUnsupported(
                f"interface {_alias(interface)} of type direct names no device of the host",
                path="/domain/devices/interface/source/@dev",
            )
        return replace(own, kind="macvtap", device=source.dev, mode=macvtap_mode(source.mode))
    if interface.type == "hostdev":
        if not interface.host_function:
            raise ConfigUnsupported(
                f"interface {_alias(interface)} of type hostdev names no PCI device of the host",
                path="/domain/devices/interface/source/address",
            )
        return replace(own, kind="hostdev", device=interface.host_function, managed=bool(interface.managed))
    if interface.type != "network":
        return None
    if networks is None:
        raise ConfigUnsupported(
            f"interface {_alias(interface)}: this daemon has no virtual networks",
            path="/domain/devices/interface/@type",
            remedy="use <interface type='user'>, or the system's daemon",
        )
    if not source.network:
        raise ConfigError(
            f"interface {_alias(interface)} names no network", path="/domain/devices/interface/source/@network"
        )
    return resolve_network(own, networks.lookup_name(source.network), source.portgroup)


def resolve_network(own: Attachment, network: NetworkLike, portgroup: str | None) -> Attachment:
    """`own`, what the interface itself asks for, on a network."""
    if not network.is_active:
        raise OperationInvalid(
            f"network {network.name!r} is not active", remedy=f"start it: kvik net-start {network.name}"
        )
    document = network.document
    group = document.portgroup(portgroup)
    port = document.port
    inbound = own.bandwidth.inbound if own.bandwidth is not None else None
    floor = (inbound.floor if inbound is not None else None) or 0
    if floor:
        check_floor(document, floor, "an interface")
    if own.mtu is not None and document.mtu is not None and own.mtu > document.mtu.size:
        raise ConfigUnsupported(
            f"an interface with an MTU of {own.mtu} on network {network.name!r}, which has {document.mtu.size}: longer "
            "frames would be lost",
            path="/domain/devices/interface/mtu/@size",
        )
    made = replace(
        own,
        network=network.name,
        port_id=str(uuid4()),
        vlan=own.vlan or (group.vlan if group else None) or document.vlan,
        virtualport=_merge_ports(own.virtualport, group.virtualport if group else None, document.virtualport),
        bandwidth=own.bandwidth or (group.bandwidth if group else None),
        isolated=own.isolated or bool(port and port.isolated),
        mtu=own.mtu or (document.mtu.size if document.mtu else None),
        owns_bridge=document.owns_bridge,
        floor=floor,
        at_once=document.owns_bridge and not (document.bridge and document.bridge.delay),
        static_fdb=document.bridge is not None and document.bridge.mac_table_manager == "libvirt",
    )
    if document.mode == "hostdev":
        return replace(made, kind="hostdev", device=_free_function(network), managed=_is_managed(document))
    if document.is_macvtap:
        return replace(made, kind="macvtap", device=_free_device(network), mode=macvtap_mode(document.mode))
    if document.owns_bridge and document.bridge is None:
        return replace(made, kind="switch")
    assert document.bridge_name is not None  # validation: what is not macvtap or a pool has a bridge
    return replace(made, kind=_bridge_kind(made.virtualport), device=document.bridge_name)


def _is_managed(document: Network) -> bool:
    return document.forward is not None and bool(document.forward.managed)


def _free_function(network: NetworkLike) -> str:
    """The first PCI function of the pool that no machine has."""
    forward = network.document.forward
    pool = [item.pci_text for item in forward.addresses] if forward is not None else []
    free = [address for address in pool if address not in network.devices.values()]
    if not free:
        raise OperationInvalid(
            f"network {network.name!r} has no free virtual function: all {len(pool)} of its pool are in use",
            remedy="stop a machine, or have the card make more (sriov_numvfs) and start the network again",
        )
    return free[0]


def _alias(interface: Interface) -> str:
    return interface.alias.name if interface.alias else "(without an alias)"


def macvtap_mode(mode: str | None) -> MacvtapMode:
    """A document's word for it; vepa where there is none."""
    for known in get_args(MacvtapMode):
        if mode == known:
            return known  # type: ignore[no-any-return]  # one of the words of that type
    return "vepa"


def _bridge_kind(port: VirtualPort | None) -> Kind:
    return "openvswitch" if port is not None and port.type == "openvswitch" else "bridge"


def _merge_ports(*ports: VirtualPort | None) -> VirtualPort | None:
    """Field by field; ConfigError where two say different things."""
    made: VirtualPort | None = None
    for port in ports:
        if port is None:
            continue
        if made is None:
            made = clone(port)
            continue
        made.type = _agree("type", made.type, port.type)
        if port.parameters is not None:
            mine = made.parameters = made.parameters or VirtualPortParameters()
            for field in VirtualPortParameters.__struct_fields__:
                if field != "unknown":
                    setattr(mine, field, _agree(field, getattr(mine, field), getattr(port.parameters, field)))
    return made


def _agree(what: str, one: T | None, other: T | None) -> T | None:
    if one is not None and other is not None and one != other:
        raise ConfigError(f"the virtualports of interface, portgroup and network differ in {what}: {one}, {other}")
    return one if one is not None else other


def _free_device(network: NetworkLike) -> str:
    """The interface of the pool with the fewest guests; passthrough and 802.1Qbh want one that nobody is on."""
    document = network.document
    assert document.forward is not None
    pool = document.forward.interfaces
    if not pool:
        raise ConfigUnsupported(f"network {network.name!r} takes its interfaces from a physical function; name them")
    best = min(pool, key=lambda item: item.connections or 0)
    port = document.virtualport
    alone = document.mode == "passthrough" or (
        document.mode == "private" and port is not None and port.type == "802.1Qbh"
    )
    if alone and best.connections:
        raise OperationInvalid(
            f"network {network.name!r} has no free interface: all {len(pool)} of its pool are in use",
            remedy="add one to its <forward>, or stop a machine",
        )
    return best.dev
