"""The storage pools of a scope, as the manager composes them and the daemon sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from kvik.host.reach import about, reach
from kvik.host.threads import in_thread
from kvik.manager.snapshots.files import kept_disks
from kvik.storage import volumes
from kvik.storage.capabilities import capabilities
from kvik.storage.pool import PoolObject
from kvik.storage.pools import REFRESHED, Pools
from kvik.storage.resolve import Resolved, places, resolve
from kvik.storage.sparse import extents, punch
from kvik.storage.types import find_sources
from kvik.storage.volumes import Opened

if TYPE_CHECKING:
    from kvik.conf.devices.disk import Disk
    from kvik.manager.disks import Use
    from kvik.manager.manager import Manager

__all__ = [
    "REFRESHED",
    "Opened",
    "PoolObject",
    "Pools",
    "Resolved",
    "about",
    "capabilities",
    "check_idle",
    "extents",
    "find_sources",
    "in_thread",
    "punch",
    "reach",
    "resolve",
    "users",
    "volumes",
]  # fmt: skip


def check_idle(manager: Manager, uses: Iterable[Use], disks: Iterable[Disk] = ()) -> None:
    """ResourceBusy if a volume among the images that a machine is about to open is being wiped, written to, ...;
    `disks` for those on the network, which are no files."""
    for use in uses:
        manager.pools.check_idle(use.identity, use.path, not use.readonly)
    for disk in disks:
        if disk.type == "network" and disk.source is not None:
            manager.pools.check_idle(places(disk.source), disk.source.name or "", _writes(disk))


def _writes(disk: Disk) -> bool:
    return not (disk.readonly or disk.device == "cdrom")


def users(manager: Manager) -> Iterator[tuple[str, str, bool]]:
    """What machines that run, or are about to, have open, and what snapshots are kept in: (path or place on the
    network, machine, whether it writes)."""
    for domain in manager.domains():
        for snapshot in domain.snapshots.snapshots.values():
            for disk, _ in kept_disks(snapshot):
                if disk.source is not None and disk.source.location:
                    yield disk.source.location, domain.name, False
        for disk in manager.pivots.images(domain):
            if disk.source is not None and disk.source.location:
                yield disk.source.location, domain.name, False
        if domain.run is None:
            continue
        for use in domain.run.uses:
            yield use.path, domain.name, not use.readonly
        for disk in domain.run.live.devices.disks:
            for place in places(disk.source) if disk.type == "network" else ():
                yield place, domain.name, _writes(disk)
            store = disk.backing_store
            while store is not None and store.source is not None:
                if store.source.location:
                    yield store.source.location, domain.name, False
                store = store.backing_store
