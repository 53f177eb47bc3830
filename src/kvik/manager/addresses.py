"""A guest's addresses without its help: the DHCP leases of our networks, what is heard on its interfaces, and who
answered the host's ARP and ND."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvik.conf.network import normal_mac
from kvik.errors import KvikError
from kvik.host.neighbour import neighbours
from kvik.host.netlink import Netlink
from kvik.manager.guest import ADDRESSES_MAX, InterfaceAddress
from kvik.manager.interfaces import on_switch

if TYPE_CHECKING:
    from kvik.conf.devices.interface import Interface
    from kvik.manager.domain import DomainObject
    from kvik.manager.networks import NetworkObject, Networks
    from kvik.network.dnsmasq import LeaseEntry

__all__ = ["from_arp", "from_leases"]

IPV4, IPV6 = 0, 1  # virIPAddrType


async def from_leases(domain: DomainObject) -> list[InterfaceAddress]:
    """What the networks that the machine's interfaces are on have lent to their MACs."""
    networks = domain.manager.networks
    found = []
    lent_by: dict[str, list[LeaseEntry]] = {}  # each network's leases are read once, however many cards are on it
    for interface, mac in _interfaces(domain):
        if on_switch(domain.manager, interface):
            lent = await _from_switch(domain, interface, mac)
        else:
            network = network_of(networks, interface)
            if network is None or not network.is_active:
                continue
            if network.name not in lent_by:
                lent_by[network.name] = await networks.run(network.leases)
            leases = [lease for lease in lent_by[network.name] if lease.mac == mac]
            lent = [(IPV4 if lease.version == 4 else IPV6, lease.address, lease.prefix) for lease in leases]
        if lent:
            found.append(InterfaceAddress(_name(interface), mac, lent[:ADDRESSES_MAX]))
    return found


async def _from_switch(domain: DomainObject, interface: Interface, mac: str) -> list[tuple[int, str, int]]:
    """What the switch of a session's network has lent."""
    manager, source = domain.manager, interface.source
    if manager.session_networks is None or source is None or not source.network:
        return []
    leases = await manager.store.run(manager.session_networks.leases, source.network)
    return [(IPV4, str(lease["ip"]), int(lease["prefix"])) for lease in leases if lease["mac"] == mac]


async def from_arp(domain: DomainObject) -> list[InterfaceAddress]:
    """What a machine said of its addresses on its interfaces (network/tap_watch.py), last heard first; then who else
    answered the host with one of its MACs. No prefix is known: it is 0."""

    def known() -> dict[str, list[tuple[int, str, int]]]:
        by_mac: dict[str, list[tuple[int, str, int]]] = {}
        with Netlink() as netlink:
            for entry in neighbours(netlink):
                if entry.usable:
                    family = IPV4 if entry.address.version == 4 else IPV6
                    by_mac.setdefault(entry.mac, []).append((family, str(entry.address), 0))
        return by_mac

    by_mac = await domain.manager.networks.run(known)
    found = []
    for interface, mac in _interfaces(domain):
        heard = [(IPV6 if ":" in one else IPV4, one, 0) for one in domain.manager.taps.heard(_name(interface))]
        told = list(dict.fromkeys([*heard, *sorted(by_mac.get(mac, []))]))
        if told:
            found.append(InterfaceAddress(_name(interface), mac, told[:ADDRESSES_MAX]))
    return found


def network_of(networks: Networks, interface: Interface) -> NetworkObject | None:
    """The network of ours that an interface is on, by its name or by its bridge."""
    source = interface.source
    if source is None:
        return None
    if interface.type == "network" and source.network:
        try:
            return networks.lookup_name(source.network)
        except KvikError:
            return None
    if source.bridge:
        return next((each for each in networks.list() if each.is_active and each.bridge_name == source.bridge), None)
    return None


def _interfaces(domain: DomainObject) -> Iterable[tuple[Interface, str]]:
    """The live interfaces that have a MAC, with it."""
    domain.require_running()
    live = domain.live
    for interface in live.devices.interfaces if live is not None else ():
        if interface.mac is not None:
            try:
                yield interface, normal_mac(interface.mac.address)
            except ValueError:
                continue


def _name(interface: Interface) -> str:
    """Of the host's end, as libvirt names it for these sources."""
    return (interface.target.dev if interface.target else None) or ""
