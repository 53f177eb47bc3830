"""The images of a disk's chain, as its document names them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvik.conf.devices.disk import BackingStore, Disk, DiskDriver, DiskSource, Mirror
from kvik.conf.tree import clone
from kvik.errors import ConfigUnsupported

__all__ = ["Layer", "as_disk", "forget_live", "has_medium", "indices", "layers", "next_index", "on_image"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One image of a chain: `number` 0 is the one the guest writes to.

    `key` is its `index` in a live document, which stays the same when images above it come and go: what the VMM calls
    its nodes is made of that. Before a machine's images were opened it is the number.
    """

    number: int
    key: int
    type: str
    format: str
    source: DiskSource
    read_only: bool


def layers(disk: Disk) -> Iterator[Layer]:
    """From the top down; nothing for an empty drive. Raises `ConfigUnsupported` for a layer without a format."""
    if disk.source is None or not has_medium(disk):
        return
    read_only = disk.readonly or disk.device == "cdrom" or disk.transient is not None
    top = disk.driver.type if disk.driver and disk.driver.type else "raw"
    yield Layer(0, disk.source.index or 0, disk.type, top, disk.source, read_only)
    below: BackingStore | None = disk.backing_store
    number = 1
    while below is not None and below.type is not None:
        if below.source is None or below.format is None:
            raise ConfigUnsupported(f"disk {disk.target.dev}: layer {number} of its chain lacks source or format")
        yield Layer(number, below.index or number, below.type, below.format.type, below.source, True)
        below = below.backing_store
        number += 1


def as_disk(disk: Disk, mirror: Mirror) -> Disk:
    """The disk as it will be when its copy has taken its place."""
    changed = clone(disk)
    changed.type = mirror.type or "file"
    changed.source = mirror.source or DiskSource()
    changed.backing_store = mirror.backing_store
    changed.mirror = None
    changed.encryption = changed.auth = None  # those of its images are with their sources
    changed.driver = changed.driver or DiskDriver(name="qemu")
    changed.driver.type = mirror.format.type if mirror.format is not None else "raw"
    changed.driver.copy_on_read = None
    return changed


def on_image(disk: Disk, key: int) -> Disk | None:
    """The disk as it is when its guest goes on in an image of its chain; None if there is none of that key below."""
    changed = clone(disk)
    below = changed.backing_store
    while below is not None and below.index != key:
        below = below.backing_store
    if below is None or below.source is None or below.type is None:
        return None
    below.source.index = key
    mirror = Mirror(type=below.type, format=below.format, source=below.source, backing_store=below.backing_store)
    return as_disk(changed, mirror)


def indices(disk: Disk) -> Iterator[int]:
    """Of every image of a live disk, those of a copy that is being made among them."""
    for top in (disk, disk.mirror):
        if top is not None and top.source is not None and top.source.index is not None:
            yield top.source.index
        below = top.backing_store if top is not None else None
        while below is not None:
            if below.index is not None:
                yield below.index
            below = below.backing_store


def next_index(disks: Iterable[Disk]) -> int:
    """For the first image of another disk of the same machine."""
    return max((index for disk in disks for index in indices(disk)), default=0) + 1


def forget_live(disk: Disk) -> None:
    """What only a running machine's document has: numbers of images, the copy that is being made."""
    disk.mirror = None
    if disk.source is not None:
        disk.source.index = None
    below = disk.backing_store
    while below is not None:
        below.index = None
        if below.source is not None:
            below.source.index = None
        below = below.backing_store


def has_medium(disk: Disk) -> bool:
    source = disk.source
    if source is None:
        return False
    if disk.type in ("file", "block", "dir"):
        return bool(source.location)
    return True
