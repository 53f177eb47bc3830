"""Reading qcow2: from guest offsets to runs in the file, over L1 and L2 tables, subclusters and compressed clusters.

Reference: QEMU's docs/interop/qcow2.rst, "Cluster mapping", "Extended L2 Entries". All offsets are checked against the
file before anything is read there; what the tables say about one cluster is never trusted for another.
"""

from __future__ import annotations

import os
import zlib

from kvik.errors import ImageError
from kvik.image.base import COMPRESSED, DATA, DATA_HOLE, HOLE, KEY_WANTED, LOCKED, ZERO, ZERO_ALLOCATED, Image
from kvik.image.qcow2.header import CORRUPT, DATA_FILE, DIRTY, parse
from kvik.image.qcow2.tables import COMPRESSED_FLAG, COPIED, OFFSET, ZERO_FLAG, L2Cache, read_table, run_end, zero_end

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator

    from kvik.image.base import BackingOpener, DataOpener, Run
    from kvik.image.qcow2.bitmaps import Bitmap
    from kvik.image.qcow2.refcount import Refcounts
    from kvik.image.qcow2.snapshots import Snapshot

__all__ = ["Qcow2Reader", "inflate"]

STANDARD = OFFSET | ZERO_FLAG | 1 << 63  # bits that an entry of a standard cluster may have
SUBCLUSTERS = 32
ALL_SUBCLUSTERS = (1 << 32) - 1


def inflate(data: bytes, size: int) -> bytes:
    """A cluster compressed with zlib: a raw deflate stream with a window of 4 KiB; `ImageError` if it is damaged."""
    try:
        output = zlib.decompressobj(-12).decompress(data, size)
    except zlib.error as error:
        raise ImageError(f"the zlib data is damaged: {error}") from None
    if len(output) < size:
        raise ImageError("the zlib data is cut short")
    return output


class Qcow2Reader(Image):
    """An open qcow2 image, for reading.

    `backing` and `data_file` open what the header names; without them the image opens, and reading what lies there is
    an `ImageError`.
    """

    format = "qcow2"

    def __init__(
        self,
        fd: int,
        path: str = "",
        *,
        writable: bool = False,
        backing: BackingOpener | None = None,
        data_file: DataOpener | None = None,
    ) -> None:
        super().__init__(fd, path, writable=writable)
        self.header = header = parse(fd, path)
        self.size = header.size
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.extended = header.extended_l2
        self._stride = 2 if self.extended else 1  # 64-bit words per L2 entry
        self._l2_bits = header.l2_bits
        self._l2_mask = (1 << header.l2_bits) - 1
        self.l1 = read_table(fd, path, header.l1_offset, header.l1_size, "L1 table")
        self.l2 = L2Cache(fd, path, self.cluster_size)
        self._last: tuple[int, bytes] | None = None  # descriptor and contents of the compressed cluster read last
        self._preallocated: bool | None = None
        self._refcounts: Refcounts | None = None
        self._snapshots: list[Snapshot] | None = None
        self.file_end = os.lseek(fd, 0, os.SEEK_END)
        if header.incompatible & DATA_FILE:
            self.data_fd = -1
            if data_file is not None:
                self.data_fd = data_file(header.data_file if header.data_file is not None else "")
        if header.backing_file is not None and backing is not None:
            try:
                self.backing = backing(header.backing_file, header.backing_format)
            except BaseException:
                if self.data_fd not in (-1, fd):
                    os.close(self.data_fd)
                raise

    # -- what is in the header

    @property
    def dirty(self) -> bool:
        return bool(self.header.incompatible & DIRTY)

    @property
    def corrupt(self) -> bool:
        return bool(self.header.incompatible & CORRUPT)

    @property
    def has_data_file(self) -> bool:
        return bool(self.header.incompatible & DATA_FILE)

    @property
    def granularity(self) -> int:
        """Bytes that a layer has or has not, as a whole: a cluster or subcluster."""
        return self.cluster_size // SUBCLUSTERS if self.extended else self.cluster_size

    @property
    def refcounts(self) -> Refcounts:
        if self._refcounts is None:
            from kvik.image.qcow2.refcount import Refcounts

            self._refcounts = Refcounts(self.fd, self.path, self.header)
        return self._refcounts

    @property
    def snapshots(self) -> list[Snapshot]:
        """Its internal snapshots, in the order of their table."""
        if self._snapshots is None:
            from kvik.image.qcow2.snapshots import read_snapshots

            self._snapshots = read_snapshots(self.fd, self.path, self.header) if self.header.nb_snapshots else []
        return self._snapshots

    @property
    def bitmaps(self) -> list[Bitmap]:
        """Its persistent bitmaps; raises `ImageError` where their directory is damaged."""
        from kvik.image.qcow2.bitmaps import read_directory

        return read_directory(self)

    def use_snapshot(self, snapshot: Snapshot) -> None:
        """From now on read the disk as it was in `snapshot`."""
        self.l1 = read_table(self.fd, self.path, snapshot.l1_offset, snapshot.l1_size, "snapshot's L1 table")
        self.size = snapshot.disk_size if snapshot.disk_size is not None else self.size
        self._last = None

    def snapshot_views(self) -> Iterator[tuple[Snapshot, Qcow2Reader]]:
        """Each snapshot with the image as it reads there, without the chain; only for the moment of the iteration."""
        for snapshot in self.snapshots:
            fd = os.dup(self.fd)
            try:
                view = Qcow2Reader(fd, self.path)
            except BaseException:
                os.close(fd)
                raise
            with view:
                view.use_snapshot(snapshot)
                yield snapshot, view

    def _backing_of(self, offset: int) -> Image | None:
        if self.backing is None and self.header.backing_file is not None:
            raise self.fault(
                f"sits on the backing file {self.header.backing_file!r}, which was not opened", self.l1_place(offset)
            )
        return self.backing

    def l1_place(self, offset: int) -> int:
        """Where in the file the L1 entry for a guest offset is."""
        return self.header.l1_offset + 8 * (offset >> (self.cluster_bits + self._l2_bits))

    # -- the map

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        if length <= 0:
            return
        if self.header.crypt_method:
            raise self.fault(LOCKED, 32, KEY_WANTED)
        if self.data_fd < 0:
            raise self.fault(f"keeps its data in {self.header.data_file!r}, which was not opened", 72)
        found = self._clusters(offset, length)
        if not self._is_preallocated():
            yield from found
            return
        for run in found:
            if run[0] == DATA:
                yield from self._by_holes(run)
            else:
                yield run

    def place(self, offset: int, length: int) -> int:
        table = self._table_of(offset, length, 0)
        if table is None:
            return -1
        index = offset >> self.cluster_bits & self._l2_mask
        entry = table[index]
        if not entry & OFFSET or entry & ~(OFFSET | COPIED) or entry & OFFSET & (self.cluster_size - 1):
            return -1
        last = offset + length - 1 >> self.cluster_bits & self._l2_mask
        if last != index and run_end(table, index, last + 1, self.cluster_size) <= last:
            return -1
        return (entry & OFFSET) + (offset & (self.cluster_size - 1))

    def _table_of(self, offset: int, length: int, flags: int) -> array[int] | None:
        """The L2 table that all of a range is in, if its L1 entry has these flags; None also for extended tables."""
        shift = self.cluster_bits + self._l2_bits
        number = offset >> shift
        if self.extended or number >= len(self.l1) or offset + length - 1 >> shift != number:
            return None
        entry = self.l1[number]
        return self.l2.get(entry & OFFSET) if entry & OFFSET and entry & flags == flags else None

    def _clusters(self, offset: int, length: int) -> Iterator[Run]:
        """Runs by the tables alone."""
        end = offset + length
        bits, l2_bits = self.cluster_bits, self._l2_bits
        size, span = self.cluster_size, 1 << (bits + l2_bits)
        l1, entries = self.l1, len(self.l1)
        at = offset
        while at < end:
            number = at >> (bits + l2_bits)
            place = l1[number] & OFFSET if number < entries else 0
            if not place:
                start, number = at, number + 1
                while number < entries and number * span < end and not l1[number] & OFFSET:
                    number += 1
                at = end if number >= entries else min(end, number * span)
                yield HOLE, start, at - start, -1
                continue
            table = self.l2.get(place)
            stop = min(end, (number + 1) * span)
            index = (at >> bits) & ((1 << l2_bits) - 1)
            last = index + ((stop - 1) >> bits) - (at >> bits)
            if self.extended:
                yield from self._subclusters(table, place, range(index, last + 1), at, stop)
                at = stop
                continue
            while index <= last:
                entry = table[index]
                first = index
                index += 1
                start = at
                if entry & COMPRESSED_FLAG:
                    at = min(stop, (start & -size) + size)
                    yield COMPRESSED, start, at - start, entry
                    continue
                if not entry:
                    index = zero_end(table, index, last + 1)
                    kind, host = HOLE, -1
                elif entry & ZERO_FLAG:
                    # A hole in the data file has room in it; the zeros of a plain zero cluster have none.
                    self._check_entry(entry, place, first)
                    host = entry & OFFSET
                    kind = ZERO_ALLOCATED if host else ZERO
                    step = size if host else 0
                    while index <= last and table[index] == entry + step * (index - first):
                        index += 1
                else:
                    self._check_entry(entry, place, first)
                    kind, host = DATA, entry & OFFSET
                    if not host and not self.has_data_file:  # a flag alone: no cluster
                        kind, host = HOLE, -1
                    else:
                        index = run_end(table, first, last + 1, size)
                at = min(stop, (start & -size) + size * (index - first))
                yield kind, start, at - start, host + (start & (size - 1)) if host >= 0 and kind != ZERO else -1

    def _check_entry(self, entry: int, table: int, index: int) -> None:
        """A standard cluster's entry: no reserved bits, aligned, and inside what can be addressed."""
        if entry & ~STANDARD or entry & OFFSET & (self.cluster_size - 1):
            raise self.fault(f"an L2 entry is damaged ({entry:#x})", table + index * 8 * self._stride)
        if self.header.version < 3 and entry & ZERO_FLAG:
            raise self.fault("an L2 entry of version 2 has the zero flag", table + index * 8)

    def _subclusters(self, table: array[int], place: int, entries: range, at: int, stop: int) -> Iterator[Run]:
        """Runs of extended L2 entries, neighbours joined."""
        held: Run | None = None
        for run in self._each_subcluster(table, place, entries, at, stop):
            if (
                held is not None
                and held[0] == run[0] != COMPRESSED
                and (run[3] == (held[3] + held[2] if held[3] >= 0 else -1))
            ):
                held = held[0], held[1], held[2] + run[2], held[3]
                continue
            if held is not None:
                yield held
            held = run
        if held is not None:
            yield held

    def _each_subcluster(self, table: array[int], place: int, entries: range, at: int, stop: int) -> Iterator[Run]:
        size = self.cluster_size
        part = size // SUBCLUSTERS
        for number in entries:
            entry, bitmap = table[2 * number], table[2 * number + 1]
            base = at & -size
            end = min(stop, base + size)
            if entry & COMPRESSED_FLAG:
                yield COMPRESSED, at, end - at, entry
                at = end
                continue
            host = entry & OFFSET
            if entry:
                self._check_entry(entry, place, number)
            allocated, zeroed = bitmap & ALL_SUBCLUSTERS, bitmap >> 32
            # With an external data file, offset 0 is a place as any other, marked by the flag "copied".
            has_host = bool(host) or bool(entry and self.has_data_file)
            if allocated & zeroed or (allocated and not has_host) or entry & ZERO_FLAG:
                raise self.fault("an extended L2 entry is damaged", place + number * 16)
            while at < end:
                bit = (at - base) // part
                kind = DATA if allocated >> bit & 1 else ZERO if zeroed >> bit & 1 else HOLE
                word = allocated if kind == DATA else zeroed if kind == ZERO else ~(allocated | zeroed)
                rest = ~(word >> bit) & ((1 << (SUBCLUSTERS - bit)) - 1)
                count = (rest & -rest).bit_length() - 1 if rest else SUBCLUSTERS - bit
                upto = min(end, base + (bit + count) * part)
                if kind == DATA:
                    yield DATA, at, upto - at, host + at - base
                elif has_host:
                    yield ZERO_ALLOCATED if kind == ZERO else HOLE, at, upto - at, host + at - base
                else:
                    yield kind, at, upto - at, -1
                at = upto

    # -- data

    def compressed_place(self, descriptor: int) -> tuple[int, int]:
        """Offset and length in the file of a compressed cluster, by its L2 entry ("Compressed Clusters Descriptor")."""
        shift = 62 - (self.cluster_bits - 8)
        offset = descriptor & ((1 << shift) - 1)
        sectors = (descriptor >> shift & ((1 << (self.cluster_bits - 8)) - 1)) + 1
        return offset, sectors * 512 - (offset & 511)

    def read_compressed(self, descriptor: int, start: int) -> bytes:
        last = self._last  # once: another thread may replace it
        if last is not None and last[0] == descriptor:
            return last[1]
        offset, length = self.compressed_place(descriptor)
        if self.has_data_file:
            raise self.fault(
                f"the cluster of disk offset {start:#x} is compressed beside an external data file", offset
            )
        if offset >= self.file_end:
            self.file_end = os.lseek(self.fd, 0, os.SEEK_END)  # written since
        if offset >= self.file_end:
            raise self.fault(f"the compressed cluster of disk offset {start:#x} is outside the file", offset)
        data = os.pread(self.fd, length, offset)
        try:
            if self.header.compression == 0:
                cluster = inflate(data, self.cluster_size)
            else:
                from kvik.image.zstd import decompress

                cluster = decompress(data, self.cluster_size)
        except ImageError as error:
            raise self.fault(f"the compressed cluster of disk offset {start:#x}: {error.message}", offset) from None
        self._last = descriptor, cluster
        return cluster

    # -- holes of preallocated images

    def _is_preallocated(self) -> bool:
        """Whether many clusters that count as used have no room in the file: then holes there are zeros (QEMU's
        qcow2_detect_metadata_preallocation)."""
        if self._preallocated is None:
            self._preallocated = self._detect_preallocation()
        return self._preallocated

    def _detect_preallocation(self) -> bool:
        if self.has_data_file or self.writable:
            return False
        status = os.fstat(self.fd)
        real = status.st_blocks * 512 >> self.cluster_bits
        threshold = max(real * 10 // 9, real + 2)
        if status.st_size >> self.cluster_bits < threshold:
            return False
        last = (status.st_size + self.cluster_size - 1) >> self.cluster_bits
        used = 0
        for first, block in self.refcounts.used():
            inside = block[: max(0, last - first)]
            used += len(inside) - inside.count(0)
            if used >= threshold:
                return True
        return False

    def _by_holes(self, run: Run) -> Iterator[Run]:
        """A run of data as what the file has of it: holes are zeros with room."""
        from kvik.image.raw import segments

        kind, start, length, host = run
        for offset, size, is_data in segments(self.fd, host, length, self.file_end):
            yield (kind if is_data else DATA_HOLE), start + offset - host, size, offset
