"""The host's side of machines' interfaces: taps, and in a user's session the ports of its networks' switches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.conf.devices.interface import Interface
from kvik.errors import KvikError
from kvik.hypervisor.driver import Feature
from kvik.manager.filtering import protector
from kvik.network.attachment import Attachment
from kvik.network.switch.session import Card
from kvik.network.taps import open_taps

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.manager import Manager

__all__ = ["look_after_networks", "on_switch", "open_interfaces", "plugged"]

logger = logging.getLogger(__name__)

LOOK = 2.0  # seconds between looks at a session's networks


def on_switch(manager: Manager, interface: Interface) -> bool:
    """Whether a switch of the session carries it."""
    return manager.session_networks is not None and interface.type == "network"


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
    networks, on_switches = manager.session_networks, [item for item in interfaces if on_switch(manager, item)]
    if networks is not None and on_switches:
        files |= await manager.store.run(networks.open_ports, domain.name, directory, on_switches, close)
    return files


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
