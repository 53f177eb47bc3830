"""Consistency of a qcow2 image: every reference is followed and counted, the counts compared with those in the file.

As `qemu-img check` does it (QEMU's qcow2-refcount.c), with two differences: a table that is reached many times, as
those of snapshots are, is walked once and counted as often; and nothing is ever read outside the file.
Memory is one byte a cluster of the file, and the file's own tables one at a time. A file of more clusters than WINDOW
is walked once for each such part of it, so that memory stays bounded.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter

from kvik.errors import ImageError
from kvik.image.qcow2.bitmaps import bitmap_table
from kvik.image.qcow2.counts import Counts, last_used, widen
from kvik.image.qcow2.header import MAX_L1
from kvik.image.qcow2.reader import ALL_SUBCLUSTERS, Qcow2Reader
from kvik.image.qcow2.snapshots import table_size
from kvik.image.qcow2.tables import COMPRESSED_FLAG, COPIED, OFFSET, ZERO_FLAG, read_table, run_end, write_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["CheckResult", "check"]

WINDOW = (
    64 << 20
)  # clusters that are counted at once: bounds memory at 64 MiB. A multiple of what a refcount block holds
MAX_WINDOWS = 16  # 64 TiB in clusters of 64 KiB
MAX_TABLES = 1 << 20  # different L2 tables; remembering them takes some 200 MiB
MOST_MESSAGES = 1000
_TABLE_OFFSET = 0xFFFF_FFFF_FFFF_FE00


class CheckResult:
    """What a check found; the names are QEMU's (qapi's ImageCheck)."""

    __slots__ = (
        "allocated_clusters",
        "check_errors",
        "compressed_clusters",
        "corruptions",
        "corruptions_fixed",
        "fragmented_clusters",
        "image_end_offset",
        "leaks",
        "leaks_fixed",
        "messages",
        "total_clusters",
    )

    def __init__(self) -> None:
        self.corruptions = self.leaks = self.check_errors = 0
        self.corruptions_fixed = self.leaks_fixed = 0
        self.total_clusters = self.allocated_clusters = 0
        self.fragmented_clusters = self.compressed_clusters = 0
        self.image_end_offset = 0
        self.messages: list[str] = []

    @property
    def clean(self) -> bool:
        return not (self.corruptions or self.leaks or self.check_errors)

    def say(self, text: str) -> None:
        if len(self.messages) < MOST_MESSAGES:
            self.messages.append(text)
        elif len(self.messages) == MOST_MESSAGES:
            self.messages.append("(and more)")

    def error(self, text: str) -> None:
        self.corruptions += 1
        self.say(f"ERROR: {text}")


class Checker:
    """One check of one image."""

    def __init__(self, image: Qcow2Reader, progress: Callable[[int, int], None] | None = None) -> None:
        self._image, self._progress = image, progress
        size = os.fstat(image.fd).st_size or os.lseek(image.fd, 0, os.SEEK_END)
        clusters = (size + image.cluster_size - 1) >> image.cluster_bits
        self._windows = max(1, (clusters + WINDOW - 1) // WINDOW)
        if self._windows > MAX_WINDOWS:
            raise image.fault(f"has {clusters} clusters, more than can be checked ({WINDOW * MAX_WINDOWS})")
        self.result = CheckResult()
        self.rebuild = False  # whether the refcount structure itself is damaged
        self._first = _Walk(image, self.result, 0, self._tell(0))

    def _tell(self, number: int) -> Callable[[int, int], None] | None:
        progress, windows = self._progress, self._windows
        if progress is None:
            return None
        return lambda done, of: progress(number * of + done, windows * of)

    def run(self) -> CheckResult:
        for walk in self._walks():
            self.rebuild = self.rebuild or walk.rebuild
            walk.compare(self.result)
        self._first.copied_flags(repair=False)
        return self.result

    def _walks(self) -> Iterator[_Walk]:
        """All references counted, a part of the file after the other. What is wrong on the way is told once."""
        yield self._first.walked()
        for number in range(1, self._windows):
            yield _Walk(self._image, CheckResult(), number * WINDOW, self._tell(number)).walked()

    def differences(self) -> Iterator[tuple[int, int, int]]:
        """(cluster, refcount in the file, references found) where they are not the same."""
        for walk in self._walks():
            yield from walk.differences()

    def copied_flags(self, *, repair: bool) -> int:
        """The flag "refcount is exactly one" of the active tables' entries, against the file's refcounts; how many
        were set right."""
        return self._first.copied_flags(repair=repair)

    def all_counts(self) -> Counts:
        """References to every cluster, but those to the refcounts themselves. ImageError if that is too much."""
        if self._windows > 1:
            raise self._image.fault("has too many clusters for its refcounts to be made anew")
        self._first.count()
        return self._first.counts


class _Walk:
    """Every reference followed once; counted are those to one part of the file."""

    def __init__(
        self, image: Qcow2Reader, result: CheckResult, start: int, progress: Callable[[int, int], None] | None
    ) -> None:
        self.image = image
        self.progress = progress
        self.result = result
        self._done = False
        self.highest = 0  # offset behind the last cluster in use that `differences` met
        self.bits = image.cluster_bits
        self.size = image.cluster_size
        self.file_size = os.fstat(image.fd).st_size or os.lseek(image.fd, 0, os.SEEK_END)
        self.clusters = (self.file_size + self.size - 1) >> self.bits
        self.counts = Counts(start, max(0, min(self.clusters - start, WINDOW)))
        self.active: Counter[int] = (
            Counter()
        )  # L2 tables by the number of entries of the active L1 table that lead there
        self.all: Counter[int] = Counter()
        self.rebuild = False  # whether the refcount structure itself is damaged

    # -- counting

    def mark(self, offset: int, length: int, what: str, weight: int = 1) -> bool:
        """Count the clusters of a range of the file; False, and an error, if it is not in the file."""
        if length <= 0:
            return True
        if offset + length > self.clusters << self.bits:
            self.result.error(f"{what} at offset {offset:#x} is outside the file")
            return False
        first = offset >> self.bits
        self.counts.add(first, ((offset + length - 1) >> self.bits) - first + 1, weight)
        return True

    def walked(self) -> _Walk:
        if not self._done:
            self._done = True
            self.count()
            self._refcount_structure()
        return self

    def count(self) -> None:
        """Follow every reference, but those to the refcounts themselves."""
        image, header, result = self.image, self.image.header, self.result
        result.total_clusters = (header.size + self.size - 1) >> self.bits
        self.mark(0, self.size, "the header")
        self._walk_l1(image.l1, active=True, weight=1)
        self.mark(header.l1_offset, header.l1_size * 8, "the L1 table")
        self._snapshots()
        if len(self.all) > MAX_TABLES:
            raise image.fault(f"has {len(self.all)} L2 tables, more than can be checked ({MAX_TABLES})")
        for number, (offset, weight) in enumerate(self.all.items()):
            self._walk_l2(offset, weight, self.active[offset])
            if self.progress is not None and not number & 63:
                self.progress(number, len(self.all))
        self._bitmaps()
        if header.encryption is not None:
            at, length = (int.from_bytes(header.encryption[i : i + 8], "big") for i in (0, 8))
            self.mark(at, length, "the encryption header")

    def _walk_l1(self, l1: array[int], *, active: bool, weight: int) -> None:
        for index, entry in enumerate(l1):
            if not entry:
                continue
            offset = entry & OFFSET
            if entry & ~(OFFSET | COPIED):
                self.result.error(f"found an L1 entry with reserved bits set: {entry:x}")
            if not offset:
                continue
            if offset & (self.size - 1):
                self.result.error(f"L2 table is not cluster aligned; L1 entry {index} is corrupted")
                continue
            self.all[offset] += weight
            if active:
                self.active[offset] += 1

    def _snapshots(self) -> None:
        header = self.image.header
        if not header.nb_snapshots:
            return
        try:
            snapshots = self.image.snapshots
        except ImageError as error:
            self.result.error(error.message)
            return
        self.mark(header.snapshots_offset, table_size(snapshots), "the snapshot table")
        tables = Counter((snapshot.l1_offset, snapshot.l1_size) for snapshot in snapshots)
        for (offset, entries), weight in tables.items():
            if entries * 8 > MAX_L1:
                self.result.error(f"the L1 table of a snapshot at {offset:#x} is too big")
            elif self.mark(offset, entries * 8, "the L1 table of a snapshot", weight) and entries:
                l1 = read_table(self.image.fd, self.image.path, offset, entries, "snapshot's L1 table")
                self._walk_l1(l1, active=False, weight=weight)

    def _walk_l2(self, offset: int, weight: int, active: int) -> None:
        result = self.result
        if offset + self.size > self.file_size:
            result.error(f"an L2 table at offset {offset:#x} is outside the file")
            return
        self.mark(offset, self.size, "an L2 table", weight)
        table = read_table(self.image.fd, self.image.path, offset, self.size >> 3, "L2 table")
        if not any(table):
            return
        external = self.image.has_data_file
        following = 0
        allocated = fragmented = compressed = 0
        for index, count, entry in entries_of(table, self.size, self.image.extended):
            if entry & COMPRESSED_FLAG:
                if entry & COPIED:
                    result.error(f"coffset={entry & OFFSET:#x}: copied flag must never be set for compressed clusters")
                if external:
                    result.error("compressed cluster in an image with an external data file")
                    continue
                at, length = self.image.compressed_place(entry)
                self.mark(at, length, "compressed data", weight)
                allocated += 1
                fragmented += 1
                compressed += 1
                continue
            place = entry & OFFSET
            if entry & ~(OFFSET | COPIED | ZERO_FLAG):
                result.error(f"found an L2 entry with reserved bits set: {entry:x}")
            if self.image.extended:
                bitmap = table[2 * index + 1]
                if bitmap & ALL_SUBCLUSTERS & bitmap >> 32:
                    result.error(f"offset={place:x}: subclusters are both allocated and zero")
                if not place and bitmap & ALL_SUBCLUSTERS and not external:
                    result.error(f"L2 entry {index} at {offset:#x}: allocated subclusters without a cluster")
            if not place and not (external and entry & COPIED):
                continue
            if place & (self.size - 1):
                result.error(f"offset={place:x}: cluster is not properly aligned; L2 entry corrupted")
                continue
            allocated += count
            if following and place != following:
                fragmented += 1
            following = place + count * self.size
            if not external:
                self.mark(place, count * self.size, "data", weight)
        result.allocated_clusters += allocated * active
        result.fragmented_clusters += fragmented * active
        result.compressed_clusters += compressed * active

    def _bitmaps(self) -> None:
        header = self.image.header
        if header.bitmaps is None:
            return
        _, size, offset = header.bitmaps
        if not self.mark(offset, size, "the bitmap directory"):
            return
        try:
            bitmaps = self.image.bitmaps
        except ImageError as error:
            self.result.error(error.message)
            return
        for bitmap in bitmaps:
            if not self.mark(bitmap.table_offset, bitmap.table_size * 8, "a bitmap's table"):
                continue
            try:
                entries = bitmap_table(self.image, bitmap)
            except ImageError as error:
                self.result.error(error.message)
                continue
            for entry in entries:
                if entry & OFFSET:
                    self.mark(entry & OFFSET, self.size, "a bitmap's data")

    def _refcount_structure(self) -> None:
        header, refcounts = self.image.header, self.image.refcounts
        self.mark(header.refcount_table_offset, header.refcount_table_clusters << self.bits, "the refcount table")
        for index, entry in enumerate(refcounts.table):
            offset = entry & _TABLE_OFFSET
            if entry & ~_TABLE_OFFSET:
                self.result.error(f"refcount table entry {index} has reserved bits set: {entry:x}")
                self.rebuild = True
            elif offset & (self.size - 1):
                self.result.error(f"refcount block {index} is not cluster aligned; refcount table entry corrupted")
                self.rebuild = True
            elif offset and offset + self.size > self.file_size:
                self.result.error(f"refcount block {index} is outside image")
                self.rebuild = True
            elif offset:
                cluster = offset >> self.bits
                self.counts.add(cluster, 1, 1)
                if self.counts.start <= cluster < self.counts.end and self.counts.get(cluster) != 1:
                    self.result.error(f"refcount block {index} refcount={self.counts.get(cluster)}")
                    self.rebuild = True
            elif any(self.counts.part(index * refcounts.per_block, (index + 1) * refcounts.per_block)):
                self.rebuild = True  # the clusters are told one by one when the counts are compared
        if self.counts.end > len(refcounts.table) * refcounts.per_block:
            behind = self.counts.part(len(refcounts.table) * refcounts.per_block, self.counts.end)
            self.rebuild = self.rebuild or any(behind)

    # -- comparing

    def differences(self) -> Iterator[tuple[int, int, int]]:
        """Of the clusters that are counted here."""
        refcounts, counts = self.image.refcounts, self.counts
        per = refcounts.per_block
        highest = 0
        # What is said of clusters behind the file's end does no harm, and is not looked at.
        for index in range(counts.start // per, (counts.end + per - 1) // per):
            first = index * per
            found = counts.part(first, first + per)
            inside = min(per, counts.end - first)
            try:
                block = refcounts.block(index)
            except ImageError:
                block = None  # told already
            if block is None:
                if any(found):
                    for i, value in enumerate(found):
                        if value:
                            highest = first + i + 1
                            yield first + i, 0, counts.get(first + i)
                continue
            if inside < per:
                block = block[:inside]
            used = max(last_used(block), len(found.rstrip(b"\0")))
            highest = first + used if used else highest
            if len(found) < inside:
                found += bytes(inside - len(found))
            if widen(found, block) == block:
                continue
            for i in range(used):
                value = found[i] if found[i] < 255 else counts.get(first + i)
                if value != block[i]:
                    yield first + i, block[i], value
        self.highest = highest << self.bits

    def compare(self, result: CheckResult) -> None:
        for cluster, stored, found in self.differences():
            if stored > found:
                result.leaks += 1
                result.say(f"Leaked cluster {cluster} refcount={stored} reference={found}")
            else:
                result.corruptions += 1
                result.say(f"ERROR cluster {cluster} refcount={stored} reference={found}")
        result.image_end_offset = max(result.image_end_offset, self.highest)

    def copied_flags(self, *, repair: bool) -> int:
        image = self.image
        fixed = 0
        wrong_l1 = False
        for index, entry in enumerate(image.l1):
            offset = entry & OFFSET
            if not offset or offset & (self.size - 1) or offset + self.size > self.file_size:
                continue
            refcount = self._stored(offset >> self.bits)
            if (refcount == 1) != bool(entry & COPIED):
                wrong_l1 = True
                if repair:
                    image.l1[index] = entry ^ COPIED
                    fixed += 1
                else:
                    self.result.corruptions += 1
                    self.result.say(
                        f"ERROR OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}"
                    )
        for offset in self.active:
            if offset + self.size > self.file_size or offset & (self.size - 1):
                continue
            table = read_table(image.fd, image.path, offset, self.size >> 3, "L2 table")
            wrong = list(self._wrong_entries(table))
            for index, entry, refcount in wrong:
                if repair:
                    table[index] = entry ^ COPIED
                    fixed += 1
                else:
                    self.result.corruptions += 1
                    self.result.say(f"ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}")
            if repair and wrong:
                write_table(image.fd, offset, table)
        if repair and wrong_l1:
            write_table(image.fd, image.header.l1_offset, image.l1)
        return fixed

    def _wrong_entries(self, table: array[int]) -> Iterator[tuple[int, int, int]]:
        stride = 2 if self.image.extended else 1
        external = self.image.has_data_file
        for index, count, entry in entries_of(table, self.size, self.image.extended):
            place = entry & OFFSET
            if entry & COMPRESSED_FLAG or not place or place & (self.size - 1):
                continue
            copied = bool(entry & COPIED)
            if copied and not external and self._all_once(place >> self.bits, count):
                continue
            for number in range(count):
                refcount = 1 if external else self._stored((place >> self.bits) + number)
                if (refcount == 1) != copied:
                    at = (index + number) * stride
                    yield at, table[at], refcount

    def _all_once(self, cluster: int, count: int) -> bool:
        """Whether the file counts one reference to each of a run of clusters."""
        refcounts = self.image.refcounts
        while count:
            index, within = divmod(cluster, refcounts.per_block)
            span = min(count, refcounts.per_block - within)
            try:
                block = refcounts.block(index)
            except ImageError:
                return False
            if block is None:
                return False
            if span == 1:
                same = block[within] == 1
            elif isinstance(block, bytearray):
                same = block.count(1, within, within + span) == span
            else:
                same = block[within : within + span] == array(block.typecode, [1]) * span
            if not same:
                return False
            cluster += span
            count -= span
        return True

    def _stored(self, cluster: int) -> int:
        try:
            return self.image.refcounts.get(cluster)
        except ImageError:
            return 0


def entries_of(table: array[int], size: int, extended: bool) -> Iterator[tuple[int, int, int]]:
    """(index, count, first entry) of the entries in use; `count` entries whose clusters follow each other are one."""
    words = table[0::2] if extended else table
    index, end = 0, len(words)
    while index < end:
        entry = words[index]
        first = index
        index += 1
        if not entry:
            continue
        if not extended and not entry & (COMPRESSED_FLAG | ZERO_FLAG) and entry & OFFSET:
            index = run_end(words, first, end, size)
        yield first, index - first, entry


def check(image: Qcow2Reader, progress: Callable[[int, int], None] | None = None) -> CheckResult:
    """Look at everything; nothing is changed."""
    return Checker(image, progress).run()
