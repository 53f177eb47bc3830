"""An image read from beginning to end: what has data, in windows of bounded size, and which of it is not zero.

Holes and zeros are skipped by the images' own tables, so the cost is that of the data, whatever the disk's size.
"""

from __future__ import annotations

import os

from kvik.image.base import COMPRESSED, DATA, HOLE, SECTOR, zero

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kvik.image.base import Image

    # kind, offset in the concatenation, offset in its image, length, image, offset in the file
    Part = tuple[int, int, int, int, Image, int]
    ReadFault = Callable[[int, OSError], None]

__all__ = ["WINDOW", "Window", "drop_cached", "fill", "spans", "used", "windows"]

WINDOW = 1 << 20  # bytes: fits in the processor's cache, and makes a system call cheap beside what it copies


class Window:
    """Parts with data between two offsets, in order; or (no parts) a range that is all zero."""

    __slots__ = ("end", "parts", "start")

    def __init__(self, start: int, end: int, parts: list[Part]) -> None:
        self.start = start
        self.end = end
        self.parts = parts


def windows(
    sources: Sequence[Image], size: int, *, own: bool = False, start: int = 0, end: int | None = None
) -> Iterator[Window]:
    """The data of images one after the other, cut at multiples of `size`, and the zeros between.

    With `own`, only what the images' own layers have; what is below them is left out. `start` and `end` are those of a
    part of a single image.
    """
    base = 0
    held: list[Part] = []
    for source in sources:
        for kind, within, length, image, host in source.pieces(start, (end or source.size) - start, own=own):
            at = base + within
            if kind not in (DATA, COMPRESSED):
                if kind != HOLE:
                    yield Window(at, at + length, [])
                continue
            while length:
                stop = (at // size + 1) * size
                count = min(length, stop - at)
                if held and held[0][1] // size != at // size:
                    yield Window(held[0][1], held[-1][1] + held[-1][3], held)
                    held = []
                held.append((kind, at, within, count, image, host))
                at, within, length = at + count, within + count, length - count
                if kind == DATA:
                    host += count
        base += source.size
    if held:
        yield Window(held[0][1], held[-1][1] + held[-1][3], held)


def spans(window: Window, unit: int, end: int) -> list[tuple[int, int]]:
    """(start, end) of the window's data, rounded out to multiples of `unit` up to `end`."""
    found: list[tuple[int, int]] = []
    for _, start, _, length, _, _ in window.parts:
        first, last = start & -unit, min(end, (start + length + unit - 1) & -unit)
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], last
        else:
            found.append((first, last))
    return found


def fill(window: Window, found: list[tuple[int, int]], base: int, buffer: bytearray, salvage: ReadFault | None) -> None:
    """Read what lies in the spans `found` into `buffer`, whose first byte is that of offset `base`.

    With `salvage` sectors that cannot be read are zero, and it is told.
    """
    view = memoryview(buffer)
    at = found[0][0]
    number = 0
    for kind, start, within, length, image, host in window.parts:
        while start >= found[number][1]:
            zero(view[at - base : found[number][1] - base])
            number += 1
            at = found[number][0]
        if at < start:
            zero(view[at - base : start - base])
        at = start + length
        part = view[start - base : at - base]
        try:
            image.read_piece(kind, within, host, part)
        except OSError as error:
            if salvage is None:
                error.filename = error.filename or image.path
                raise
            _salvage((kind, start, within, length, image, host), part, salvage, error)
    zero(view[at - base : found[-1][1] - base])


def _salvage(part: Part, view: memoryview, salvage: ReadFault, error: OSError) -> None:
    """A part again, sector by sector."""
    kind, start, within, _, image, host = part
    if kind == COMPRESSED:
        zero(view)
        salvage(start, error)
        return
    for at in range(0, len(view), SECTOR):
        sector = view[at : at + SECTOR]
        try:
            image.read_piece(kind, within + at, host + at, sector)
        except OSError as failed:
            zero(sector)
            salvage(start + at, failed)


_ZEROS: dict[int, bytes] = {}


def used(buffer: bytearray, start: int, end: int, unit: int) -> Iterator[tuple[int, int, bool]]:
    """(start, end, whether there is anything but zeros) of a part of a buffer, by aligned units."""
    zeros = _ZEROS.get(unit)
    if zeros is None:
        zeros = _ZEROS[unit] = bytes(unit)
    starts_with = buffer.startswith  # compares in C, and only up to the first difference
    edge = start + -start % unit
    firsts = buffer[edge:end:unit]  # a unit of zeros begins with one: that byte says of nearly all data that it is some
    begin = at = start
    blank = False
    while at < end:
        if at >= edge:
            number = firsts.find(0, (at - edge) // unit)
            candidate = edge + number * unit if number >= 0 else end
            if candidate > at:
                if blank:
                    yield begin, at, False
                    begin, blank = at, False
                at = candidate
                continue
        stop = min((at & -unit) + unit, end)
        is_zero = starts_with(zeros if stop - at == unit else zeros[: stop - at], at)
        if is_zero is not blank:
            if at > begin:
                yield begin, at, not blank
            begin, blank = at, is_zero
        at = stop
    yield begin, end, not blank


def drop_cached(images: Iterable[Image]) -> None:
    """The page cache forgets the images' data, as far as it is on disk."""
    for image in images:
        for layer in image.chain():
            os.posix_fadvise(layer.data_fd, 0, 0, os.POSIX_FADV_DONTNEED)
