"""Several layers of a chain seen as one, and where two chains differ: what commit and rebase are made of."""

from __future__ import annotations

from kvik.image.base import DATA_HOLE, HOLE, ZERO, ZERO_ALLOCATED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvik.image.base import Image

    # (bytes done, bytes in all)
    Progress = Callable[[int, int], None]
    Part = tuple[int, int, bool]

__all__ = ["CHUNK", "differences", "identity", "own_parts", "zero_parts"]

CHUNK = 1 << 20  # bytes held at once


def identity(image: Image) -> tuple[int, int]:
    """What tells the image's file from every other."""
    import os

    status = os.fstat(image.fd)
    return status.st_dev, status.st_ino


def own_parts(image: Image, layers: int, offset: int, length: int) -> Iterator[Part]:
    """(start, length, reads as zero) of what the upper `layers` images of a chain decide, in order.

    A layer that is shorter than the one above it decides what lies behind its end: zeros.
    """
    for kind, start, size, _ in image.runs(offset, length):
        if kind != HOLE:
            yield start, size, kind in (ZERO, ZERO_ALLOCATED, DATA_HOLE)
            continue
        below = image._backing_of(start) if layers > 1 else None
        if below is None:
            continue
        there = max(0, min(size, below.size - start))
        if there:
            yield from own_parts(below, layers - 1, start, there)
        if there < size:
            yield start + there, size - there, True


def zero_parts(image: Image | None, offset: int, length: int) -> Iterator[Part]:
    """(start, length, is known to read as zero) of a range, through the chain; no image at all is zero, too."""
    inside = 0 if image is None else max(0, min(length, image.size - offset))
    if image is not None and inside:
        for extent in image.map(offset, inside):
            yield extent.start, extent.length, extent.zero
    if inside < length:
        yield offset + inside, length - inside, True


def differences(old: Image | None, new: Image | None, offset: int, length: int, unit: int) -> Iterator[Part]:
    """(start, length, `old` reads as zero) of the parts of a range where two chains read differently; `unit` is the
    grain, a power of two."""
    theirs = zero_parts(new, offset, length)
    there, upto, empty = offset, offset, True
    for start, size, zero in zero_parts(old, offset, length):
        at, end = start, start + size
        while at < end:
            while at >= upto:
                there, rest, empty = next(theirs)
                upto = there + rest
            stop = min(end, upto)
            if not (zero and empty):
                for first in range(at & -CHUNK, stop, CHUNK):
                    begin, last = max(at, first), min(stop, first + CHUNK)
                    yield from _compare((old, new), begin, last - begin, zero, unit)
            at = stop


def _compare(
    pair: tuple[Image | None, Image | None], offset: int, length: int, zero: bool, unit: int
) -> Iterator[Part]:
    ours, others = (read_padded(image, offset, length) for image in pair)
    if ours == others:
        return
    ours_view, others_view = memoryview(ours), memoryview(others)
    begin = -1
    for first in range(offset & -unit, offset + length, unit):
        low, high = max(first, offset), min(first + unit, offset + length)
        if ours_view[low - offset : high - offset] != others_view[low - offset : high - offset]:
            begin = low if begin < 0 else begin
        elif begin >= 0:
            yield begin, low - begin, zero
            begin = -1
    if begin >= 0:
        yield begin, offset + length - begin, zero


def read_padded(image: Image | None, offset: int, length: int) -> bytes:
    """What is read there; behind the image's end zeros."""
    inside = 0 if image is None else max(0, min(length, image.size - offset))
    data = image.read(offset, inside) if image is not None and inside else b""
    return data if inside == length else data + bytes(length - inside)
