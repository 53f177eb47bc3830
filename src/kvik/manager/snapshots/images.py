"""Disks with a new image on top, in the document of a machine that runs."""

from __future__ import annotations

from os.path import normpath
from typing import TYPE_CHECKING

from kvik.conf import tree
from kvik.conf.devices.disk import BackingStore, Disk, DiskSource, Format
from kvik.manager.encrypted_images import encryption_of
from kvik.manager.snapshots.files import format_of

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["put_on_top", "wanted"]


def _on_top(disk: Disk, path: str, index: int) -> Disk:
    """The disk as it is to be: what it writes to now is the image below."""
    assert disk.source is not None
    new = tree.clone(disk)
    source = new.source
    assert source is not None
    number, source.index = source.index, None
    source.pool = source.volume = source.mode = None  # it is known by its path from here on
    below = BackingStore(
        type=disk.type,
        index=number,
        format=Format(type=format_of(disk)),
        source=source,
        backing_store=new.backing_store or BackingStore(),
    )
    encryption = encryption_of(disk)
    new.type, new.source, new.backing_store = "file", DiskSource(file=path, index=index, encryption=encryption), below
    if new.driver is not None:
        new.driver.type = "qcow2"
    return new


def wanted(domain: DomainObject, images: dict[str, tuple[str, int]]) -> list[Disk]:
    """The live disks as they are with these images."""
    assert domain.run is not None
    found = []
    for disk in domain.run.live.devices.disks:
        image = images.get(disk.target.dev or "")
        if image is not None and disk.source is not None:
            there = disk.source.location is not None and normpath(disk.source.location) == image[0]
            found.append(disk if there else _on_top(disk, *image))
    return found


def put_on_top(domain: DomainObject, images: dict[str, tuple[str, int]]) -> bool:
    """Write into the live document what the VMM does; False if it says so already."""
    assert domain.run is not None
    changed = False
    for disk in domain.run.live.devices.disks:
        image = images.get(disk.target.dev or "")
        if image is None or disk.source is None or disk.source.location == image[0]:
            continue
        new = _on_top(disk, *image)
        disk.type, disk.source, disk.backing_store, disk.driver = new.type, new.source, new.backing_store, new.driver
        changed = True
    if changed:
        domain.live_changed()
    return changed
