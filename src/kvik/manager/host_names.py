"""The host's resolver knows the machines' names, if that is wanted: told again whenever a network comes or goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik.conf.enums import NetworkEventLifecycleType
from kvik.network.host_names import Report, Zone, zone_of

if TYPE_CHECKING:
    from kvik.manager.manager import Manager
    from kvik.manager.networks import NetworkObject

__all__ = ["disable", "enable", "status", "watch"]


def zones(manager: Manager) -> list[Zone]:
    """Of all networks, by name."""
    found = sorted(manager.networks.list(), key=lambda network: network.name)
    return [zone_of(network.document, active=network.is_active) for network in found]


async def status(manager: Manager) -> Report:
    return await manager.networks.run(manager.host_names.status, zones(manager))


async def enable(manager: Manager) -> str:
    return await manager.networks.run(manager.host_names.enable, zones(manager))


async def disable(manager: Manager) -> bool:
    return await manager.networks.run(manager.host_names.disable, zones(manager))


def watch(manager: Manager) -> None:
    def on_event(network: NetworkObject, event: int, detail: int) -> None:
        if event in (NetworkEventLifecycleType.STARTED, NetworkEventLifecycleType.STOPPED):
            manager.spawn(refresh(manager))

    manager.networks.subscribe(on_event)
    manager.spawn(refresh(manager))


async def refresh(manager: Manager) -> None:
    await manager.networks.run(manager.host_names.refresh, zones(manager))
