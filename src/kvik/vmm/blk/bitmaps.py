"""The dirty bitmaps of the disk's images, while it is served: what of it was written since a checkpoint.

Those of the image on top record (`image/qcow2/tracking`). On disk they count as in use from the first write on until
the image is closed, so that one that a killed process did not write is known for what it is. To add or remove one, all
are written into the image first, and record on from there.
"""

from __future__ import annotations

import os

from kvik.errors import ImageError, InvalidArgument, OperationInvalid
from kvik.image.opening import open_image
from kvik.image.qcow2.bitmap_changes import BitmapChanges, runs_of_bits
from kvik.image.qcow2.bitmaps import AUTO, IN_USE, read_bits
from kvik.image.qcow2.reader import Qcow2Reader
from kvik.image.qcow2.tracking import set_bits
from kvik.image.qcow2.writer import Qcow2Writer
from kvik.vmm.blk.chain import check_can_open

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from kvik.image.base import Image
    from kvik.image.qcow2.bitmaps import Bitmap
    from kvik.vmm.backends.block import BlockImage

    Source = tuple[int, str]  # the image's place from the top down, and the bitmap's name

__all__ = [
    "add",
    "count",
    "finest",
    "go_on",
    "marked",
    "merge",
    "merge_below",
    "merge_into",
    "remove",
    "remove_below",
    "report",
]


class Known:
    """A bitmap as it is now: `recorded` in memory, or as it is stored in `image`."""

    def __init__(self, image: Qcow2Reader, bitmap: Bitmap, recorded: bytearray | None = None) -> None:
        self.bitmap, self._image, self._recorded = bitmap, image, recorded
        self.inconsistent = recorded is None and bool(bitmap.flags & IN_USE)

    @property
    def usable(self) -> bool:
        return bool(self.bitmap.flags & AUTO) and not self.inconsistent

    def bits(self) -> bytearray:
        return self._recorded if self._recorded is not None else read_bits(self._image, self.bitmap)


def _chain(image: BlockImage) -> list[Image]:
    inner: Image | None = getattr(image, "image", None)
    return inner.chain() if inner is not None else []


def _recording(image: Qcow2Reader) -> list[Known]:
    """Of the image on top: those that record are in memory, and more is known of them than the file says."""
    tracking = image.tracking if isinstance(image, Qcow2Writer) else None
    live = {bitmap.name: bits for bitmap, bits in tracking.bits} if tracking is not None else {}
    every = tracking.bitmaps if tracking is not None else image.bitmaps
    return [Known(image, bitmap, live.get(bitmap.name)) for bitmap in every]


def _known(image: Image, *, top: bool) -> list[Known]:
    """Empty where there are none, and where their directory is damaged: nobody relies on them then."""
    if not isinstance(image, Qcow2Reader):
        return []
    try:
        return _recording(image) if top else [Known(image, bitmap) for bitmap in image.bitmaps]
    except ImageError:
        return []


def _layers(image: BlockImage) -> list[list[Known]]:
    chain = _chain(image)
    for below in chain[1:]:
        _look_again(below)
    return [_known(one, top=not number) for number, one in enumerate(chain)]


def _look_again(image: Image) -> None:
    """Bitmaps of an image that is only read change when it comes to lie below another, and when one is removed."""
    if isinstance(image, Qcow2Reader):
        fresh = Qcow2Reader(os.dup(image.fd), image.path)
        image.header.bitmaps, image.header.autoclear = fresh.header.bitmaps, fresh.header.autoclear
        fresh.close()


def report(image: BlockImage) -> list[list[dict[str, Any]]]:
    """Of each image from the top down."""
    return [[_told(known) for known in layer] for layer in _layers(image)]


def _told(known: Known) -> dict[str, Any]:
    bitmap = known.bitmap
    told = {
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "recording": bool(bitmap.flags & AUTO),
        "persistent": True,
        "inconsistent": known.inconsistent,
        "count": 0,
    }
    if not known.inconsistent:
        told["count"] = int.from_bytes(known.bits(), "little").bit_count() << bitmap.granularity_bits
    return told


def _top(image: BlockImage) -> Qcow2Writer:
    inner = getattr(image, "image", None)
    if not isinstance(inner, Qcow2Writer):
        raise OperationInvalid(
            f"{image.name}: only a qcow2 image that is written to can keep a bitmap",
            remedy="convert it: kvik img convert -O qcow2",
        )
    return inner


def add(image: BlockImage, names: Iterable[str], granularity: int | None = None) -> None:
    """Bitmaps of the image on top, that record all that is written from now on: all or none. The device's lock is
    held, and nothing is in flight. Raises `KvikError`, OSError."""

    def change(changes: BitmapChanges) -> None:
        for name in names:
            changes.add(name, granularity)

    _change(image, change)


def remove(image: BlockImage, name: str) -> None:
    """Of the image on top, under the same conditions; nothing happens where there is none of that name."""
    top = _top(image)
    if any(known.bitmap.name == name for known in _known(top, top=True)):
        _change(image, lambda changes: changes.remove(name))


def _change(image: BlockImage, change: Callable[[BitmapChanges], None]) -> None:
    top = _top(image)
    top.store_bitmaps()
    changes = BitmapChanges(top)
    change(changes)
    changes.store()


def _open_below(image: BlockImage, layer: int, fd: int) -> Qcow2Writer:
    """An image further down, of which `fd`, which is taken over, is a descriptor for writing."""
    chain = _chain(image)
    try:
        if not 0 < layer < len(chain) or not isinstance(chain[layer], Qcow2Reader):
            raise InvalidArgument(f"disk {image.name} has no image {layer} with bitmaps")
        if not os.path.sameopenfile(fd, chain[layer].fd):
            raise InvalidArgument(f"disk {image.name}: {chain[layer].path} is another file by now")
        check_can_open(fd, chain[layer].path)
        below = open_image(fd, format="qcow2", writable=True, path=chain[layer].path)
        assert isinstance(below, Qcow2Writer)
        return below
    except BaseException:
        os.close(fd)
        raise


def remove_below(image: BlockImage, layer: int, fd: int, name: str) -> None:
    with _open_below(image, layer, fd) as below:
        if any(bitmap.name == name for bitmap in below.bitmaps):
            changes = BitmapChanges(below)
            changes.remove(name)
            changes.store()


def merge_below(image: BlockImage, sources: Iterable[int], layer: int, fd: int) -> None:
    """What the bitmaps of these images mark is marked by those of image `layer` as well, which gets those that it does
    not have. `fd`: as of `_open_below`; -1 for an image that a job writes to, when nothing is in flight. All or none:
    raises `OperationInvalid` where one of them is not true."""
    chain = _chain(image)
    written = chain[layer] if 0 < layer < len(chain) else None
    if fd < 0 and isinstance(written, Qcow2Writer):  # a job writes to it
        written.store_bitmaps()
        merge_into(written, [chain[source] for source in sources if source < layer])
        return
    with _open_below(image, layer, fd) as below:
        merge_into(below, [chain[source] for source in sources if source < layer])


def merge_into(below: Qcow2Writer, sources: list[Image]) -> None:
    """What the bitmaps of `sources` mark is marked by those of `below`, which gets those that it does not have. Nobody
    else works on any of them. All or none, as `merge_below`."""
    changes, known = BitmapChanges(below), {bitmap.name for bitmap in below.bitmaps}
    for above in sources:
        if not isinstance(above, Qcow2Reader):
            continue
        if isinstance(above, Qcow2Writer):
            above.store_bitmaps()
        else:
            _look_again(above)
        for bitmap in above.bitmaps:
            if bitmap.name not in known:
                changes.add(bitmap.name, bitmap.granularity)
                known.add(bitmap.name)
            changes.merge(bitmap.name, bitmap.name, above)
    changes.store()


def merge(image: BlockImage, sources: Iterable[int]) -> None:
    """What the bitmaps of these images further down mark is marked by those of the same names that record. All or none:
    raises `OperationInvalid` where one of them is not true."""
    top = _top(image)
    top.begin()
    if top.tracking is None:
        return
    layers = _layers(image)
    below = [known for layer in sources if layer < len(layers) for known in layers[layer]]
    found: list[tuple[bytearray, int, int]] = []
    for bitmap, bits in top.tracking.bits:
        shift = bitmap.granularity_bits
        for known in below:
            if known.bitmap.name != bitmap.name:
                continue
            if known.inconsistent:
                raise OperationInvalid(f"disk {image.name}: bitmap '{bitmap.name}' below it tells not all that changed")
            runs = runs_of_bits(known.bits(), known.bitmap.granularity_bits)
            found += [(bits, start >> shift, ((end - 1) >> shift) + 1) for start, end in runs]
    for bits, first, end in found:
        set_bits(bits, first, end)


def marked(image: BlockImage, sources: Iterable[Source], shift: int, size: int) -> bytearray:
    """A bit for each 2 to the power of `shift` bytes of the disk that any of these bitmaps marks. Raises
    `OperationInvalid` where one of them is not there, or not true."""
    layers = _layers(image)
    bits = bytearray((((size + (1 << shift) - 1) >> shift) + 7) >> 3)
    for layer, name in sources:
        found = [known for known in (layers[layer] if layer < len(layers) else []) if known.bitmap.name == name]
        if not found or not found[0].usable:
            raise OperationInvalid(f"disk {image.name}: bitmap '{name}' of image {layer} tells not all that changed")
        for start, end in runs_of_bits(found[0].bits(), found[0].bitmap.granularity_bits):
            end = min(end, size)
            if start < end:
                set_bits(bits, start >> shift, ((end - 1) >> shift) + 1)
    return bits


def finest(image: BlockImage, sources: Iterable[Source], most: int) -> int:
    """The least granularity of these bitmaps, as a power of 2, and `most` at most."""
    layers = _layers(image)
    found = [
        known.bitmap.granularity_bits
        for layer, name in sources
        for known in (layers[layer] if layer < len(layers) else [])
        if known.bitmap.name == name
    ]
    return min([*found, most])


def count(image: BlockImage, sources: Iterable[Source], shift: int) -> int:
    """How many bytes of the disk they mark."""
    return int.from_bytes(marked(image, sources, shift, image.size), "little").bit_count() << shift


def go_on(new: Image, old: BlockImage) -> None:
    """The bitmaps that record in `old` do so in the new, empty image that is about to be put on top of it."""
    chain = _chain(old)
    usable = [known.bitmap for known in (_known(chain[0], top=True) if chain else []) if known.usable]
    if not usable or not isinstance(new, Qcow2Writer):
        return
    changes = BitmapChanges(new)
    for bitmap in usable:
        changes.add(bitmap.name, bitmap.granularity)
    try:
        changes.store()
    except OSError as error:
        raise ImageError(f"its bitmaps cannot be written: {error.strerror}", file=new.path) from error
