"""What changing a qcow2 image rests on: clusters taken and given back, tables of its own, and their order on disk.

What must never happen is that a table on disk leads to a cluster that is not ready, or to one that another table uses.
So `write_back` goes in steps, each on disk before the next begins:

    1. the data, and the refcount blocks with the new references
    2. the refcount table, where it has new blocks
    3. the L2 tables
    4. the L1 table
    5. the refcount blocks with the references that are gone

Power lost anywhere leaves old or new data and, at worst, clusters that count as used and are not (leaks). A cluster
that was given back is not used again before step 5.

So that leaks do not stay, an image of version 3 has its dirty bit from before the first step 1 until it is closed in
order, and whoever opens it next for writing, we or QEMU, counts anew. Reference: QEMU's docs/interop/qcow2.rst.
"""

from __future__ import annotations

import os
import stat
from array import array

from kvik.image.base import write_fully
from kvik.image.qcow2.header import AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW, CORRUPT, DIRTY, parse
from kvik.image.qcow2.header_write import write_header
from kvik.image.qcow2.reader import Qcow2Reader
from kvik.image.qcow2.refcount import Refcounts
from kvik.image.qcow2.snapshots import table_size
from kvik.image.qcow2.tables import COPIED, OFFSET, read_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvik.image.base import BackingOpener, DataOpener
    from kvik.image.qcow2.redo import Redo
    from kvik.image.qcow2.snapshots import Snapshot
    from kvik.image.qcow2.tracking import Tracking

__all__ = ["Qcow2Allocator"]

MAX_SNAPSHOT_TABLES = 1 << 18  # clusters
DIRTY_BYTE = 79  # of the header: the lowest of the incompatible features


class Qcow2Allocator(Qcow2Reader):
    """An open qcow2 image whose tables can change; `writer` puts data into it.

    With `barriers` off nothing is flushed but at the end: for an image that is worthless until it is whole.
    `repairing` opens one that is marked as corrupt or dirty as it is. `redo`: changes that a process before this one
    had in memory only are made again.
    """

    def __init__(
        self,
        fd: int,
        path: str = "",
        *,
        backing: BackingOpener | None = None,
        data_file: DataOpener | None = None,
        barriers: bool = True,
        repairing: bool = False,
        redo: Redo | None = None,
    ) -> None:
        super().__init__(fd, path, writable=True, backing=backing, data_file=data_file)
        self.barriers = barriers
        self._dirty_l1: set[int] = set()
        self._tail = 0  # where the next compressed cluster may begin, in the cluster of the one before
        self._reserved: set[int] | None = None
        self._fixed: set[int] | None = None
        self.tracking: Tracking | None = None
        self.keep_zeroes = False  # zeros are written as such even where no image below makes a hole read otherwise
        self._touched = self._tracked = False
        self._marks = barriers and not repairing
        self._marked = False
        if self.corrupt and not repairing:
            raise self.fault("is marked as corrupt", 72, f"repair it: kvik img check -r all {path}")
        self.redo: Redo | None = None  # where changes of tables are noted
        again = redo is not None and redo.count and not repairing
        if redo is not None and again:
            from kvik.image.qcow2.redo import replay

            replay(self, redo)
        if (self.dirty or again) and not repairing:
            self._repair_refcounts()
        if redo is not None and again:
            redo.clear()
        self.redo = redo

    def _repair_refcounts(self) -> None:
        """An image that was not closed: its refcounts are counted anew, as QEMU does at opening."""
        from kvik.image.qcow2.repair import repair

        repair(self, everything=True)

    # -- changing what is there

    @property
    def refcounts(self) -> Refcounts:
        if self._refcounts is None:
            self._refcounts = Refcounts(self.fd, self.path, self.header)
            self._refcounts.write_header = self.write_header
            self._refcounts.barrier = self.barrier
            self._refcounts.reserved = self.is_reserved
            self._refcounts.before_write = self._mark
        return self._refcounts

    def forget_refcounts(self) -> None:
        """They are in other places on disk now."""
        self._refcounts = None
        self.tables_moved()

    def barrier(self) -> None:
        if self.barriers:
            os.fdatasync(self.fd)
            if self.data_fd not in (-1, self.fd):
                os.fdatasync(self.data_fd)

    def write_header(self) -> None:
        """As a whole or not at all, as far as its extensions fit in a sector; on disk after the next barrier. It counts
        as dirty from now on: what it no longer leads to is given back later."""
        if self._marks and self.header.version > 2 and not self.dirty:
            self._marked = True
            self.header.incompatible |= DIRTY
        write_header(self.fd, self.header, self.barrier)

    def _mark(self) -> None:
        """Before refcounts come to disk, or stay there for what is used no more."""
        if self._marks and self.header.version > 2 and not self.dirty:
            self._marked = True
            self.header.incompatible |= DIRTY
            self._write_mark()
            self.barrier()

    def unmark(self) -> None:
        """All is on disk, and nothing counts as used that is not. Not itself waited for: a dirty image is no harm."""
        if self._marked:
            self._marked = False
            self.header.incompatible &= ~DIRTY
            self._write_mark()

    def _write_mark(self) -> None:
        """The bit alone: other fields of the header may be on their way to something else."""
        (low,) = os.pread(self.fd, 1, DIRTY_BYTE)
        write_fully(self.fd, bytes([low & ~DIRTY | self.header.incompatible & DIRTY]), DIRTY_BYTE)

    def begin(self, *, data: bool = True) -> None:
        """Before the first change: features that this program does not keep in order lose their flag, and with `data`
        bitmaps count as in use ("Auto-clear features")."""
        if self._touched and (self._tracked or not data):
            return
        self._touched = True
        kept = self.header.autoclear & (AUTOCLEAR_RAW | AUTOCLEAR_BITMAPS)
        if kept != self.header.autoclear:
            self.header.autoclear = kept
            self.write_header()
            self.barrier()
        if not data:
            return
        self._tracked = True
        from kvik.image.qcow2.tracking import Tracking

        if self.header.bitmaps is not None and self.header.autoclear & AUTOCLEAR_BITMAPS:
            self.tracking = Tracking(self)

    def store_bitmaps(self) -> None:
        """They are in the file as they are now, and count as true there until the next write: so that what changes them
        (`bitmap_changes`) can be done to an image that is being written."""
        if self.tracking is not None:
            self.write_back()
            self.tracking.store()
        self.tracking, self._tracked = None, False  # the next write looks which there are

    def is_reserved(self, cluster: int, count: int) -> bool:
        """Whether a range of clusters has a table of the image in it: only a damaged image asks to write there."""
        if self._reserved is None:
            bits = self.cluster_bits
            self._reserved = self._structure() | {(entry & OFFSET) >> bits for entry in self.l1 if entry & OFFSET}
        if count == 1:
            return cluster in self._reserved
        return not self._reserved.isdisjoint(range(cluster, cluster + count))

    def _structure(self) -> set[int]:
        """The clusters of all tables but the L2 tables."""
        if self._fixed is None:
            found: set[int] = set()
            for first, end in self._places():
                found.update(range(first, end))
            self._fixed = found
        return self._fixed

    def _places(self) -> list[tuple[int, int]]:
        """(first cluster, the one behind the last) of the header and of every table but the L2 tables."""
        bits, header = self.cluster_bits, self.header
        found = [(0, 1)]

        def add(offset: int, length: int) -> None:
            if length:
                found.append((offset >> bits, (offset + length + (1 << bits) - 1) >> bits))

        add(header.l1_offset, header.l1_size * 8)
        add(header.refcount_table_offset, header.refcount_table_clusters << bits)
        found += [(entry >> bits, (entry >> bits) + 1) for entry in self.refcounts.table if entry]
        if header.nb_snapshots:
            add(header.snapshots_offset, table_size(self.snapshots))
            if sum(snapshot.l1_size * 8 for snapshot in self.snapshots) >> bits > MAX_SNAPSHOT_TABLES:
                raise self.fault("has more snapshot tables than can be kept in mind", header.snapshots_offset)
            for snapshot in self.snapshots:
                add(snapshot.l1_offset, snapshot.l1_size * 8)
        if header.bitmaps is not None:
            add(header.bitmaps[2], header.bitmaps[1])
        return found

    def check_structure(self) -> None:
        """`ImageError` where two tables have a cluster in common: only a damaged image has that."""
        end = 0
        for first, behind in sorted(self._places()):
            if first < end:
                raise self.fault("two of its tables overlap", first << self.cluster_bits, self.repair_hint)
            end = behind

    def in_structure(self, first: int, count: int) -> bool:
        """Whether a range of clusters has a table in it that is none of L2."""
        if count == 1:
            return first in self._structure()
        return not self._structure().isdisjoint(range(first, first + count))

    @property
    def repair_hint(self) -> str:
        return f"repair it: kvik img check -r all {self.path}"

    def set_snapshots(self, snapshots: list[Snapshot]) -> None:
        self._snapshots = snapshots

    def reload(self) -> None:
        """Forget every change that is not on disk."""
        self.header = parse(self.fd, self.path)
        self.size = self.header.size
        self.l1 = read_table(self.fd, self.path, self.header.l1_offset, self.header.l1_size, "L1 table")
        self.l2.clear()
        self._dirty_l1.clear()
        self._snapshots = self._last = None
        self._tail = 0
        self.forget_refcounts()

    def tables_moved(self) -> None:
        """The tables are elsewhere now: look again where they are."""
        self._reserved = self._fixed = None

    def allocate(self, count: int, *, table: bool = False) -> int:
        """Offset of `count` new clusters in a row; `table` if they are to hold one."""
        first = self.refcounts.allocate(count)
        if self._reserved is not None:
            self._reserved.update(self.refcounts.new_blocks)
            self._structure().update(self.refcounts.new_blocks)
            if table:
                self._reserved.update(range(first, first + count))
        self.refcounts.new_blocks.clear()
        return first << self.cluster_bits

    def release_later(self, offset: int, count: int = 1) -> None:
        """`count` clusters lose a reference when no table on disk leads there any more."""
        self.refcounts.free_later(offset >> self.cluster_bits, count)
        if self._tail and offset >> self.cluster_bits == self._tail >> self.cluster_bits:
            self._tail = 0

    def _free_compressed(self, entry: int) -> None:
        offset, length = self.compressed_place(entry)
        first = offset >> self.cluster_bits
        self.refcounts.free_later(first, ((offset + length - 1) >> self.cluster_bits) - first + 1)
        if self._tail and first <= self._tail >> self.cluster_bits <= (offset + length) >> self.cluster_bits:
            self._tail = 0

    def _own_l2(self, number: int) -> tuple[int, array[int]]:
        """(offset, table) of an L2 table that only the active L1 table leads to, made or copied where needed."""
        entry = self.l1[number]
        place = entry & OFFSET
        if place and entry & COPIED:
            if place >> self.cluster_bits in self._structure():
                raise self.fault("an L1 entry leads to a table that is none of L2", self.header.l1_offset + 8 * number)
            table = self.l2.get(place)
        else:
            table = self.l2.get(place)[:] if place else array("Q", bytes(self.cluster_size))
            new = self.allocate(1, table=True)
            if place:
                self.release_later(place)
            place = new
            self.l1[number] = place | COPIED
            self._dirty_l1.add(number)
            self.l2.put(place, table)
        self.l2.dirty.add(place)
        return place, table

    def set_entries(self, cluster: int, count: int, entry: int, bitmap: int, *, step: int) -> None:
        """The L2 entries of `count` clusters of the disk, each `step` more than the one before. What they led to before
        still counts as used."""
        bits, stride = self.cluster_bits, self._stride
        for number, index, start, end in self._spans(cluster << bits, count << bits):
            _, table = self._own_l2(number)
            for slot in range(index * stride, (index + ((end - start) >> bits)) * stride, stride):
                table[slot] = entry
                if self.extended:
                    table[slot + 1] = bitmap
                entry += step
            if self.l2.crowded or self.refcounts.crowded:
                self.write_back()

    def _spans(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """(L1 index, first L2 index, start, end) of the parts of a range that one L2 table has."""
        shift = self.cluster_bits + self._l2_bits
        end = offset + length
        while offset < end:
            number = offset >> shift
            stop = min(end, (number + 1) << shift)
            yield number, (offset >> self.cluster_bits) & ((1 << self._l2_bits) - 1), offset, stop
            offset = stop

    def truncate_tail(self) -> None:
        """The file ends with the last cluster in use."""
        last = self.refcounts.end()
        status = os.fstat(self.fd)
        if stat.S_ISREG(status.st_mode) and last << self.cluster_bits < status.st_size:
            os.ftruncate(self.fd, last << self.cluster_bits)
            self.file_end = last << self.cluster_bits

    # -- order on disk

    def write_back(self) -> None:
        """Tables into the file, in the order that keeps it whole at every moment."""
        refcounts = self._refcounts
        if refcounts is None:
            return
        if refcounts.pending:
            self._mark()
        if refcounts.write_blocks():
            self.barrier()
            refcounts.write_table()
        if self.l2.dirty:
            self.barrier()
            self.l2.write_dirty()
        if self._dirty_l1:
            self.barrier()
            for number in sorted(self._dirty_l1):
                write_fully(self.fd, self.l1[number].to_bytes(8, "big"), self.header.l1_offset + 8 * number)
            self._dirty_l1.clear()
        if self.redo is not None:
            self.redo.clear()  # before a cluster that its notes lead to can be another's
        if refcounts.pending:
            self.barrier()
            self._settle()
            refcounts.write_blocks()

    def _settle(self) -> None:
        """References go; clusters that have none left give their room in the file system back."""
        self.give_back(self.refcounts.settle())

    def give_back(self, ranges: Iterable[tuple[int, int]]) -> None:
        """The room of those of the clusters that are in use no more."""
        from kvik.image.raw import punch

        bits = self.cluster_bits
        for first, count in ranges:
            begin = first
            for cluster in range(first, first + count):
                if self.refcounts.get(cluster):
                    punch(self.fd, begin << bits, (cluster - begin) << bits)
                    begin = cluster + 1
                    continue
                self.l2.forget(cluster << bits)
                if self._reserved is not None:
                    self._reserved.discard(cluster)
                    self._structure().discard(cluster)
            punch(self.fd, begin << bits, (first + count - begin) << bits)

    def flush(self) -> None:
        self.write_back()
        os.fdatasync(self.fd)
        if self.data_fd not in (-1, self.fd):
            os.fdatasync(self.data_fd)

    def finish(self) -> None:
        self.write_back()
        if self._touched and self.tracking is not None:
            self.tracking.store()
        if self._touched and self.barriers:
            self.flush()
        self.unmark()

    def mark_whole(self) -> None:
        """After a repair: no longer dirty, no longer corrupt."""
        self.header.incompatible &= ~(DIRTY | CORRUPT)
        self._marked = False
        write_header(self.fd, self.header, self.barrier)
        os.fdatasync(self.fd)
