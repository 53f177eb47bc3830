"""Keeping persistent bitmaps true while an image is written: what is written is marked in every enabled bitmap.

From the first write on the bitmaps count as in use on disk, that is as inconsistent, until they are stored when the
image is closed; so power lost in between never leaves a bitmap that lacks a write. Reference: QEMU's
docs/interop/qcow2.rst, "Dirty tracking bitmaps".
"""

from __future__ import annotations

import os

from kvik.image.base import write_fully
from kvik.image.qcow2.bitmaps import (
    AUTO,
    IN_USE,
    MAX_BITS,
    Bitmap,
    bitmap_table,
    pack_directory,
    read_bits,
    read_directory,
)
from kvik.image.qcow2.tables import OFFSET, write_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.image.qcow2.allocator import Qcow2Allocator

__all__ = ["Tracking", "first_bit", "set_bits", "store_bits"]


class Tracking:
    """The enabled bitmaps of one image that is being written."""

    def __init__(self, image: Qcow2Allocator) -> None:
        self._image = image
        self.bitmaps = read_directory(image)
        self.bits: list[tuple[Bitmap, bytearray]] = []
        room = MAX_BITS // 2
        for bitmap in self.bitmaps:
            if not bitmap.flags & AUTO or bitmap.flags & IN_USE:
                continue
            needed = bitmap.bytes_needed(image.header.size)
            if needed <= room:  # else it stays marked as inconsistent
                room -= needed
                self.bits.append((bitmap, read_bits(image, bitmap)))
            bitmap.flags |= IN_USE
        self.write_directory()
        image.barrier()

    def write_directory(self) -> None:
        assert self._image.header.bitmaps is not None
        _, size, offset = self._image.header.bitmaps
        data = pack_directory(self.bitmaps)
        assert len(data) == size
        write_fully(self._image.fd, data, offset)

    def mark(self, offset: int, length: int) -> None:
        for bitmap, bits in self.bits:
            first = offset >> bitmap.granularity_bits
            last = (offset + length - 1) >> bitmap.granularity_bits
            set_bits(bits, first, last + 1)

    def store(self) -> None:
        """The bits into the file, then the flags."""
        for bitmap, bits in self.bits:
            store_bits(self._image, bitmap, bits)
        self._image.write_back()
        self._image.barrier()
        for bitmap, _ in self.bits:
            bitmap.flags &= ~IN_USE
        self.write_directory()
        self._image.barrier()


def set_bits(bits: bytearray, first: int, end: int) -> None:
    """Set the bits `first` to `end` - 1, least significant first."""
    end = min(end, len(bits) * 8)
    if first >= end:
        return
    low, high = first >> 3, (end - 1) >> 3
    start = 0xFF << (first & 7) & 0xFF
    stop = 0xFF >> (7 - ((end - 1) & 7))
    if low == high:
        bits[low] |= start & stop
        return
    bits[low] |= start
    bits[low + 1 : high] = b"\xff" * (high - low - 1)
    bits[high] |= stop


def first_bit(bits: bytearray, start: int = 0) -> int:
    """The first bit that is set from byte `start` on; -1: none is. A disk of 1 TiB has two million bytes of them: they
    are looked at a page at a time, and the next one is most often at once there."""
    for page in range(start, len(bits), 4096):
        rest = bits[page : page + 4096].lstrip(b"\0")
        if rest:
            at = min(page + 4096, len(bits)) - len(rest)
            return at * 8 + (rest[0] & -rest[0]).bit_length() - 1
    return -1


def store_bits(image: Qcow2Allocator, bitmap: Bitmap, bits: bytearray) -> None:
    """The data of a bitmap whose table is as long as it must be; clusters are found as they are needed."""
    table = bitmap_table(image, bitmap)
    size = image.cluster_size
    for index, entry in enumerate(table):
        part = bits[index * size : (index + 1) * size]
        place = entry & OFFSET
        if not place and not any(part):
            table[index] = 0
            continue
        if not place:
            place = table[index] = image.allocate(1)
        write_fully(image.fd, part + bytes(size - len(part)), place)
    image.write_back()
    if image.barriers:
        os.fdatasync(image.fd)
    write_table(image.fd, bitmap.table_offset, table)
