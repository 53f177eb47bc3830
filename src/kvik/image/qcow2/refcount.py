"""Reference counts of host clusters, of every width from 1 to 64 bits, and the allocation of clusters by them.

Reference: QEMU's docs/interop/qcow2.rst, "Host cluster management". In memory a refcount block is an array with one
element a cluster, whatever its width in the file; changes stay there until `write_blocks` and `write_table`.
"""

from __future__ import annotations

import os
import sys
from array import array

from kvik.errors import ImageError
from kvik.image.base import write_fully
from kvik.image.qcow2.header import MAX_REFCOUNT_TABLE, OFFSET_LIMIT, Header
from kvik.image.qcow2.tables import read_table, write_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Block = bytearray | array[int]

__all__ = ["Refcounts", "pack_block", "unpack_block"]

CACHE_BYTES = 16 << 20
TABLE_OFFSET = 0xFFFF_FFFF_FFFF_FE00  # bits 9 to 63 of a refcount table entry
_CODES = {4: "H", 5: "I", 6: "Q"}
_SWAP = sys.byteorder == "little"


def unpack_block(data: bytes, order: int) -> Block:
    """A refcount block of the file as one element a cluster; `order` is log2 of the width in bits."""
    if order == 3:
        return bytearray(data)
    if order > 3:
        block = array(_CODES[order])
        block.frombytes(data)
        if _SWAP:
            block.byteswap()
        return block
    width, mask, per = 1 << order, (1 << (1 << order)) - 1, 8 >> order
    pieces = [bytes((byte >> (width * i)) & mask for i in range(per)) for byte in range(256)]
    return bytearray(b"".join(map(pieces.__getitem__, data)))


def pack_block(block: Block, order: int) -> bytes:
    """The inverse of `unpack_block`."""
    if order == 3:
        return bytes(block)
    if order > 3:
        assert isinstance(block, array)
        if _SWAP:
            block = block[:]
            block.byteswap()
        return block.tobytes()
    width, per = 1 << order, 8 >> order
    out = bytearray(block[0::per])
    for i in range(1, per):
        shift = width * i
        out = bytearray(low | high << shift for low, high in zip(out, block[i::per], strict=True))
    return bytes(out)


def blank_block(entries: int, order: int) -> Block:
    return bytearray(entries) if order <= 3 else array(_CODES[order], bytes(entries << (order - 3)))


class Refcounts:
    """The refcount table and blocks of one image.

    `write_header` is called when the table has moved, after its new place is on disk; `barrier` flushes the file.
    """

    def __init__(self, fd: int, path: str, header: Header) -> None:
        self._fd = fd
        self._path = path
        self._header = header
        self.order = header.refcount_order
        self.maximum = (1 << (1 << self.order)) - 1
        self.cluster_bits = header.cluster_bits
        self.per_block = header.cluster_size * 8 >> self.order
        size = os.fstat(fd).st_size
        entries = header.refcount_table_clusters << (header.cluster_bits - 3)
        # Entries behind the file's end count as zero, as QEMU reads them.
        inside = max(0, min(entries, (size - header.refcount_table_offset) >> 3)) if size else entries
        self.table = read_table(fd, path, header.refcount_table_offset, inside, "refcount table")
        self.table.frombytes(bytes((entries - inside) * 8))
        self._blocks: dict[int, Block] = {}
        held = header.cluster_size if self.order >= 3 else self.per_block
        self._limit = max(2, CACHE_BYTES // held)
        self._dirty: set[int] = set()
        self._dirty_table: set[int] = set()
        self.hint = 0  # where the search for free clusters begins
        self.may_grow = True  # whether the table may be moved now, which writes
        self.new_blocks: list[int] = []  # clusters that became refcount blocks or tables
        self._pending: list[tuple[int, int]] = []
        self.write_header: Callable[[], None] = lambda: None
        self.barrier: Callable[[], None] = lambda: None
        self.before_write: Callable[[], None] = lambda: None  # blocks that lie where they lay
        self.reserved: Callable[[int, int], bool] = lambda cluster, count: False

    # -- looking

    def block(self, index: int) -> Block | None:
        """The block that has the clusters from `index * per_block` on; None where there is none."""
        block = self._blocks.get(index)
        if block is not None:
            return block
        if index >= len(self.table):
            return None
        offset = self.table[index] & TABLE_OFFSET
        if offset == 0:
            return None
        size = 1 << self.cluster_bits
        if offset & (size - 1):
            raise ImageError("a refcount block is not at a cluster's start", file=self._path, offset=offset)
        data = os.pread(self._fd, size, offset) if offset < 1 << 62 else b""
        if len(data) < size:
            raise ImageError("a refcount block is outside the file", file=self._path, offset=offset)
        block = unpack_block(data, self.order)
        self._keep(index, block)
        return block

    def _keep(self, index: int, block: Block) -> None:
        if len(self._blocks) >= self._limit:
            victim = next((key for key in self._blocks if key not in self._dirty), None)
            if victim is not None:
                del self._blocks[victim]
        self._blocks[index] = block

    @property
    def crowded(self) -> bool:
        return len(self._dirty) * 2 >= self._limit

    def get(self, cluster: int) -> int:
        index, within = divmod(cluster, self.per_block)
        block = self.block(index)
        return 0 if block is None else block[within]

    def used(self) -> Iterator[tuple[int, Block]]:
        """(first cluster, block) of every block there is."""
        for index in range(len(self.table)):
            block = self.block(index)
            if block is not None:
                yield index * self.per_block, block

    def values(self, first: int, count: int) -> Iterator[int]:
        """The refcounts of `count` clusters from `first` on."""
        while count:
            index, within = divmod(first, self.per_block)
            span = min(count, self.per_block - within)
            block = self.block(index)
            yield from bytes(span) if block is None else block[within : within + span]
            first += span
            count -= span

    def end(self) -> int:
        """The cluster behind the last one in use."""
        for index in range(len(self.table) - 1, -1, -1):
            block = self.block(index)
            if block is not None and any(block):
                return index * self.per_block + max(i for i, value in enumerate(block) if value) + 1
        return 0

    # -- changing

    def add(self, cluster: int, count: int, delta: int) -> None:
        """`delta` more (or fewer) references to each of `count` clusters; their blocks must exist."""
        while count:
            index, within = divmod(cluster, self.per_block)
            span = min(count, self.per_block - within)
            block = self.block(index)
            if block is None:
                raise self._fault("a cluster in use has no refcount block", cluster)
            for i in range(within, within + span):
                value = block[i] + delta
                if not 0 <= value <= self.maximum:
                    what = "would fall below 0" if value < 0 else f"would not fit in {1 << self.order} bits"
                    raise self._fault(f"a cluster's refcount {what}", cluster - within + i)
                block[i] = value
            self._dirty.add(index)
            if delta < 0:
                self.hint = min(self.hint, cluster)
            cluster += span
            count -= span

    def claim(self, first: int, count: int) -> None:
        """At least one reference to each of `count` clusters, which lie below the hint. New blocks lie behind it."""
        for cluster in range(first, first + count):
            index, within = divmod(cluster, self.per_block)
            block = self.block(index)
            if block is None:
                place = self.allocate(1)  # which may have made the block, or a table with room for it
                block = self.block(index)
                if block is None:
                    self._new_block(index, place)
                    block = self._blocks[index]
            if not block[within]:
                block[within] = 1
                self._dirty.add(index)

    def set(self, cluster: int, value: int) -> None:
        """The refcount of a cluster, for repairs; its block must exist."""
        index, within = divmod(cluster, self.per_block)
        block = self.block(index)
        if block is None:
            raise self._fault("a cluster has no refcount block", cluster)
        block[within] = value
        self._dirty.add(index)

    def _fault(self, what: str, cluster: int) -> ImageError:
        return ImageError(
            what, file=self._path, offset=cluster << self.cluster_bits, remedy="repair it: kvik img check -r all IMAGE"
        )

    def free_later(self, cluster: int, count: int = 1) -> None:
        """One reference less, once nothing on disk leads there any more (`settle`)."""
        if self._pending and sum(self._pending[-1]) == cluster:
            first, had = self._pending[-1]
            self._pending[-1] = first, had + count
        else:
            self._pending.append((cluster, count))

    @property
    def pending(self) -> bool:
        return bool(self._pending)

    def settle(self) -> list[tuple[int, int]]:
        """Apply what `free_later` was told; the ranges."""
        ranges, self._pending = self._pending, []
        for cluster, count in ranges:
            self.add(cluster, count, -1)
        return ranges

    def allocate(self, count: int) -> int:
        """The first of `count` free clusters in a row, each with one reference now."""
        blocks = 0
        while True:
            start = self._find(count + blocks)
            missing = [
                index
                for index in range(start // self.per_block, (start + count + blocks - 1) // self.per_block + 1)
                if self.block(index) is None
            ]
            if len(missing) > blocks:
                blocks = len(missing)
                continue
            if start + count + blocks > OFFSET_LIMIT >> self.cluster_bits:
                raise ImageError("has no room left: the format's limit is 64 PiB", file=self._path)
            if missing and missing[-1] >= len(self.table):
                self._grow_table(missing[-1] + 1, start + count + blocks)
                blocks = 0
                continue
            break
        if self.reserved(start, count + len(missing)):
            raise self._fault("a cluster that counts as free holds a table", start)
        for number, index in enumerate(missing):
            self._new_block(index, start + count + number)
        self._take(start, count + len(missing))
        self.hint = start + count + len(missing)  # what is free below is found again after something is freed
        return start

    def _take(self, start: int, count: int) -> None:
        """One reference to each of `count` clusters that have none."""
        while count:
            index, within = divmod(start, self.per_block)
            span = min(count, self.per_block - within)
            block = self.block(index)
            assert block is not None
            if isinstance(block, bytearray):
                block[within : within + span] = b"\1" * span
            else:
                block[within : within + span] = array(block.typecode, [1]) * span
            self._dirty.add(index)
            start += span
            count -= span

    def _new_block(self, index: int, cluster: int) -> None:
        self._blocks[index] = blank_block(self.per_block, self.order)
        self._dirty.add(index)
        self.table[index] = cluster << self.cluster_bits
        self._dirty_table.add(index)
        self.new_blocks.append(cluster)

    def _find(self, count: int) -> int:
        """The first of `count` free clusters in a row, from the hint on."""
        self._advance()
        start, free = self.hint, 0
        while free < count:
            index, within = divmod(start + free, self.per_block)
            span = min(count - free, self.per_block - within)
            block = self.block(index)
            if block is None or not any(block[within : within + span]):
                free += span
                continue
            last = max(i for i in range(within, within + span) if block[i])
            start, free = index * self.per_block + last + 1, 0
        return start

    def _advance(self) -> None:
        """Move the hint to the first free cluster."""
        while True:
            index, within = divmod(self.hint, self.per_block)
            block = self.block(index)
            if block is None:
                return
            try:
                self.hint = index * self.per_block + block.index(0, within)
                return
            except ValueError:
                self.hint = (index + 1) * self.per_block

    def _grow_table(self, entries: int, beyond: int) -> None:
        """A bigger refcount table, from the cluster `beyond` the space that is wanted on; the old one is freed."""
        assert self.may_grow
        per_cluster = 1 << (self.cluster_bits - 3)
        old_offset, old_clusters = self._header.refcount_table_offset, self._header.refcount_table_clusters
        # The table has room for what is wanted, for itself, for its blocks, and for half as much again.
        clusters = (max(entries + 2, len(self.table) * 3 // 2) + per_cluster - 1) // per_cluster
        last = -1
        missing: list[int] = []
        while True:
            last = (beyond + clusters + len(missing) - 1) // self.per_block
            found = [i for i in range(beyond // self.per_block, last + 1) if self.block(i) is None]
            needed = (last + 1 + per_cluster - 1) // per_cluster
            if needed <= clusters and len(found) <= len(missing):
                break
            clusters, missing = max(clusters, needed), found
        if clusters << self.cluster_bits > MAX_REFCOUNT_TABLE:
            raise ImageError("has no room left: its refcount table would be bigger than 8 MiB", file=self._path)
        self.table.frombytes(bytes((clusters * per_cluster - len(self.table)) * 8))
        for number, index in enumerate(found):
            self._new_block(index, beyond + clusters + number)
        self._take(beyond, clusters + len(found))
        self.write_blocks()
        self.barrier()
        write_table(self._fd, beyond << self.cluster_bits, self.table)
        self._dirty_table.clear()
        self.barrier()
        self._header.refcount_table_offset = beyond << self.cluster_bits
        self._header.refcount_table_clusters = clusters
        self.write_header()
        self.barrier()
        self.new_blocks.extend(range(beyond, beyond + clusters))
        self.free_later(old_offset >> self.cluster_bits, old_clusters)

    # -- all in new places

    def make_room(self, clusters: int) -> None:
        """So that `clusters` more, and new places for all blocks and the table, need no bigger refcount table."""
        blocks = sum(1 for entry in self.table if entry)
        table = self._header.refcount_table_clusters
        clusters += 2 * (blocks + table) + 64
        clusters += 2 * (clusters // self.per_block + 1)
        last = self.end() + clusters
        if last // self.per_block >= len(self.table):
            self._grow_table(last // self.per_block + 1, self.end())

    def shadow(self) -> list[tuple[int, int]]:
        """Everything that changed since it was written goes into new clusters, with a new table; the caller writes the
        header. (offset, clusters) of the old places, which are in use until then."""
        old: list[tuple[int, int]] = []
        moved: set[int] = set()
        clusters = self._header.refcount_table_clusters
        place = self.allocate(clusters)
        while True:
            todo = [index for index in self._dirty if index not in moved and index not in self._dirty_table]
            if not todo:
                break
            for index in todo:
                new = self.allocate(1)
                old.append((self.table[index] & TABLE_OFFSET, 1))
                self.table[index] = new << self.cluster_bits
                moved.add(index)
        self.write_blocks(in_place=False)
        write_table(self._fd, place << self.cluster_bits, self.table)
        self._dirty_table.clear()
        old.append((self._header.refcount_table_offset, clusters))
        self._header.refcount_table_offset = place << self.cluster_bits
        return old

    # -- writing

    def write_blocks(self, *, in_place: bool = True) -> bool:
        """Dirty blocks into the file; whether `write_table` has something to do after a barrier."""
        if in_place and self._dirty:
            self.before_write()
        for index in sorted(self._dirty):
            data = pack_block(self._blocks[index], self.order)
            write_fully(self._fd, data, self.table[index] & TABLE_OFFSET)
        self._dirty.clear()
        return bool(self._dirty_table)

    def write_table(self) -> None:
        for index in sorted(self._dirty_table):
            entry = self.table[index].to_bytes(8, "big")
            write_fully(self._fd, entry, self._header.refcount_table_offset + index * 8)
        self._dirty_table.clear()

    def write_whole_table(self) -> None:
        write_table(self._fd, self._header.refcount_table_offset, self.table)
        self._dirty_table.clear()
