"""Writing qcow2: data in place, in new clusters and compressed, zero clusters, discard. `allocator` keeps the order on
disk. Reference: QEMU's docs/interop/qcow2.rst.
"""

from __future__ import annotations

import os
from array import array

from kvik.image.base import HOLE, KEY_WANTED, LOCKED, ZERO, ZERO_ALLOCATED, cut, write_fully, writev_fully
from kvik.image.qcow2.allocator import Qcow2Allocator
from kvik.image.qcow2.header import AUTOCLEAR_RAW
from kvik.image.qcow2.reader import ALL_SUBCLUSTERS, SUBCLUSTERS
from kvik.image.qcow2.tables import COMPRESSED_FLAG, COPIED, OFFSET, ZERO_FLAG, run_end, zero_end

__all__ = ["Qcow2Writer"]

MOST_AT_ONCE = 4 << 20  # bytes allocated in one piece


class Qcow2Writer(Qcow2Allocator):
    """An open qcow2 image, for reading and writing."""

    # -- data

    def writev(self, offset: int, buffers: list[memoryview]) -> None:
        length = sum(map(len, buffers))
        self.check_range(offset, length)
        self.check_writable()
        self.begin()
        if self.tracking is not None:
            self.tracking.mark(offset, length)
        self._last = None
        for number, index, start, end in self._spans(offset, length):
            _, table = self._own_l2(number)
            self._write_table(table, index, start, cut(buffers, start - offset, end - offset))
            self._make_room()

    def _make_room(self) -> None:
        """Between two tables: write them back where too much waits for that."""
        if self.l2.crowded or self.refcounts.crowded or (self.redo is not None and self.redo.full):
            self.write_back()

    def place_to_write(self, offset: int, length: int) -> int:
        if not self._tracked:
            return -1
        table = self._table_of(offset, length, COPIED)
        if table is None:
            return -1
        size, bits, mask = self.cluster_size, self.cluster_bits, self._l2_mask
        index, last = offset >> bits & mask, offset + length - 1 >> bits & mask
        entry = table[index]
        place = entry & OFFSET
        if not place or entry != place | COPIED or place & (size - 1):
            return -1
        if last != index and run_end(table, index, last + 1, size) <= last:
            return -1
        if place + (last - index) * size >= self.file_end or self.is_reserved(place >> bits, last - index + 1):
            return -1
        if self.tracking is not None:
            self.tracking.mark(offset, length)  # before it is written: too much is marked rather than too little
        return place + (offset & (size - 1))

    def check_writable(self, *, data: bool = True) -> None:
        """Without `data`: for changes of what is never encrypted."""
        if self.fd < 0 or not self.writable:
            raise self.fault("is not open for writing")
        if self.header.crypt_method and data:
            raise self.fault(LOCKED, 32, KEY_WANTED)
        if self.data_fd < 0:
            raise self.fault(f"keeps its data in {self.header.data_file!r}, which was not opened", 72)

    def _write_table(self, table: array[int], index: int, start: int, buffers: list[memoryview]) -> None:
        """The part of a write that one L2 table maps: runs in place, and runs of new clusters."""
        size, bits = self.cluster_size, self.cluster_bits
        end = start + sum(map(len, buffers))
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
                if not table[here] and not self.extended:  # most of what is new lies in a hole
                    run = zero_end(table, run, min(last + 1, most))
                while run <= last and run < most:
                    if self._reusable(table, run) or self._in_place(
                        table, run, (at & -size) + (run - here) * size, end
                    ):
                        break
                    run += 1
            stop = min(end, (at & -size) + (run - here) * size)
            part = buffers if (at, stop) == (start, end) else cut(buffers, at - start, stop - start)
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

    def _put(self, buffers: list[memoryview], host: int, cluster: int, count: int) -> None:
        """Data into clusters of the file, unless they are a table's."""
        if not self.has_data_file and self.is_reserved(cluster >> self.cluster_bits, count):
            raise self.fault("an L2 entry leads to a table of the image: nothing is written there", host)
        if cluster & (self.cluster_size - 1):
            raise self.fault("an L2 entry does not lead to a cluster's start", host)
        writev_fully(self.data_fd, buffers, host)

    def _write_new(self, table: array[int], index: int, count: int, at: int, buffers: list[memoryview]) -> None:
        """Data for `count` clusters whose entries cannot be written in place: new clusters, or those that a zero
        cluster keeps; the rest of the first and last cluster is copied."""
        size, stride = self.cluster_size, self._stride
        base = at & -size
        end = at + sum(map(len, buffers))
        reused = 0
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
        if head:
            buffers = [memoryview(head), *buffers]
        if tail:
            buffers = [*buffers, memoryview(tail)]
        try:
            self._put(buffers, place + first - base, place, count)
        except OSError:
            if not reused and not self.has_data_file:
                self.release_later(place, count)  # nothing leads there
            raise
        if not self.extended and not any(table[index : index + count]):
            table[index : index + count] = array("Q", range(place | COPIED, (place | COPIED) + count * size, size))
            if self.redo is not None:
                self.redo.add(base >> self.cluster_bits, count, place | COPIED, follow=True)
            return
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
            self._note(table, index + number, (base >> self.cluster_bits) + number)

    def _note(self, table: array[int], index: int, cluster: int) -> None:
        """That an entry was changed, for the process that comes after this one."""
        if self.redo is not None:
            slot = index * self._stride
            self.redo.add(cluster, 1, table[slot], table[slot + 1] if self.extended else 0)

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
        self.check_writable()
        self.begin()
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
        self.check_writable()
        self._record(offset, length)
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

    @property
    def _alone(self) -> bool:
        """Whether a hole reads as zero, and will."""
        return self.backing is None and self.header.backing_file is None and not self.keep_zeroes

    def _record(self, offset: int, length: int) -> None:
        """In the bitmaps, also where what is asked for changes nothing: as QEMU does."""
        if self.header.bitmaps is not None and length:
            self.begin()
            if self.tracking is not None:
                self.tracking.mark(offset, length)

    def _write_blank(self, offset: int, length: int) -> None:
        """Zeros as data, but where the image reads as zero already."""
        blank = memoryview(bytes(min(max(length, 0), 1 << 20)))
        end = offset + length
        while offset < end:
            kind, start, size, _ = next(self.runs(offset, end - offset))
            if kind in (ZERO, ZERO_ALLOCATED) and not self.header.autoclear & AUTOCLEAR_RAW:
                offset = start + size
                continue
            if kind == HOLE and self._alone:
                offset = start + size
                continue
            count = min(size, end - offset, len(blank))
            self.write(offset, blank[:count])
            offset += count

    def _zero_clusters(self, offset: int, length: int, discard: bool) -> None:
        self.begin()
        if self.tracking is not None:
            self.tracking.mark(offset, min(length, self.size - offset))
        self._last = None
        stride, size = self._stride, self.cluster_size
        empty = self._alone
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
                if self.redo is not None:
                    at = slot // stride
                    self._note(table, at, (start >> self.cluster_bits) + at - index)
            self._make_room()

    def discard(self, offset: int, length: int) -> None:
        """Whole clusters give their room back: they read as zero (as QEMU's full discards do)."""
        self.check_range(offset, length)
        self.check_writable()
        self._record(offset, length)
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
        self.begin()
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
                if self.redo is not None:
                    at = slot // stride
                    self._note(table, at, (start >> self.cluster_bits) + at - index)
            self._make_room()

    def make_empty(self) -> None:
        """Every cluster leaves this layer; the internal snapshots stay."""
        self.check_writable()
        self.begin()
        self._last = None
        if self.tracking is not None:
            self.tracking.mark(0, self.size)
        self._drop_tables(0)
        self.flush()
        if not self.has_data_file:
            self.truncate_tail()

    def forget_vm_state(self) -> None:
        """What lies in the active table behind the disk's end: a machine's state, left by a snapshot that was applied.
        The snapshots keep theirs."""
        self._drop_tables(self.header.l1_needed(self.header.size))

    def _drop_tables(self, first: int) -> None:
        """The L2 tables from an L1 index on leave this layer with all that they lead to."""
        for number in range(first, len(self.l1)):
            place = self.l1[number] & OFFSET
            if not place:
                continue
            for old in self.l2.get(place)[:: self._stride]:
                if old:
                    self._drop(old)
            self.l2.dirty.discard(place)
            self.release_later(place)
            self.l1[number] = 0
            self._dirty_l1.add(number)
        self.write_back()
