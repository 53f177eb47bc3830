"""Persistent dirty bitmaps: the directory, tables and data, read with every bound checked.

Reference: QEMU's docs/interop/qcow2.rst, "Bitmaps extension" and "Bitmaps"; names, granularities and numbers are
bounded as in QEMU.
"""

from __future__ import annotations

import os
import struct
from array import array

from kvik.image.qcow2.header import AUTOCLEAR_BITMAPS, MAX_NAME
from kvik.image.qcow2.tables import OFFSET, read_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.image.qcow2.reader import Qcow2Reader

__all__ = ["AUTO", "IN_USE", "Bitmap", "pack_directory", "read_bits", "read_directory"]

IN_USE, AUTO, EXTRA_COMPATIBLE = 1, 2, 4
DIRTY_TRACKING = 1
_ENTRY = struct.Struct(">QIIBBHI")  # 24 bytes
MAX_TABLE = 8 << 20  # bytes of one bitmap's table
MAX_BITS = 64 << 20  # bytes of one bitmap that are held in memory


class Bitmap:
    """One entry of the directory."""

    __slots__ = ("extra", "flags", "granularity_bits", "name", "table_offset", "table_size", "type")

    def __init__(
        self,
        name: str,
        *,
        granularity_bits: int = 16,
        flags: int = AUTO,
        table_offset: int = 0,
        table_size: int = 0,
        type: int = DIRTY_TRACKING,
        extra: bytes = b"",
    ) -> None:
        self.name = name
        self.granularity_bits = granularity_bits
        self.flags = flags
        self.table_offset = table_offset
        self.table_size = table_size
        self.type = type
        self.extra = extra

    @property
    def granularity(self) -> int:
        """Bytes of the disk that one bit stands for."""
        return 1 << self.granularity_bits

    def flag_names(self) -> list[str]:
        """As QEMU's BitmapFlags names them."""
        return [name for bit, name in ((IN_USE, "in-use"), (AUTO, "auto")) if self.flags & bit]

    def bytes_needed(self, size: int) -> int:
        """Bytes of bitmap for a disk of `size` bytes."""
        bits = (size + self.granularity - 1) >> self.granularity_bits
        return (bits + 7) >> 3

    def pack(self) -> bytes:
        name = os.fsencode(self.name)
        data = _ENTRY.pack(
            self.table_offset,
            self.table_size,
            self.flags,
            self.type,
            self.granularity_bits,
            len(name),
            len(self.extra),
        )
        data += self.extra + name
        return data + bytes(-len(data) % 8)


def pack_directory(bitmaps: list[Bitmap]) -> bytes:
    return b"".join(bitmap.pack() for bitmap in bitmaps)


def read_directory(image: Qcow2Reader) -> list[Bitmap]:
    """Empty where the extension is absent, or is marked as not consistent."""
    header = image.header
    if header.bitmaps is None or not header.autoclear & AUTOCLEAR_BITMAPS:
        return []
    number, size, start = header.bitmaps
    data = os.pread(image.fd, size, start)
    if len(data) < size:
        raise image.fault("the bitmap directory is outside the file", start)
    found: list[Bitmap] = []
    names: set[str] = set()
    at = 0
    for index in range(number):
        if at + _ENTRY.size > size:
            raise image.fault(f"entry {index} of the bitmap directory is cut off", start + at)
        offset, entries, flags, kind, bits, name_size, extra_size = _ENTRY.unpack_from(data, at)
        begin = at + _ENTRY.size
        end = begin + extra_size + name_size
        if end > size:
            raise image.fault(f"entry {index} of the bitmap directory is cut off", start + at)
        name = os.fsdecode(data[begin + extra_size : end])
        if (
            not 0 < name_size <= MAX_NAME
            or not 9 <= bits <= 31
            or kind != DIRTY_TRACKING
            or flags & ~(IN_USE | AUTO | EXTRA_COMPATIBLE)
            or entries * 8 > MAX_TABLE
            or offset & (header.cluster_size - 1)
            or name in names
        ):
            raise image.fault(f"entry {index} of the bitmap directory is out of bounds", start + at)
        names.add(name)
        found.append(
            Bitmap(
                name,
                granularity_bits=bits,
                flags=flags,
                table_offset=offset,
                table_size=entries,
                type=kind,
                extra=data[begin : begin + extra_size],
            )
        )
        at = (end + 7) & ~7
    if at != size:
        raise image.fault("the bitmap directory's size is not that of its entries", start)
    return found


def bitmap_table(image: Qcow2Reader, bitmap: Bitmap) -> array[int]:
    """The clusters of one bitmap's data; `ImageError` for entries that cannot be."""
    table = read_table(image.fd, image.path, bitmap.table_offset, bitmap.table_size, "bitmap table")
    for index, entry in enumerate(table):
        if entry & ~(OFFSET | 1) or entry & OFFSET & (image.cluster_size - 1) or (entry & OFFSET and entry & 1):
            raise image.fault(
                f"an entry of the table of bitmap {bitmap.name!r} is damaged", bitmap.table_offset + 8 * index
            )
    return table


def read_bits(image: Qcow2Reader, bitmap: Bitmap) -> bytearray:
    """The bits of a bitmap, least significant first; the disk's size decides how many."""
    needed = bitmap.bytes_needed(image.header.size)
    size = image.cluster_size
    if needed > MAX_BITS:
        raise image.fault(f"the bitmap {bitmap.name!r} has more bits than are held in memory", bitmap.table_offset)
    table = bitmap_table(image, bitmap)
    if len(table) != (needed + size - 1) // size:
        raise image.fault(f"the bitmap {bitmap.name!r} has not the disk's size", bitmap.table_offset)
    bits = bytearray(needed)
    for index, entry in enumerate(table):
        at = index * size
        count = min(size, needed - at)
        if entry & OFFSET:
            data = os.pread(image.fd, count, entry & OFFSET)
            bits[at : at + len(data)] = data
        elif entry & 1:
            bits[at : at + count] = b"\xff" * count
    return bits
