"""L1 and L2 tables: 64-bit big-endian entries in arrays of the host's order, L2 tables in a bounded cache.

Reference: QEMU's docs/interop/qcow2.rst, "Cluster mapping" and "Extended L2 Entries".
"""

from __future__ import annotations

import os
import sys
from array import array

from kvik.errors import ImageError
from kvik.image.base import write_fully

__all__ = [
    "COMPRESSED_FLAG",
    "COPIED",
    "OFFSET",
    "ZERO_FLAG",
    "L2Cache",
    "read_table",
    "run_end",
    "write_table",
    "zero_end",
]

OFFSET = 0x00FF_FFFF_FFFF_FE00  # bits 9 to 55
COPIED = 1 << 63
COMPRESSED_FLAG = 1 << 62
ZERO_FLAG = 1

CACHE_BYTES = 16 << 20
_SWAP = sys.byteorder == "little"


def read_table(fd: int, path: str, offset: int, entries: int, what: str) -> array[int]:
    """`entries` of 64 bits at `offset`; `ImageError` if they are not all in the file."""
    if offset >= 1 << 62:
        raise ImageError(f"the {what} is outside the file", file=path, offset=offset)
    data = os.pread(fd, entries * 8, offset)
    while len(data) < entries * 8:
        more = os.pread(fd, entries * 8 - len(data), offset + len(data))
        if not more:
            raise ImageError(f"the {what} is outside the file", file=path, offset=offset)
        data += more
    table = array("Q")
    table.frombytes(data)
    if _SWAP:
        table.byteswap()
    return table


def write_table(fd: int, offset: int, table: array[int]) -> None:
    """The whole table, without changing it."""
    if _SWAP:
        table = table[:]
        table.byteswap()
    write_fully(fd, memoryview(table).cast("B"), offset)


BLOCK = 512  # entries that are looked at together
_ONES = sum(1 << (64 * i) for i in range(BLOCK))
_RAMPS: dict[int, int] = {}


def run_end(table: array[int], index: int, end: int, size: int) -> int:
    """The index behind the entries from `index` on whose clusters of `size` bytes follow each other.

    Long runs are compared by blocks, as one number each: a full table has thousands of entries and there are thousands
    of tables.
    """
    expected = table[index] + size
    index += 1
    singly = index + 8  # short runs are not worth more
    while index < end:
        if index >= singly and index + BLOCK <= end and _SWAP:
            ramp = _RAMPS.get(size)
            if ramp is None:
                ramp = _RAMPS[size] = sum(i * size << (64 * i) for i in range(BLOCK))
            if expected + BLOCK * size < 1 << 64 and table[index : index + BLOCK].tobytes() == (
                expected * _ONES + ramp
            ).to_bytes(BLOCK * 8, "little"):
                index += BLOCK
                expected += BLOCK * size
                continue
            singly = index + BLOCK
        if table[index] != expected:
            break
        expected += size
        index += 1
    return index


_ZEROS = array("Q", bytes(BLOCK * 8))


def zero_end(table: array[int], index: int, end: int) -> int:
    """The index behind the entries from `index` on that are 0."""
    while index < end and not table[index]:
        if index + BLOCK <= end and table[index : index + BLOCK] == _ZEROS:
            index += BLOCK
            continue
        stop = min(end, index + BLOCK)
        while index < stop and not table[index]:
            index += 1
    return index


class L2Cache:
    """The L2 tables used last, by their offsets. Dirty ones stay until `clean` is called after they were written."""

    def __init__(self, fd: int, path: str, cluster_size: int) -> None:
        self._fd = fd
        self._path = path
        self._size = cluster_size
        self._tables: dict[int, array[int]] = {}
        self._limit = max(4, CACHE_BYTES // cluster_size)
        self.dirty: set[int] = set()

    def get(self, offset: int) -> array[int]:
        table = self._tables.get(offset)
        if table is None:
            if offset & (self._size - 1):
                raise ImageError("an L2 table is not at a cluster's start", file=self._path, offset=offset)
            table = read_table(self._fd, self._path, offset, self._size >> 3, "L2 table")
            self.put(offset, table)
        elif len(self._tables) > 1:
            self._tables[offset] = self._tables.pop(offset)  # the dictionary's order is that of use
        return table

    def put(self, offset: int, table: array[int]) -> None:
        if len(self._tables) >= self._limit:
            victim = next((key for key in self._tables if key not in self.dirty), None)
            if victim is not None:
                del self._tables[victim]
        self._tables[offset] = table

    @property
    def crowded(self) -> bool:
        """Whether so many are dirty that they should be written."""
        return len(self.dirty) * 2 >= self._limit

    def forget(self, offset: int) -> None:
        self._tables.pop(offset, None)
        self.dirty.discard(offset)

    def clear(self) -> None:
        self._tables.clear()
        self.dirty.clear()

    def write_dirty(self) -> None:
        for offset in sorted(self.dirty):
            write_table(self._fd, offset, self._tables[offset])
        self.dirty.clear()
