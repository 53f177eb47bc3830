"""Writing qcow2: allocation, copy on write, zero clusters, discard; tables wait in memory and are written in order.

What must never happen is that a table on disk leads to a cluster that is not ready, or to one that another table uses.
So `write_back` goes in steps, each on disk before the next begins:

    1. the data, and the refcount blocks with the new references
    2. the refcount table, where it has new blocks
    3. the L2 tables
    4. the L1 table
    5. the refcount blocks with the references that are gone

Power lost anywhere leaves old or new data and, at worst, clusters that count as used and are not (leaks). A cluster
that was given back is not used again before step 5. Reference: QEMU's docs/interop/qcow2.rst.
"""

from __future__ import annotations

import os
from array import array

from kvik.image.base import HOLE, ZERO, ZERO_ALLOCATED, write_fully
from kvik.image.qcow2.header import AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW, CORRUPT, DIRTY
from kvik.image.qcow2.reader import ALL_SUBCLUSTERS, SUBCLUSTERS, Qcow2Reader
from kvik.image.qcow2.refcount import Refcounts
from kvik.image.qcow2.tables import COMPRESSED_FLAG, COPIED, OFFSET, ZERO_FLAG

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvik.image.base import BackingOpener, DataOpener
    from kvik.image.qcow2.tracking import Tracking

__all__ = ["Qcow2Writer"]

MOST_AT_ONCE = 4 << 20  # bytes allocated in one piece


class Qcow2Writer(Qcow2Reader):
    """An open qcow2 image, for reading and writing.

    With `barriers` off nothing is flushed but at the end: for an image that is worthless until it is whole.
    `repairing` opens one that is marked as corrupt or dirty as it is.
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
    ) -> None:
        super().__init__(fd, path, writable=True, backing=backing, data_file=data_file)
        self.barriers = barriers
        self._dirty_l1: set[int] = set()
        self._tail = 0  # where the next compressed cluster may begin, in the cluster of the one before
        self._reserved: set[int] | None = None
        self._fixed: set[int] | None = None
        self.tracking: Tracking | None = None
        self._touched = False
        if self.corrupt and not repairing:
            raise self.fault("is marked as corrupt", 72, f"repair it: kvik img check -r all {path}")
        if self.dirty and not repairing:
            self._repair_refcounts()

    def _repair_refcounts(self) -> None:
        """An image with lazy refcounts that was not closed: its refcounts are counted anew, as QEMU does at opening."""
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
        packed = self.header.pack()
        write_fully(self.fd, packed + bytes(max(0, min(4096, self.cluster_size) - len(packed))), 0)

    def _begin(self) -> None:
        """Before the first change: features that this program does not keep in order lose their flag.

        Persistent bitmaps are marked as inconsistent unless something keeps them ("Auto-clear features").
        """
        if self._touched:
            return
        self._touched = True
        kept = self.header.autoclear & (AUTOCLEAR_RAW | AUTOCLEAR_BITMAPS)
        if kept != self.header.autoclear:
            self.header.autoclear = kept
            self.write_header()
            self.barrier()
        from kvik.image.qcow2.tracking import Tracking

        if self.header.bitmaps is not None and self.header.autoclear & AUTOCLEAR_BITMAPS:
            self.tracking = Tracking(self)

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
            bits, header = self.cluster_bits, self.header
            found: set[int] = {0}

            def add(offset: int, length: int) -> None:
                found.update(range(offset >> bits, (offset + length + (1 << bits) - 1) >> bits))

            add(header.l1_offset, header.l1_size * 8)
            add(header.refcount_table_offset, header.refcount_table_clusters << bits)
            found.update(entry >> bits for entry in self.refcounts.table if entry)
            if header.nb_snapshots:
                add(header.snapshots_offset, 1)
                for snapshot in self.snapshots:
                    add(snapshot.l1_offset, snapshot.l1_size * 8)
            if header.bitmaps is not None:
                add(header.bitmaps[2], header.bitmaps[1])
            self._fixed = found
        return self._fixed

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

    def _spans(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """(L1 index, first L2 index, start, end) of the parts of a range that one L2 table has."""
        shift = self.cluster_bits + self._l2_bits
        end = offset + length
        while offset < end:
            number = offset >> shift
            stop = min(end, (number + 1) << shift)
            yield number, (offset >> self.cluster_bits) & ((1 << self._l2_bits) - 1), offset, stop
            offset = stop

    # -- data

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """`data` at `offset`; on disk after the next `flush`."""
        view = memoryview(data).cast("B")
        self.check_range(offset, len(view))
        self._check_writable()
        self._begin()
        if self.tracking is not None:
            self.tracking.mark(offset, len(view))
        self._last = None
        for number, index, start, end in self._spans(offset, len(view)):
            _, table = self._own_l2(number)
            self._write_table(table, index, start, view[start - offset : end - offset])
            if self.l2.crowded or self.refcounts.crowded:
                self.write_back()

    def _check_writable(self) -> None:
        if self.fd < 0 or not self.writable:
            raise self.fault("is not open for writing")
        if self.header.crypt_method:
            raise self.fault("is encrypted, which is not supported", 32)
        if self.data_fd < 0:
            raise self.fault(f"keeps its data in {self.header.data_file!r}, which was not opened", 72)

    def _write_table(self, table: array[int], index: int, start: int, view: memoryview) -> None:
        """The part of a write that one L2 table maps: runs in place, and runs of new clusters."""
        size, bits = self.cluster_size, self.cluster_bits
        end = start + len(view)
        at = start
        while at < end:
            here = index + (at >> bits) - (start >> bits)
            last = here + ((end - 1) >> bits) - (at >> bits)
            in_place = self._in_place(table, here, at, end)
            run = here + 1
            place = table[here * self._stride] & OFFSET
            if in_place:
                while (
                    run <= last
                    and table[run * self._stride] & OFFSET == place + (run - here) * size
                    and self._in_place(table, run, (at & -size) + (run - here) * size, end)
                ):
                    run += 1
            else:
                most = here + max(1, MOST_AT_ONCE >> bits) if not self._reusable(table, here) else run
                while run <= last and run < most:
                    if self._reusable(table, run) or self._in_place(
                        table, run, (at & -size) + (run - here) * size, end
                    ):
                        break
                    run += 1
            stop = min(end, (at & -size) + (run - here) * size)
            part = view[at - start : stop - start]
            if in_place:
                self._check_inside(place + (run - here - 1) * size)
                self._put(part, place + (at & (size - 1)), place, run - here)
            else:
                self._write_new(table, here, run - here, at, part)
            at = stop

    def _in_place(self, table: array[int], index: int, at: int, end: int) -> bool:
        """Whether the write from `at` on may go straight to the cluster that an entry has."""
        entry = table[index * self._stride]
        if not entry & COPIED or entry & (COMPRESSED_FLAG | ZERO_FLAG) or entry & ~(OFFSET | COPIED):
            return False
        if not entry & OFFSET and not self.has_data_file:
            return False
        if self.extended:
            wanted = self._bits_of(at, end)
            return table[2 * index + 1] & wanted == wanted
        return True

    def _bits_of(self, at: int, end: int) -> int:
        """The bits of the subclusters of one cluster that `at` to `end` touches."""
        size = self.cluster_size
        part = size // SUBCLUSTERS
        within = at & (size - 1)
        upto = min(size, within + end - at)
        first, last = within // part, (upto - 1) // part
        return ((1 << (last + 1)) - 1) & ~((1 << first) - 1)

    def _check_inside(self, cluster: int) -> None:
        """A cluster that is written again begins inside the file: an entry must not make the file grow to anywhere."""
        if cluster < self.file_end or self.has_data_file:
            return
        self.file_end = os.lseek(self.fd, 0, os.SEEK_END)
        if cluster >= self.file_end:
            raise self.fault("an L2 entry leads outside the file", cluster)

    def _put(self, data: bytes | bytearray | memoryview, host: int, cluster: int, count: int) -> None:
        """Data into clusters of the file, unless they are a table's."""
        if not self.has_data_file and self.is_reserved(cluster >> self.cluster_bits, count):
            raise self.fault("an L2 entry leads to a table of the image: nothing is written there", host)
        if cluster & (self.cluster_size - 1):
            raise self.fault("an L2 entry does not lead to a cluster's start", host)
        write_fully(self.data_fd, data, host)

    def _write_new(self, table: array[int], index: int, count: int, at: int, view: memoryview) -> None:
        """Data for `count` clusters whose entries cannot be written in place: new clusters, or those that a zero
        cluster keeps; the rest of the first and last cluster is copied."""
        size, stride = self.cluster_size, self._stride
        base = at & -size
        end = at + len(view)
        if self.has_data_file:
            place = base
        else:
            reused = self._reusable(table, index) if count == 1 else 0
            place = reused or self.allocate(count)
            if reused:
                self._check_inside(reused)
        first, last = base, base + count * size
        if self.extended:  # only the subclusters that are touched become part of this layer
            part = size // SUBCLUSTERS
            first, last = at // part * part, min(last, (end + part - 1) // part * part)
            first = base if self._holds_data(table, index) else first
            if self._holds_data(table, index + count - 1):
                last = base + count * size
        head = self._old(first, at - first)
        tail = self._old(end, last - end)
        if head or tail:
            view = memoryview(b"".join((head, view, tail)))
        self._put(view, place + first - base, place, count)
        for number in range(count):
            slot = (index + number) * stride
            old = table[slot]
            new = (place + number * size) | COPIED
            if not self.has_data_file:
                self._drop(old, keep=new & OFFSET)
            if self.extended:
                start = base + number * size
                bits = self._bits_of(max(first, start), min(last, start + size))
                before = 0 if old & COMPRESSED_FLAG else table[slot + 1]
                allocated = (before & ALL_SUBCLUSTERS) | bits
                table[slot + 1] = (before >> 32 & ~bits) << 32 | allocated
            table[slot] = new

    def _holds_data(self, table: array[int], index: int) -> bool:
        """Whether a cluster with subclusters has data that must move along when it gets a new place."""
        entry, bitmap = table[2 * index], table[2 * index + 1]
        if entry & COMPRESSED_FLAG:
            return True
        return bool(bitmap & ALL_SUBCLUSTERS) and not self.has_data_file and not self._reusable(table, index)

    def _reusable(self, table: array[int], index: int) -> int:
        """The cluster that an entry keeps for itself alone, though it is not all data: preallocated, or with
        subclusters still to be written. 0: none."""
        entry = table[index * self._stride]
        if entry & COPIED and entry & OFFSET and not entry & COMPRESSED_FLAG:
            return entry & OFFSET
        return 0

    def _old(self, offset: int, length: int) -> bytes:
        """What is there now; what is behind the disk's end is zero."""
        if length <= 0:
            return b""
        inside = max(0, min(length, self.size - offset))
        data = bytearray(length)
        if inside:
            self._read(offset, memoryview(data)[:inside])
        return bytes(data)

    def _drop(self, entry: int, keep: int = 0) -> None:
        """The cluster of an entry that is replaced loses a reference."""
        if entry & COMPRESSED_FLAG:
            self._free_compressed(entry)
        elif entry & OFFSET and entry & OFFSET != keep and not self.has_data_file:
            self.release_later(entry & OFFSET)

    # -- compressed data

    def write_compressed(self, offset: int, data: bytes) -> None:
        """One cluster's compressed data; `offset` is that of a cluster that is not allocated."""
        index = self.place_compressed(offset, len(data))
        write_fully(self.fd, data, index)

    def place_compressed(self, offset: int, length: int) -> int:
        """Room in the file for a compressed cluster, entered in its table; where its data goes."""
        self._check_writable()
        self._begin()
        if self.has_data_file:
            raise self.fault("has an external data file: clusters cannot be compressed")
        if self.l2.crowded or self.refcounts.crowded:
            self.write_back()
        self._last = None
        number, index, _, _ = next(self._spans(offset, 1))
        _, table = self._own_l2(number)
        slot = index * self._stride
        self._drop(table[slot])
        place = self._bytes(length)
        shift = 62 - (self.cluster_bits - 8)
        if place + length > 1 << min(shift, 56):
            raise self.fault("has no room left for compressed clusters")
        sectors = ((place + length - 1) >> 9) - (place >> 9)
        table[slot] = COMPRESSED_FLAG | sectors << shift | place
        if self.extended:
            table[slot + 1] = 0
        return place

    def _bytes(self, length: int) -> int:
        """The offset of `length` bytes, behind the last compressed cluster where they fit or continue it."""
        size, bits = self.cluster_size, self.cluster_bits
        tail = self._tail
        if tail:
            room = -tail & (size - 1)
            if length <= room:
                # The shared cluster gets one more reference, if its width has room for it.
                if self.refcounts.get(tail >> bits) < self.refcounts.maximum:
                    self.refcounts.add(tail >> bits, 1, 1)
                    self._tail = tail + length if (tail + length) & (size - 1) else 0
                    return tail
            elif room:
                place = self.allocate(1)
                if place == (tail & -size) + size and self.refcounts.get(tail >> bits) < self.refcounts.maximum:
                    self.refcounts.add(tail >> bits, 1, 1)
                    self._tail = tail + length
                    return tail
                self._tail = place + length if length < size else 0
                return place
        place = self.allocate(1)
        self._tail = place + length if length < size else 0
        return place

    # -- zeros

    def write_zeroes(self, offset: int, length: int, discard: bool = False) -> None:
        self.check_range(offset, length)
        self._check_writable()
        size = self.cluster_size
        end = offset + length
        # The end of the disk ends its last cluster.
        first = (offset + size - 1) & -size
        last = end & -size if end < self.size else (end + size - 1) & -size
        if self.header.version < 3 or self.header.autoclear & AUTOCLEAR_RAW or first >= last:
            self._write_blank(offset, length)
            return
        self._write_blank(offset, first - offset)
        self._zero_clusters(first, last - first, discard)
        if end > last:
            self._write_blank(last, end - last)

    def _write_blank(self, offset: int, length: int) -> None:
        """Zeros as data, but where the image reads as zero already."""
        blank = memoryview(bytes(min(max(length, 0), 1 << 20)))
        end = offset + length
        while offset < end:
            kind, start, size, _ = next(self.runs(offset, end - offset))
            if kind in (ZERO, ZERO_ALLOCATED) and not self.header.autoclear & AUTOCLEAR_RAW:
                offset = start + size
                continue
            if kind == HOLE and self.backing is None and self.header.backing_file is None:
                offset = start + size
                continue
            count = min(size, end - offset, len(blank))
            self.write(offset, blank[:count])
            offset += count

    def _zero_clusters(self, offset: int, length: int, discard: bool) -> None:
        self._begin()
        if self.tracking is not None:
            self.tracking.mark(offset, min(length, self.size - offset))
        self._last = None
        stride, size = self._stride, self.cluster_size
        empty = self.header.backing_file is None
        for number, index, start, end in self._spans(offset, length):
            if empty and not self.l1[number] & OFFSET:
                continue  # reads as zero already
            _, table = self._own_l2(number)
            for slot in range(index * stride, (index + ((end - start) // size)) * stride, stride):
                entry = table[slot]
                if not entry and empty:
                    continue
                keep = entry & (OFFSET | COPIED) if entry & COPIED and not discard else 0
                if not entry & COMPRESSED_FLAG and self.has_data_file:
                    keep = entry & (OFFSET | COPIED)
                self._drop(entry, keep=keep & OFFSET)
                if self.extended:
                    table[slot] = keep
                    table[slot + 1] = ALL_SUBCLUSTERS << 32
                else:
                    table[slot] = keep | ZERO_FLAG
            if self.l2.crowded:
                self.write_back()

    def discard(self, offset: int, length: int) -> None:
        """Whole clusters give their room back: they read as zero (as QEMU's full discards do)."""
        self.check_range(offset, length)
        self._check_writable()
        size = self.cluster_size
        first = (offset + size - 1) & -size
        end = offset + length
        last = end & -size if end < self.size else (end + size - 1) & -size
        if first >= last or self.header.autoclear & AUTOCLEAR_RAW:
            return
        if self.header.version >= 3:
            self._zero_clusters(first, last - first, True)
        elif self.header.backing_file is None:
            self.unmap(first, last - first)

    def unmap(self, offset: int, length: int) -> None:
        """Whole clusters leave this layer: what is read there is the backing image's, or zero."""
        self._begin()
        self._last = None
        stride, size = self._stride, self.cluster_size
        if self.tracking is not None and offset < self.size:
            self.tracking.mark(offset, min(length, self.size - offset))
        for number, index, start, end in self._spans(offset, length):
            if number >= len(self.l1) or not self.l1[number] & OFFSET:
                continue
            _, table = self._own_l2(number)
            for slot in range(index * stride, (index + ((end - start + size - 1) // size)) * stride, stride):
                self._drop(table[slot])
                table[slot] = 0
                if self.extended:
                    table[slot + 1] = 0
            if self.l2.crowded:
                self.write_back()

    # -- order on disk

    def write_back(self) -> None:
        """Tables into the file, in the order that keeps it whole at every moment."""
        refcounts = self._refcounts
        if refcounts is None:
            return
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
        if refcounts.pending:
            self.barrier()
            self._settle()
            refcounts.write_blocks()

    def _settle(self) -> None:
        """References go; clusters that have none left give their room in the file system back."""
        from kvik.image.raw import punch

        bits = self.cluster_bits
        for first, count in self.refcounts.settle():
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

    def mark_whole(self) -> None:
        """After a repair: no longer dirty, no longer corrupt."""
        self.header.incompatible &= ~(DIRTY | CORRUPT)
        self.write_header()
        os.fdatasync(self.fd)
