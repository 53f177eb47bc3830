"""Checkpoints while images are copied and merged: what bitmaps of an image tell goes where its data goes.

Before data moves, bitmaps of the images that will go are merged into those of the one that gets their data; after it
has moved, checkpoints whose tracking began in one of those say so of the other. Whatever goes wrong in between, what is
left is refused as incomplete (`chain`): never a backup that lacks something.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from os.path import normpath
from typing import TYPE_CHECKING

from kvik.conf.checkpoint import Checkpoint, TrackedImage, TrackedImages, place_of
from kvik.conf.devices.disk import Disk
from kvik.errors import KvikError
from kvik.hypervisor.layers import layers
from kvik.manager.checkpoints.store import store_of

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

NOWHERE = "-"  # the place of an image that no disk has

logger = logging.getLogger(__name__)

__all__ = ["carry", "carry_to_mirror", "file_moved", "moved", "tracked_in"]


async def carry(
    domain: DomainObject, disk: Disk, images: list[int], into: int, *, new: bool = True, written: bool = False
) -> None:
    """The data of `images` is about to go into image `into`. `new`: also bitmaps that this does not have; `written`: a
    job writes to it. Failing is no reason to stop the job: its checkpoints are then refused."""
    if not len(domain.checkpoints):
        return
    try:
        await domain.require_machine().backups.carry(disk, images, into, new=new, written=written)
    except KvikError as error:
        domain.log.note(f"bitmaps of disk {disk.target.dev} were not carried along: {error}")
        logger.warning("machine %s: bitmaps of disk %s were not carried along: %s", domain.name, disk.target.dev, error)
        await _lose(domain, disk.target.dev or "")


async def carry_to_mirror(domain: DomainObject, disk: Disk) -> None:
    """The disk is about to change over to its copy, or to the image that its own is committed into."""
    mirror = disk.mirror
    if mirror is None or mirror.source is None or mirror.source.index is None:
        return
    shared = {mirror.source.index}
    below = mirror.backing_store
    while below is not None:
        shared |= {below.index} if below.index is not None else set()
        below = below.backing_store
    images = []
    for layer in layers(disk):
        if layer.key in shared:
            break
        images.append(layer.key)
    await carry(domain, disk, images, mirror.source.index, written=True)


async def _lose(domain: DomainObject, target: str) -> None:
    """Nobody relies on what the checkpoints tell of a disk, whatever bitmaps are left."""
    for checkpoint in domain.checkpoints.all.values():
        if target in checkpoint.tracked:
            await _set_place(domain, checkpoint, target, NOWHERE)


async def _set_place(domain: DomainObject, checkpoint: Checkpoint, target: str, place: str) -> None:
    others = [image for image in (checkpoint.images or TrackedImages()).images if image.disk != target]
    checkpoint.images = TrackedImages(images=[*others, TrackedImage(disk=target, path=place)])
    await domain.manager.store.run(store_of(domain).write, checkpoint)


async def moved(domain: DomainObject, before: Disk, after: Disk, into: int | None) -> None:
    """Images left the chain; what they held is in image `into` now (None: in the top one). Whether that has their
    bitmaps is seen when a backup is made."""
    if not len(domain.checkpoints):
        return
    target = after.target.dev or ""
    chain = {layer.key: place_of(layer.source) for layer in layers(after)}
    gone = {place_of(layer.source) for layer in layers(before) if layer.key not in chain}
    place = chain.get(into) if into is not None else next(iter(chain.values()), None)
    if place is None:
        return
    try:
        for checkpoint in domain.checkpoints.all.values():
            if target in checkpoint.tracked and checkpoint.image_of(target) in gone:
                await _set_place(domain, checkpoint, target, place)
    except KvikError as error:
        logger.warning("machine %s: checkpoints of disk %s do not know of its merge: %s", domain.name, target, error)


# Of a machine that is off its images' files are merged by `image/`, with their bitmaps (`storage/overlay_bitmaps`).


def _begun_in(domain: DomainObject, path: str) -> Iterator[tuple[Checkpoint, str]]:
    for checkpoint in domain.checkpoints.all.values():
        for target in checkpoint.tracked:
            if normpath(checkpoint.image_of(target) or "") == path:
                yield checkpoint, target


def tracked_in(domain: DomainObject, path: str) -> dict[str, bool]:
    """The bitmaps of the machine's checkpoints, and whether its tracking began in this file."""
    found = {
        name: False
        for checkpoint in domain.checkpoints.all.values()
        for target in checkpoint.tracked
        if (name := checkpoint.bitmap_of(target)) is not None
    }
    for checkpoint, target in _begun_in(domain, path):
        found[checkpoint.bitmap_of(target) or ""] = True
    return found


async def file_moved(domain: DomainObject, path: str, into: str) -> None:
    """Its data is in another file now. Raises `HostError`."""
    for checkpoint, target in list(_begun_in(domain, path)):
        await _set_place(domain, checkpoint, target, into)
