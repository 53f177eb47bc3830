"""Disks that name a volume of a pool: what is opened for them, and how the running machine's document shows them.

A live document has both: where the bytes are, which the hypervisor needs (and the next daemon, whose pool may be
stopped by then), and the pool and volume, which alone is what people are shown, as libvirt does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.conf.devices.disk import Disk, DiskSource
from kvik.conf.domain import Domain
from kvik.conf.tree import clone
from kvik.errors import ConfigUnsupported, KvikError
from kvik.manager.storage import resolve

if TYPE_CHECKING:
    from kvik.manager.manager import Manager

__all__ = ["by_path", "name_volume", "refresh_pools", "resolve_all", "resolve_disk", "shown"]


def resolve_all(manager: Manager, document: Domain) -> None:
    """Raises what `storage.resolve` raises: no such pool or volume, a pool that is not active, ..."""
    for disk in document.devices.disks:
        resolve_disk(manager, disk)


def resolve_disk(manager: Manager, disk: Disk) -> None:
    """In place; a disk that names no volume stays as it is."""
    reference = disk.source
    if disk.type != "volume" or reference is None:
        return
    found = resolve(manager.pools, reference)
    if found.type == "dir":
        raise ConfigUnsupported(
            f"disk {disk.target.dev}: volume '{reference.volume}' of pool '{reference.pool}' is a directory"
        )
    disk.type, disk.source = found.type, found.source
    disk.source.pool, disk.source.volume, disk.source.mode = reference.pool, reference.volume, reference.mode


def by_path(manager: Manager, document: Domain, live: Domain | None = None) -> Domain:
    """A copy whose disks name files and devices: what images are put on top of, and kept as, does not change with a
    pool. Where a machine runs, `live` is its document, and says where its volumes are. A disk whose pool is stopped
    stays one of type volume."""
    copy = clone(document)
    known: dict[tuple[str | None, str | None], Disk] = {
        (disk.source.pool, disk.source.volume): disk
        for disk in (live.devices.disks if live is not None else ())
        if disk.source is not None and disk.source.pool and disk.source.location
    }
    for disk in copy.devices.disks:
        source = disk.source
        running = known.get((source.pool, source.volume)) if source is not None else None
        if disk.type == "volume" and source is not None and running is not None and running.source is not None:
            disk.type, source.file, source.dev = running.type, running.source.file, running.source.dev
        elif disk.type == "volume":
            with contextlib.suppress(KvikError):
                resolve_disk(manager, disk)
        if disk.source is not None and disk.type != "volume":
            disk.source.pool = disk.source.volume = disk.source.mode = None
    return copy


def shown(document: Domain) -> Domain:
    """The document for people; the same one if none of its disks is a volume."""
    if not any(disk.source is not None and disk.source.pool for disk in document.devices.disks):
        return document
    copy = clone(document)
    for disk in copy.devices.disks:
        name_volume(disk)
    return copy


def name_volume(disk: Disk) -> None:
    """In place: a disk that is known to be a volume says no more where that is."""
    source = disk.source
    if source is None or not source.pool:
        return
    disk.type = "volume"
    disk.source = DiskSource(
        pool=source.pool,
        volume=source.volume,
        mode=source.mode,
        index=source.index,
        startup_policy=source.startup_policy,
        seclabels=source.seclabels,
        encryption=source.encryption,
        slices=source.slices,
    )


async def refresh_pools(manager: Manager, paths: Iterable[str]) -> None:
    """The pools that these files came to, or left, know of it."""
    for directory in sorted({str(Path(path).parent) for path in paths}):
        with contextlib.suppress(KvikError):  # of no pool; or it will be looked at when it is started
            await manager.pools.lookup_target(directory).refresh()
