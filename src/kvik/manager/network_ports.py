"""The ports of a network as clients ask for them: each is an interface of a machine that runs (`manager/ports.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik.conf.devices.interface import Bandwidth, Interface, Port
from kvik.conf.network import Network, NetworkMac
from kvik.conf.network_port import NetworkPort, Plug, PortOwner
from kvik.errors import KvikError, NoNetworkPort

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.manager import Manager
    from kvik.manager.networks import NetworkObject

__all__ = ["describe", "require"]


def require(network: NetworkObject, port_id: str) -> str:
    """The owner of a port. `NoNetworkPort` if there is no such port."""
    try:
        return network.ports[port_id]
    except KeyError:
        raise NoNetworkPort(f"network {network.name!r} has no port {port_id}") from None


def describe(manager: Manager, network: NetworkObject, port_id: str) -> NetworkPort:
    """What is known of a port: all of it while its machine runs."""
    owner = require(network, port_id)
    made = NetworkPort(uuid=port_id, owner=PortOwner(name=owner))
    try:
        domain = manager.lookup_name(owner)
    except KvikError:  # it was renamed or forgotten this instant
        return made
    made.owner = PortOwner(name=owner, uuid=domain.uuid_text)
    interface = _interface(domain, port_id)
    if interface is None or interface.source is None:
        return made
    document, group_name = network.document, interface.source.portgroup
    group = next((each for each in document.portgroups if each.name == group_name), None)
    made.group = group_name
    made.mac = NetworkMac(address=interface.mac.address) if interface.mac else None
    made.vlan = interface.vlan or (group.vlan if group else None) or document.vlan
    made.virtualport = interface.virtualport or (group.virtualport if group else None) or document.virtualport
    made.bandwidth = interface.bandwidth or (group.bandwidth if group else None)
    made.port = _port(interface, document)
    made.plug = _plug(interface, document)
    return made


def bandwidth(port: NetworkPort) -> list[tuple[str, int]]:
    """libvirt's parameters of a port: what is bounded, in KiB a second (burst: KiB)."""
    rates = port.bandwidth or Bandwidth()
    rows = []
    for direction, rate in (("inbound", rates.inbound), ("outbound", rates.outbound)):
        for name in ("average", "peak", "floor", "burst"):
            if (value := getattr(rate, name, None)) is not None:
                rows.append((f"{direction}.{name}", value))
    return rows


def _interface(domain: DomainObject, port_id: str) -> Interface | None:
    live = domain.live
    for interface in live.devices.interfaces if live is not None else ():
        if interface.source is not None and interface.source.portid == port_id:
            return interface
    return None


def _port(interface: Interface, document: Network) -> Port | None:
    isolated = (interface.port and interface.port.isolated) or (document.port and document.port.isolated)
    return Port(isolated=True) if isolated else None


def _plug(interface: Interface, document: Network) -> Plug:
    source = interface.source
    assert source is not None
    if interface.host_function:
        return Plug(type="hostdev-pci", managed=bool(interface.managed), address=source.host_address)
    if document.is_macvtap:
        return Plug(type="direct", dev=source.dev, mode=source.mode)
    return Plug(type="network" if document.owns_bridge else "bridge", bridge=source.bridge or document.bridge_name)
