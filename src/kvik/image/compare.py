"""Whether two disk images hold the same data, as `qemu-img compare` decides it."""

from __future__ import annotations

import os

from kvik.image.base import COMPRESSED, DATA, SECTOR, zero
from kvik.image.pipeline import in_order
from kvik.image.windows import WINDOW

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvik.image.base import Extent, Image, Piece

    Progress = Callable[[int, int], None]
    # offset, length, what each has there (None: zeros)
    Pair = tuple[int, int, Piece | None, Piece | None]

__all__ = ["Difference", "compare"]

MOST_WORKERS = 2
CONTENT, SIZE, STATUS = "content", "size", "status"


class Difference:
    """The first difference: its kind, and the offset of the sector (`content`) or extent (`status`) it is in."""

    __slots__ = ("kind", "offset")

    def __init__(self, kind: str, offset: int = 0) -> None:
        self.kind = kind
        self.offset = offset


def compare(
    first: Image,
    second: Image,
    *,
    strict: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    sizes_differ: Callable[[], None] | None = None,
) -> Difference | None:
    """The first difference, None where there is none. What the longer image has more must be zero.

    `strict`: sizes and what is allocated must be the same, too. `sizes_differ` is called when the part that both have
    was found the same and the sizes are not. `workers` are threads that read (None: as many as are of
    use here). Raises `ImageError`, `OSError`.
    """
    if workers is None:
        workers = MOST_WORKERS if len(os.sched_getaffinity(0)) > 1 else 0
    if strict and first.size != second.size:
        return Difference(SIZE)
    common, total = min(first.size, second.size), max(first.size, second.size)
    if strict and (found := _status(first, second, common)) is not None:
        # What comes before it may differ in content, which is told first.
        return _content(first, second, range(found), workers, progress) or Difference(STATUS, found)
    difference = _content(first, second, range(common), workers, progress)
    if difference is None and first.size != second.size:
        if sizes_differ is not None:
            sizes_differ()
        difference = _content(first, second, range(common, total), workers, progress)
    return difference


def _status(first: Image, second: Image, length: int) -> int | None:
    """Where what is allocated begins to differ."""
    others = second.map(0, length)
    other: Extent | None = None
    for one in first.map(0, length):
        at, end = one.start, one.start + one.length
        while at < end:
            if other is None or other.start + other.length <= at:
                other = next(others)
            if _flags(one, length) != _flags(other, length):
                return at
            at = min(end, other.start + other.length)
    return None


def _flags(one: Extent, size: int) -> tuple[bool, ...]:
    """What QEMU's block status says; that an extent is the last one is part of it."""
    return one.present, one.zero, one.data, one.offset is not None, one.start + one.length == size


def _content(first: Image, second: Image, part: range, workers: int, progress: Progress | None) -> Difference | None:
    buffers: dict[int, tuple[bytearray, bytearray]] = {}

    def differs(pair: Pair, slot: int) -> int:
        """Offset of the first sector that is not the same; -1: none."""
        if slot not in buffers:
            buffers[slot] = bytearray(WINDOW), bytearray(WINDOW)
        one, other = buffers[slot]
        offset, length, left, right = pair
        _read(left, offset, length, one)
        _read(right, offset, length, other)
        if length == WINDOW:
            if one == other:
                return -1
        elif other.startswith(memoryview(one)[:length]):
            return -1
        return next(
            offset + at
            for at in range(0, length, SECTOR)
            if one[at : min(length, at + SECTOR)] != other[at : min(length, at + SECTOR)]
        )

    for pair, found in in_order(_pairs(first, second, part.start, part.stop), differs, workers, 2 * workers):
        if found >= 0:
            return Difference(CONTENT, found)
        if progress is not None:
            progress(pair[0] + pair[1], max(first.size, second.size))
    if progress is not None:
        progress(part.stop, max(first.size, second.size))
    return None


def _read(piece: Piece | None, offset: int, length: int, buffer: bytearray) -> None:
    view = memoryview(buffer)[:length]
    if piece is None:
        zero(view)
        return
    kind, start, _, image, host = piece
    image.read_piece(kind, offset, host + offset - start if kind == DATA else host, view)


def _pairs(first: Image, second: Image, start: int, end: int) -> Iterator[Pair]:
    """What of a range must be read, in pieces of at most `WINDOW`."""
    lefts, rights = _data(first, start, end), _data(second, start, end)
    left, right = next(lefts, None), next(rights, None)
    at = start
    while left is not None or right is not None:
        # The nearest piece, and what the other has beside it.
        starts = [max(at, piece[1]) for piece in (left, right) if piece is not None]
        at = min(starts)
        stop = at + WINDOW
        here: list[Piece | None] = []
        for piece in (left, right):
            if piece is None:
                here.append(None)
            elif piece[1] > at:
                stop = min(stop, piece[1])
                here.append(None)
            else:
                stop = min(stop, piece[1] + piece[2])
                here.append(piece)
        yield at, stop - at, here[0], here[1]
        at = stop
        if left is not None and left[1] + left[2] <= at:
            left = next(lefts, None)
        if right is not None and right[1] + right[2] <= at:
            right = next(rights, None)


def _data(image: Image, start: int, end: int) -> Iterator[Piece]:
    end = min(end, image.size)
    if start < end:
        for piece in image.pieces(start, end - start):
            if piece[0] in (DATA, COMPRESSED):
                yield piece
