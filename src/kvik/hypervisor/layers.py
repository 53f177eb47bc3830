"""The images of a disk's chain, as its document names them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvik.conf.devices.disk import BackingStore, Disk, DiskSource
from kvik.errors import ConfigUnsupported

__all__ = ["Layer", "has_medium", "layers"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One image of a chain: `number` 0 is the one the guest writes to."""

    number: int
    type: str
    format: str
    source: DiskSource
    read_only: bool


def layers(disk: Disk) -> Iterator[Layer]:
    """From the top down; nothing for an empty drive. Raises `ConfigUnsupported` for a layer without a format."""
    if disk.source is None or not has_medium(disk):
        return
    read_only = disk.readonly or disk.device == "cdrom"
    yield Layer(0, disk.type, disk.driver.type if disk.driver and disk.driver.type else "raw", disk.source, read_only)
    below: BackingStore | None = disk.backing_store
    number = 1
    while below is not None and below.type is not None:
        if below.source is None or below.format is None:
            raise ConfigUnsupported(f"disk {disk.target.dev}: layer {number} of its chain lacks source or format")
        yield Layer(number, below.type, below.format.type, below.source, True)
        below = below.backing_store
        number += 1


def has_medium(disk: Disk) -> bool:
    source = disk.source
    if source is None:
        return False
    if disk.type in ("file", "block", "dir"):
        return bool(source.location)
    return True
