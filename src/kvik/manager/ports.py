"""Who is on which network: machines' interfaces join when they start or are plugged, and leave with the machine.

A port's id is in the live document (`<source network=... portid=...>`), so a restarted daemon counts it again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING
from uuid import uuid4

from kvik.conf.devices.common import pci_address
from kvik.conf.devices.interface import Interface, InterfaceSource, InterfaceTarget, VirtualPortParameters
from kvik.conf.enums import NetworkEventLifecycleType
from kvik.conf.tree import clone
from kvik.errors import ConfigUnsupported, KvikError, ResourceBusy
from kvik.host.macvtap import free_name
from kvik.host.netlink import Netlink
from kvik.hypervisor.driver import Feature
from kvik.manager import filtering
from kvik.network.attachment import Attachment, resolve
from kvik.network.tap_changes import put_back_tap, reconnect_tap
from kvik.network.taps import on_openvswitch, release_taps

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.manager import Manager
    from kvik.network.network import NetworkObject

__all__ = ["join", "leave", "put_back", "rejoin", "release", "say", "settle", "watch"]

logger = logging.getLogger(__name__)


def join(domain: DomainObject, interfaces: Iterable[Interface]) -> dict[str, Attachment]:
    """Where each interface goes, by alias; said in the live document and counted on its network.

    Raises as `resolve`; then nothing is counted. No await: nobody comes between the look and the count.
    """
    networks = domain.manager.networks
    attachments: dict[str, Attachment] = {}
    joined: list[Interface] = []
    try:
        for interface in interfaces:
            attachment = resolve(interface, networks)  # one by one: of a pool the next one takes the next device
            if attachment is None:
                continue
            if attachment.kind == "hostdev" and Feature.PASSTHROUGH not in domain.driver.features():
                who = f"network {attachment.network!r}" if attachment.network else "an interface of type hostdev"
                raise ConfigUnsupported(
                    f"{who} gives PCI devices of the host, and the VMM of machine {domain.name!r} takes none",
                    path="/domain/devices/interface",
                    remedy="run it on QEMU, or use another network",
                )
            if attachment.kind == "hostdev" and (other := _user_of(domain, attachment.device)):
                raise ResourceBusy(
                    f"PCI device {attachment.device} is with machine {other!r}",
                    remedy=f"stop it: kvik shutdown {other}",
                )
            attachments[interface.alias.name if interface.alias else ""] = attachment
            say(domain, interface, attachment)
            if attachment.network:
                device = attachment.device if attachment.kind in ("macvtap", "hostdev") else ""
                network = networks.lookup_name(attachment.network)
                network.connect(attachment.port_id, domain.name, device)
                joined.append(interface)
                if attachment.floor:
                    network.promise(attachment.port_id, mac_of(interface), attachment.floor)
    except BaseException:
        leave(domain, joined)
        raise
    return attachments


def _user_of(domain: DomainObject, function: str) -> str:
    """The name of another machine that has this PCI function, or ""."""
    for machine in domain.manager.domains():
        if machine is not domain and machine.run is not None:
            arriving = [machine.run.arriving] if isinstance(machine.run.arriving, Interface) else []
            if any(nic.host_function == function for nic in [*machine.run.live.devices.interfaces, *arriving]):
                return machine.name
    return ""


def say(domain: DomainObject, interface: Interface, attachment: Attachment) -> None:
    """Into the live document: it is on disk before anything is made, so that all of it can be found and undone."""
    source = interface.source = interface.source or InterfaceSource()
    if attachment.network:
        source.portid = attachment.port_id
        source.host_address = None  # of a pool of PCI functions alone, and then ours to say
        if attachment.kind == "hostdev":
            source.host_address = pci_address(attachment.device)
            interface.managed = attachment.managed or None
        elif attachment.kind != "macvtap":
            source.bridge = attachment.device or None  # a session's switch has none
    target = interface.target or InterfaceTarget()
    if attachment.kind == "macvtap":
        source.dev, source.mode = attachment.device, attachment.mode
        if not target.dev:
            taken = {name for machine in domain.manager.domains() for name in _names(machine)}
            with Netlink() as netlink:
                target.dev = free_name(netlink, taken)
        interface.target = target
    port = interface.virtualport = attachment.virtualport
    if attachment.kind == "openvswitch" and port is not None:
        port.parameters = port.parameters or VirtualPortParameters()
        port.parameters.interfaceid = port.parameters.interfaceid or str(uuid4())
        target.dev = target.dev or f"tap{port.parameters.interfaceid[:11]}"
        interface.target = target


def _names(domain: DomainObject) -> list[str]:
    """Of the host's side of its interfaces, also of those that are about to be made."""
    run = domain.run
    if run is None:
        return []
    devices = [*run.live.devices.interfaces]
    if isinstance(run.arriving, Interface):
        devices.append(run.arriving)
    return [device.target.dev for device in devices if device.target is not None and device.target.dev]


def watch(manager: Manager) -> None:
    """Machines are put on their network again whenever it was stopped and started."""

    def on_event(network: NetworkObject, event: int, detail: int) -> None:
        if event == NetworkEventLifecycleType.STARTED:
            manager.spawn(_reconnect(manager, network))

    manager.networks.subscribe(on_event)


async def _reconnect(manager: Manager, network: NetworkObject) -> None:
    for domain in manager.domains():
        live = domain.live
        for interface in live.devices.interfaces if live is not None else ():
            source, target = interface.source, interface.target
            if interface.type != "network" or source is None or source.network != network.name:
                continue
            if not source.portid:
                continue
            if manager.session_networks is not None:  # its switch is connected by `look_after_networks`
                network.connect(source.portid, domain.name)
                continue
            if target is None or not target.dev:
                continue
            try:
                if (
                    interface.is_macvtap or interface.host_function
                ):  # it stands on an interface of the host, which is still there
                    network.connect(source.portid, domain.name, _device(interface))
                    continue
                attachment = resolve(interface, manager.networks)
                if attachment is None:
                    continue
                await manager.store.run(reconnect_tap, interface, attachment)
                await filtering.follow(domain, interface)
                source.bridge = attachment.device
                network.connect(source.portid, domain.name)
                if attachment.floor:
                    network.promise(source.portid, mac_of(interface), attachment.floor)
                    await network.keep_promises()
            except KvikError as error:
                logger.warning("machine %s is not on network %s again: %s", domain.name, network.name, error)
        domain.live_changed()


def mac_of(interface: Interface) -> str:
    """A definition without one is given one when it is defined."""
    return interface.mac.address if interface.mac is not None else ""


async def settle(manager: Manager) -> None:
    """Once all machines are found again: what is promised to those that ended meanwhile is taken back."""
    for network in manager.networks.list():
        network.forget_promises()
    await _keep_promises(manager, [network.name for network in manager.networks.list()])


async def _keep_promises(manager: Manager, networks: Iterable[str]) -> None:
    for name in networks:
        try:
            await manager.networks.lookup_name(name).keep_promises()
        except KvikError as error:
            logger.warning("network %s: %s", name, error)


def _networks_of(interfaces: Iterable[Interface]) -> set[str]:
    found = (nic.source.network for nic in interfaces if nic.type == "network" and nic.source is not None)
    return {name for name in found if name}


def _device(interface: Interface) -> str:
    """Which of a pool's it has."""
    if interface.is_macvtap and interface.source is not None:
        return interface.source.dev or ""
    return interface.host_function


def rejoin(domain: DomainObject, interfaces: Iterable[Interface]) -> None:
    """Count those of a machine that was found again. A network that is not active any more is no reason to fail."""
    for interface in interfaces:
        source = interface.source
        if interface.type != "network" or source is None or not source.network or not source.portid:
            continue
        try:
            domain.manager.networks.lookup_name(source.network).connect(source.portid, domain.name, _device(interface))
        except KvikError as error:
            logger.warning("machine %s: %s", domain.name, error)


async def put_back(domain: DomainObject, interfaces: Iterable[Interface]) -> None:
    """Of a machine that was found again: its taps are where its live document has them. Never raises."""
    manager = domain.manager
    for interface in interfaces:
        source, target = interface.source, interface.target
        named = source is not None and (source.network if interface.type == "network" else source.bridge)
        if interface.type not in ("network", "bridge") or not named or target is None or not target.dev:
            continue
        if manager.session_networks is not None and interface.type == "network":
            continue
        try:
            if interface.type == "network" and not manager.networks.lookup_name(str(named)).is_active:
                continue  # its tap waits for it
            if interface.is_macvtap or interface.host_function or on_openvswitch(interface):
                continue
            attachment = resolve(clone(interface), manager.networks)
            if attachment is not None and await manager.store.run(put_back_tap, interface, attachment):
                logger.warning(
                    "machine %s: %s was not on %s, where it belongs, and is again",
                    domain.name, target.dev, attachment.device,
                )  # fmt: skip
        except KvikError as error:
            logger.warning("machine %s: interface %s: %s", domain.name, target.dev, error)


async def release(manager: Manager, domain: DomainObject, interfaces: Iterable[Interface]) -> None:
    """After the machine, or a device of it, is gone: count it no more, and leave nothing of it on the host."""
    interfaces = list(interfaces)
    leave(domain, interfaces)
    await _keep_promises(manager, _networks_of(interfaces))
    # A PCI function that another machine has was refused to this one, and must not be taken from that.
    interfaces = [nic for nic in interfaces if not (nic.host_function and _user_of(domain, nic.host_function))]
    if any((nic.target is not None and nic.target.dev) or nic.host_function for nic in interfaces):
        await manager.store.run(release_taps, interfaces)


def leave(domain: DomainObject, interfaces: Iterable[Interface]) -> None:
    """Count them no more; doing it twice changes nothing."""
    for interface in interfaces:
        source = interface.source
        if interface.type != "network" or source is None or not source.network or not source.portid:
            continue
        try:
            domain.manager.networks.lookup_name(source.network).disconnect(source.portid)
        except KvikError:
            pass  # the network is gone, and its count with it
