"""The host's side of machines' interfaces: taps, and in a user's session the ports of its networks' switches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.conf.devices.interface import Interface, InterfaceType
from kvik.conf.domain import Domain
from kvik.conf.network import normal_mac
from kvik.conf.tree import clone
from kvik.errors import KvikError
from kvik.hypervisor.driver import Feature
from kvik.manager.filtering import protector
from kvik.network.attachment import Attachment
from kvik.network.switch.session import Card
from kvik.network.taps import open_taps

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.manager import Manager
    from kvik.manager.networks import Networks

__all__ = ["SHOWN", "listen", "look_after_networks", "on_switch", "open_interfaces", "plugged", "shown"]

SHOWN = ("bridge", "direct", "hostdev")  # what `shown` makes of interfaces on networks

logger = logging.getLogger(__name__)

LOOK = 2.0  # seconds between looks at a session's networks


def on_switch(manager: Manager, interface: Interface) -> bool:
    """Whether a switch of the session carries it."""
    return manager.session_networks is not None and interface.type == "network"


def shown(document: Domain, networks: Networks) -> Domain:
    """A live document for people: an interface on a network that made no bridge of its own says what it is in truth, as
    libvirt has it. The same document if there is none."""
    types = [_in_truth(interface, networks) for interface in document.devices.interfaces]
    if types == [interface.type for interface in document.devices.interfaces]:
        return document
    copy = clone(document)
    for interface, kind in zip(copy.devices.interfaces, types, strict=True):
        interface.type = kind
    return copy


def _in_truth(interface: Interface, networks: Networks) -> InterfaceType:
    source = interface.source
    if interface.type != "network" or source is None or not source.network:
        return interface.type
    if interface.host_function:
        return "hostdev"
    if interface.is_macvtap:
        return "direct"
    try:
        return "network" if networks.lookup_name(source.network).document.owns_bridge else "bridge"
    except KvikError:  # it is gone, and nothing is known of it
        return "network"


async def open_interfaces(
    domain: DomainObject,
    directory: Path,
    interfaces: Sequence[Interface],
    close: ExitStack,
    attachments: Mapping[str, Attachment],
) -> dict[str, int]:
    """Descriptors by name for the driver; `close` closes ours. Raises what `open_taps` and `open_ports` do."""
    manager, features = domain.manager, domain.driver.features()
    if Feature.TAPS not in features:
        return {}
    files: dict[str, int] = {}
    for attachment in attachments.values():
        if attachment.floor:
            await manager.networks.lookup_name(attachment.network).keep_promises()
    if attachments:
        files |= await manager.store.run(open_taps, interfaces, close, attachments, protector(domain))
    await listen(manager, interfaces)
    networks, on_switches = manager.session_networks, [item for item in interfaces if on_switch(manager, item)]
    if networks is not None and on_switches:
        files |= await manager.store.run(networks.open_ports, domain.name, directory, on_switches, close)
    return files


async def listen(manager: Manager, interfaces: Iterable[Interface]) -> None:
    """Hear the addresses of machines on these, where they are devices of the host. Without the right to (a session),
    or when one has gone meanwhile, nothing is heard on it: that is no fault."""
    for interface in interfaces:
        device = interface.target.dev if interface.target is not None else None
        if not device or interface.mac is None or interface.host_function or on_switch(manager, interface):
            continue
        try:
            mac = normal_mac(interface.mac.address)
            await manager.store.run(partial(manager.taps.watch, device, mac, macvtap=interface.is_macvtap))
        except (KvikError, ValueError) as error:
            logger.info("addresses on %s are not listened for: %s", device, error)


async def plugged(domain: DomainObject, directory: Path, interface: Interface) -> None:
    """After the VMM has a card of a machine that runs, and before our end of it is closed."""
    networks, by_path = domain.manager.session_networks, Feature.NET_PLUG_BY_PATH in domain.driver.features()
    if networks is None or not by_path or not on_switch(domain.manager, interface):
        return
    try:
        await domain.manager.store.run(networks.plug_by_path, domain.name, directory, interface)
    except KvikError as error:  # the machine has its card: `look_after_networks` connects it
        logger.warning("machine %s: %s", domain.name, error)


async def look_after_networks(manager: Manager) -> None:
    """As long as the daemon runs: switches and ways out that ended are had again."""
    networks = manager.session_networks
    while networks is not None:
        await asyncio.sleep(LOOK)
        cards = [
            Card(domain.name, domain.run.directory, interface)
            for domain in manager.domains()
            if domain.is_active and domain.run is not None
            for interface in domain.run.live.devices.interfaces
            if on_switch(manager, interface)
        ]
        if cards:
            for text in await manager.store.run(networks.look_after, cards):
                logger.warning("%s", text)
