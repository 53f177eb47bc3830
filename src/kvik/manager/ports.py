"""Who is on which network: machines' interfaces join when they start or are plugged, and leave with the machine.

A port's id is in the live document (`<source network=... portid=...>`), so a restarted daemon counts it again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING
from uuid import uuid4

from kvik.conf.devices.interface import Interface, InterfaceSource, InterfaceTarget, VirtualPortParameters
from kvik.conf.enums import NetworkEventLifecycleType
from kvik.errors import KvikError
from kvik.network.attachment import Attachment, resolve, resolve_all
from kvik.network.taps import reconnect_tap, release_taps

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.manager import Manager
    from kvik.network.network import NetworkObject

__all__ = ["join", "leave", "rejoin", "release", "watch"]

logger = logging.getLogger(__name__)


def join(domain: DomainObject, interfaces: Iterable[Interface]) -> dict[str, Attachment]:
    """Where each interface goes, by alias; said in the live document and counted on its network.

    Raises as `resolve`; then nothing has changed. No await: nobody comes between the look and the count.
    """
    interfaces = list(interfaces)
    networks = domain.manager.networks
    attachments = resolve_all(interfaces, networks)
    for interface in interfaces:
        attachment = attachments.get(interface.alias.name if interface.alias else "")
        if attachment is not None:
            _say(interface, attachment)
        if attachment is not None and attachment.network:
            networks.lookup_name(attachment.network).connect(attachment.port_id, domain.name)
    return attachments


def _say(interface: Interface, attachment: Attachment) -> None:
    """Into the live document: it is on disk before anything is made, so that all of it can be found and undone."""
    if attachment.network:
        source = interface.source = interface.source or InterfaceSource()
        source.portid = attachment.port_id
        if attachment.kind == "macvtap":
            source.dev, source.mode = attachment.device, attachment.mode
        else:
            source.bridge = attachment.device or None  # a session's switch has none
    port = interface.virtualport = attachment.virtualport
    if attachment.kind == "openvswitch" and port is not None:
        port.parameters = port.parameters or VirtualPortParameters()
        port.parameters.interfaceid = port.parameters.interfaceid or str(uuid4())
        target = interface.target = interface.target or InterfaceTarget()
        target.dev = target.dev or f"tap{port.parameters.interfaceid[:11]}"


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
                attachment = resolve(interface, manager.networks)
                if attachment is None:
                    continue
                await manager.store.run(reconnect_tap, interface, attachment)
                source.bridge = attachment.device
                network.connect(source.portid, domain.name)
            except KvikError as error:
                logger.warning("machine %s is not on network %s again: %s", domain.name, network.name, error)
        domain.live_changed()


def rejoin(domain: DomainObject, interfaces: Iterable[Interface]) -> None:
    """Count those of a machine that was found again. A network that is not active any more is no reason to fail."""
    for interface in interfaces:
        source = interface.source
        if interface.type != "network" or source is None or not source.network or not source.portid:
            continue
        try:
            domain.manager.networks.lookup_name(source.network).connect(source.portid, domain.name)
        except KvikError as error:
            logger.warning("machine %s: %s", domain.name, error)


async def release(manager: Manager, domain: DomainObject, interfaces: Iterable[Interface]) -> None:
    """After the machine, or a device of it, is gone: count it no more, and leave nothing of it on the host."""
    interfaces = list(interfaces)
    leave(domain, interfaces)
    if any(interface.target is not None and interface.target.dev for interface in interfaces):
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
