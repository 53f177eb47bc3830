"""Whether the bitmaps of a disk's chain tell all that changed since a checkpoint: never less, or not at all.

Pure. A chain tells it if each image from the top down to the one in which tracking began has the checkpoint's bitmap,
and none of them lost anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from os.path import normpath

from kvik.conf.checkpoint import Checkpoint, place_of
from kvik.conf.devices.disk import Disk
from kvik.errors import CheckpointInconsistent
from kvik.hypervisor.driver import Bitmap
from kvik.hypervisor.layers import layers

__all__ = ["sources"]


def sources(disk: Disk, checkpoint: Checkpoint, known: Mapping[int, Mapping[str, Bitmap]]) -> list[tuple[int, str]]:
    """(image's number, bitmap) of all that together tell what changed. Raises `CheckpointInconsistent` with the remedy.

    `known`: the bitmaps of each image of the disk, as the VMM has them.
    """
    target = disk.target.dev or ""
    name = checkpoint.bitmap_of(target)
    if name is None:
        raise _lost(checkpoint, target, "it does not track that disk")
    first = checkpoint.image_of(target)
    found: list[tuple[int, str]] = []
    for layer in layers(disk):
        place = place_of(layer.source) or "an image"
        bitmap = known.get(layer.key, {}).get(name)
        if bitmap is None:
            raise _lost(checkpoint, target, f"{place} has no bitmap '{name}'")
        if bitmap.inconsistent:
            raise _lost(
                checkpoint, target, f"bitmap '{name}' in {place} is inconsistent: the VMM died before it was written"
            )
        if not bitmap.usable:
            raise _lost(checkpoint, target, f"bitmap '{name}' in {place} did not record everything")
        found.append((layer.key, name))
        if place == first or (first is not None and normpath(place) == normpath(first)):
            return found
    raise _lost(
        checkpoint, target, f"its tracking began in {first or 'an image'}, which is none of the disk's any more"
    )


def _lost(checkpoint: Checkpoint, target: str, why: str) -> CheckpointInconsistent:
    return CheckpointInconsistent(
        f"missing or broken bitmap for disk '{target}': what changed since checkpoint '{checkpoint.name}' is not "
        f"known: {why}",
        remedy=f"make a full backup of the disk with a new checkpoint, and delete checkpoint '{checkpoint.name}'",
    )
