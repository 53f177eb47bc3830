"""Dirty bitmaps of images that rest on one another, while no VMM has them open: what they tell goes on in a new image,
and goes where an image's data goes.

Who asks what changed takes the bitmap of every image from the top down to the one in which tracking began, and all of
them together or none (`manager/checkpoints/chain`). So a bitmap that would be taken for complete and is not must not be
left: where one cannot be joined with its counterpart it is removed.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvik.errors import ImageError, InvalidArgument, OperationInvalid
from kvik.image.base import Image
from kvik.image.qcow2.bitmap_changes import BitmapChanges
from kvik.image.qcow2.bitmaps import AUTO, IN_USE, Bitmap
from kvik.image.qcow2.reader import Qcow2Reader
from kvik.image.qcow2.writer import Qcow2Writer

__all__ = ["go_on", "join_back", "join_forward", "remove_all"]


def _all(image: Image) -> dict[str, Bitmap]:
    """None where their directory is damaged: nobody relies on them then."""
    try:
        return {bitmap.name: bitmap for bitmap in image.bitmaps} if isinstance(image, Qcow2Reader) else {}
    except ImageError:
        return {}


def _true(image: Image) -> dict[str, Bitmap]:
    """Those that have recorded every write since they were added."""
    return {name: one for name, one in _all(image).items() if one.flags & AUTO and not one.flags & IN_USE}


def go_on(image: Qcow2Writer, below: Image) -> None:
    """The bitmaps of `below` record on in the new, empty image on top of it, from nothing."""
    found = _true(below)
    if not found:
        return
    changes = BitmapChanges(image)
    for name, bitmap in found.items():
        changes.add(name, bitmap.granularity)
    changes.store()


def join_forward(image: Qcow2Writer, below: Image, tracked: Mapping[str, bool]) -> None:
    """The data of `below` is about to be copied into `image`, which rests on it. `tracked`: bitmaps that somebody asks
    for, and whether its tracking began in `image`: then `below` has nothing to tell of it."""
    mine, theirs = _true(image), _true(below)
    changes, changed = BitmapChanges(image), False
    for name in mine:
        if tracked.get(name, True):
            continue
        changed = True
        try:
            if isinstance(below, Qcow2Reader) and name in theirs:
                changes.merge(name, name, below)
            else:
                changes.remove(name)
        except (InvalidArgument, OperationInvalid, ImageError):  # of another size, or damaged
            changes.remove(name)
    if changed:
        changes.store()


def join_back(image: Qcow2Writer, top: Image, tracked: Mapping[str, bool]) -> None:
    """The data of `top` was written into `image`, on which it rests: `image`'s own bitmaps have recorded that. Those
    whose tracking began in `top` (`tracked`) it does not have yet."""
    mine, theirs = _all(image), _true(top)
    new = [name for name in theirs if tracked.get(name, False) and name not in mine]
    if not new or image.header.version < 3 or not isinstance(top, Qcow2Reader) or top.header.size != image.header.size:
        return
    changes = BitmapChanges(image)
    for name in new:
        changes.add(name, theirs[name].granularity)
        changes.merge(name, name, top)
    changes.store()


def remove_all(image: Qcow2Writer) -> None:
    """The image is about to show something else at once, which no bitmap records."""
    found = list(image.bitmaps)
    if not found:
        return
    changes = BitmapChanges(image)
    for bitmap in found:
        changes.remove(bitmap.name)
    changes.store()
