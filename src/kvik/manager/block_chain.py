"""The images of a disk's chain in its document: which one is meant, and what becomes of them when they are merged.

Pure functions: a document in, a document changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from kvik.conf.devices.disk import BackingStore, Disk, DiskDriver, Format, Mirror
from kvik.conf.domain import Domain
from kvik.conf.tree import clone
from kvik.errors import InvalidArgument, NoDevice
from kvik.hypervisor.layers import Layer, forget_live, layers

__all__ = [
    "active_is_base",
    "copied",
    "find_disk",
    "find_image",
    "merged",
    "reference",
    "same_disk",
    "split_target",
]

_INDEXED = re.compile(r"^([^\[\]/]+)\[(\d{1,9})\]$")


def split_target(name: str) -> tuple[str, int | None]:
    """`vda[3]` is image 3 of disk vda."""
    found = _INDEXED.match(name)
    return (found[1], int(found[2])) if found is not None else (name, None)


def find_disk(document: Domain, name: str) -> Disk:
    """By target, or by its source. Raises `NoDevice`."""
    for disk in document.devices.disks:
        if disk.target.dev == name or (name and disk.source is not None and disk.source.location == name):
            return disk
    raise NoDevice(
        f"machine {document.name!r} has no disk {name!r}", remedy=f"'kvik domblklist {document.name}' shows its disks"
    )


def find_image(disk: Disk, chain: Sequence[Layer], name: str) -> Layer:
    """By `vda[3]`, or by its path. Raises `InvalidArgument`."""
    target, index = split_target(name)
    for layer in chain:
        if index is not None and target == disk.target.dev and layer.key == index:
            return layer
        if index is None and layer.source.location == name:
            return layer
    raise InvalidArgument(
        f"could not find image '{name}' in chain for '{disk.source.location if disk.source else disk.target.dev}'",
        remedy="the chain is in the machine's document (kvik dumpxml): <backingStore index=...>",
    )


def reference(above: Layer, base: Layer, *, relative: bool) -> str | None:
    """What `above`'s header is to say of `base`; None where only the VMM can tell."""
    path = base.source.location
    if path is None or not relative:
        return path
    if above.source.location is None:
        raise InvalidArgument("an image that is no file of this host has no relative references")
    return os.path.relpath(path, os.path.dirname(above.source.location))  # noqa: PTH120  # pure text


def _node(disk: Disk, key: int) -> Disk | BackingStore:
    if disk.source is not None and disk.source.index == key:
        return disk
    below = disk.backing_store
    while below is not None:
        if below.index == key:
            return below
        below = below.backing_store
    raise InvalidArgument(f"disk {disk.target.dev} has no image {key}")


def merged(disk: Disk, above: int, base: int | None) -> list[Layer]:
    """Image `above` now lies on `base` (None: on nothing): what was between them leaves. Returns what left."""
    chain = list(layers(disk))
    keys = [layer.key for layer in chain]
    end = keys.index(base) if base is not None else len(keys)
    gone = chain[keys.index(above) + 1 : end]
    below = _node(disk, base) if base is not None else BackingStore()
    assert isinstance(below, BackingStore)
    _node(disk, above).backing_store = below
    return gone


def active_is_base(disk: Disk, base: int) -> list[Layer]:
    """The disk's own images above `base` were merged into that: the guest writes to it now. Returns what left."""
    chain = list(layers(disk))
    keys = [layer.key for layer in chain]
    gone = chain[: keys.index(base)]
    below = _node(disk, base)
    assert isinstance(below, BackingStore) and below.source is not None
    below.source.index = below.index
    _become(disk, Mirror(type=below.type, format=below.format, source=below.source, backing_store=below.backing_store))
    return gone


def copied(disk: Disk, mirror: Mirror) -> None:
    """The disk changed over to its copy."""
    _become(disk, mirror)


def _become(disk: Disk, image: Mirror) -> None:
    disk.type = image.type or "file"
    policy = disk.source.startup_policy if disk.source is not None else None
    disk.source = image.source
    if disk.source is not None and disk.source.startup_policy is None:
        disk.source.startup_policy = policy
    disk.backing_store = image.backing_store
    disk.driver = disk.driver or DiskDriver(name="qemu")
    disk.driver.type = (image.format or Format(type="raw")).type
    disk.mirror = None


def same_disk(live: Disk, document: Domain) -> Disk | None:
    """The disk of a definition that a running machine's disk came from: same target, same image."""
    for disk in document.devices.disks:
        if disk.target.dev == live.target.dev and _place(disk) == _place(live):
            return disk
    return None


def _place(disk: Disk) -> object:
    if disk.source is None:
        return None
    if disk.source.pool:
        return (disk.source.pool, disk.source.volume)
    return disk.source.location or clone_without_index(disk)


def clone_without_index(disk: Disk) -> object:
    copy = clone(disk)
    forget_live(copy)
    return copy.source
