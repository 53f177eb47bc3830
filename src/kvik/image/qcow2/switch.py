"""A new state of an image's tables, in force with one sector of its header: how snapshots are made, applied, deleted.

Such a change alters references all over the file, with the flags "refcount is exactly one" in the tables beside them:
written in place, power lost in between would leave flags and counts that contradict each other. So everything that
changes gets a new place: L2 tables, the L1 table, the snapshot table, refcount blocks, the refcount table. When all of
it is on disk the header's first sector, which leads to all of them, is written. Before, the file has the old state and
some data in clusters that count as free; afterwards the new one, and at worst clusters that count as used and are not.

Reference: QEMU's docs/interop/qcow2.rst, "Snapshots" and "Cluster mapping".
"""

from __future__ import annotations

from collections import Counter

from kvik.image.base import write_fully
from kvik.image.qcow2.check import entries_of
from kvik.image.qcow2.snapshots import MAX_TABLE, pack_snapshots, table_size
from kvik.image.qcow2.tables import COMPRESSED_FLAG, COPIED, OFFSET, write_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator

    from kvik.image.qcow2.snapshots import Snapshot
    from kvik.image.qcow2.writer import Qcow2Writer

__all__ = ["Switch"]


class Switch:
    """One change: made in memory with `count` and `free`, brought about by `commit`. Not committed, nothing happened:

    with Switch(image, l1) as change:
        change.count(table, 1)
        ...
        change.commit(l1, snapshots)
    """

    def __init__(self, image: Qcow2Writer, l1: array[int]) -> None:
        self._image = image
        self._l1 = l1  # which is to be the active table
        self._gone: list[tuple[int, int]] = []  # (first cluster, count) that lost references
        self._old: list[tuple[int, int]] = []  # (offset, clusters) to be released behind the switch
        self._end = 0  # the cluster behind the last that is in use before the change
        self._done = False

    def __enter__(self) -> Switch:
        image = self._image
        image.check_writable()
        image.begin(data=False)
        image.check_structure()
        image.write_back()
        image.barrier()
        # What is to come must not make the refcount table grow midway.
        tables = sum(1 for entry in self._l1 if entry & OFFSET)
        others = (len(self._l1) * 8 + table_size(image.snapshots) + 4096) >> image.cluster_bits
        image.refcounts.make_room(tables + others)
        image.write_back()
        image.barrier()
        image.refcounts.may_grow = False
        self._end = image.refcounts.end()
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._done:
            self._image.reload()

    # -- what changes

    def _walk(self, l1: array[int]) -> Iterator[tuple[int, int, array[int]]]:
        """(offset, entries that lead there, table) of the L2 tables under an L1 table, each once."""
        image = self._image
        tables = Counter(entry & OFFSET for entry in l1 if entry & OFFSET)
        for offset, weight in tables.items():
            self._check_place(offset, 1)
            yield offset, weight, image.l2.get(offset)

    def _check_place(self, offset: int, count: int) -> None:
        """Only a damaged image shares the clusters of its other tables."""
        image = self._image
        first = offset >> image.cluster_bits
        if offset & (image.cluster_size - 1) or image.in_structure(first, count):
            raise image.fault("a table entry leads to another table of the image", offset, image.repair_hint)

    def count(self, l1: array[int], delta: int) -> None:
        """All that an L1 table leads to gets or loses a reference for each way that leads there."""
        image = self._image
        bits = image.cluster_bits
        for offset, weight, table in self._walk(l1):
            self._add(offset >> bits, 1, delta * weight)
            if not any(table):
                continue
            for _, count, entry in entries_of(table, image.cluster_size, image.extended):
                if entry & COMPRESSED_FLAG:
                    at, length = image.compressed_place(entry)
                    first = at >> bits
                    count = ((at + length - 1) >> bits) - first + 1
                elif entry & OFFSET:
                    first = (entry & OFFSET) >> bits
                else:
                    continue
                self._check_place(first << bits, count)
                self._add(first, count, delta * weight)

    def _add(self, first: int, count: int, delta: int) -> None:
        self._image.refcounts.add(first, count, delta)
        if delta < 0:
            self._gone.append((first, count))

    def free(self, offset: int, length: int) -> None:
        """A table's clusters lose a reference, once nothing leads there."""
        if length:
            size = self._image.cluster_size
            self._old.append((offset, (length + size - 1) // size))

    # -- bringing it about

    def commit(self, l1: array[int], snapshots: list[Snapshot], *, keep_l1: bool = False, size: int = -1) -> None:
        """From now on the active table is (a copy of) `l1`, the snapshot table has `snapshots`, and the disk is `size`
        bytes long (-1: as it is). With `keep_l1` the clusters of the active table until now stay in use."""
        image = self._image
        header, refcounts, bits = image.header, image.refcounts, image.cluster_bits
        packed = pack_snapshots(snapshots)
        if len(packed) > MAX_TABLE:
            raise image.fault("has no room left in its snapshot table", remedy="delete snapshots that nobody needs")
        if self._gone:
            refcounts.hint = self._end  # clusters that become free are still needed until the switch
        table = self._active(l1)
        if not keep_l1:
            self.free(header.l1_offset, header.l1_size * 8)
        l1_offset = header.l1_offset
        if len(table):
            l1_offset = self._write(table)
        self.free(header.snapshots_offset, table_size(image.snapshots))
        snapshots_offset = 0
        if packed:
            snapshots_offset = image.allocate((len(packed) + image.cluster_size - 1) >> bits, table=True)
            write_fully(image.fd, packed + bytes(-len(packed) % image.cluster_size), snapshots_offset)
        self._old += refcounts.shadow()
        image.barrier()
        header.l1_offset, header.l1_size = l1_offset, len(table)
        header.snapshots_offset, header.nb_snapshots = snapshots_offset, len(snapshots)
        if size >= 0:
            header.size = image.size = size
        image.write_header()
        image.barrier()
        self._done = refcounts.may_grow = True
        image.l1 = table
        image.l2.clear()
        for one in snapshots:
            one.room = len(one.pack())
        image.set_snapshots(snapshots)
        image.tables_moved()
        for offset, count in self._old:
            image.release_later(offset, count)
        image.write_back()
        image.give_back(self._gone)
        refcounts.hint = 0

    def _write(self, table: array[int]) -> int:
        image = self._image
        count = (len(table) * 8 + image.cluster_size - 1) >> image.cluster_bits
        offset = image.allocate(count, table=True)
        padded = table[:]
        padded.frombytes(bytes((count << image.cluster_bits) - len(table) * 8))
        write_table(image.fd, offset, padded)
        return offset

    def _active(self, l1: array[int]) -> array[int]:
        """A copy of `l1` whose flags are right, as are those of its L2 tables: where one changes it has a new place."""
        image = self._image
        table = l1[:]
        for number, entry in enumerate(l1):
            place = entry & OFFSET
            if not place:
                continue
            wanted = self._with_flags(image.l2.get(place))
            if wanted is None:
                alone = image.refcounts.get(place >> image.cluster_bits) == 1
                table[number] = place | (COPIED if alone else 0)
                continue
            new = image.allocate(1, table=True)
            write_table(image.fd, new, wanted)
            self._old.append((place, 1))
            table[number] = new | COPIED
        return table

    def _with_flags(self, table: array[int]) -> array[int] | None:
        """The L2 table with its flags by the refcounts; None if they are right."""
        if not any(table):
            return None
        image = self._image
        stride = 2 if image.extended else 1
        changed = table[:]
        for index, count, entry in entries_of(table, image.cluster_size, image.extended):
            place = entry & OFFSET
            if entry & COMPRESSED_FLAG or not place:
                continue
            first = place >> image.cluster_bits
            for number, value in enumerate(image.refcounts.values(first, count)):
                slot = (index + number) * stride
                if value == 1:
                    changed[slot] |= COPIED
                else:
                    changed[slot] &= ~COPIED & (1 << 64) - 1
        return None if changed == table else changed
