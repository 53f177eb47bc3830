"""Repair of what a check found: references counted anew, leaks given back, flags set right.

Entries that lead nowhere are told and left: what they meant cannot be known. Refcount blocks or a table that cannot be
used are made anew behind everything else, as QEMU's rebuild_refcount_structure does.
"""

from __future__ import annotations

import os
from array import array

from kvik.image.base import write_fully
from kvik.image.qcow2.check import Checker
from kvik.image.qcow2.header import MAX_REFCOUNT_TABLE
from kvik.image.qcow2.refcount import blank_block, pack_block
from kvik.image.qcow2.tables import write_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.image.qcow2.allocator import Qcow2Allocator

__all__ = ["repair"]


def repair(image: Qcow2Allocator, *, everything: bool) -> tuple[int, int]:
    """(leaks, corruptions) that were set right; only leaks unless `everything`.

    Afterwards the image is no longer marked as dirty, and as corrupt only if something is left.
    """
    checker = Checker(image)
    result = checker.run()
    leaks = corruptions = 0
    if checker.rebuild and everything:
        leaks, corruptions = result.leaks, result.corruptions
        _rebuild(image)
    elif not checker.rebuild:
        refcounts = image.refcounts
        for cluster, stored, found in checker.differences():
            if found > refcounts.maximum or (stored < found and not everything):
                continue
            refcounts.set(cluster, found)
            if stored > found:
                leaks += 1
            else:
                corruptions += 1
        image.write_back()
        os.fdatasync(image.fd)
    if everything:
        fixed = checker.copied_flags(repair=True)
        corruptions = max(corruptions + (0 if checker.rebuild else fixed), fixed)
        os.fdatasync(image.fd)
        image.l2.clear()
        if (image.dirty or image.corrupt) and Checker(image).run().clean:
            image.mark_whole()
    image.refcounts.hint = 0
    image.tables_moved()
    return leaks, corruptions


def _rebuild(image: Qcow2Allocator) -> None:
    """A new refcount table with new blocks, behind all that is in use."""
    counts = Checker(image).all_counts()
    header = image.header
    bits, size = image.cluster_bits, image.cluster_size
    per_block = size * 8 >> header.refcount_order
    first = len(counts.bytes.rstrip(b"\0"))
    blocks = table = 1
    while True:
        used = first + table + blocks
        needed = (used + per_block - 1) // per_block
        if needed <= blocks and blocks * 8 <= table * size:
            break
        blocks = max(blocks, needed)
        table = max(table, (blocks * 8 + size - 1) // size)
    if table * size > MAX_REFCOUNT_TABLE:
        raise image.fault("cannot be repaired: its refcount table would be bigger than 8 MiB")
    counts.extend(first + table + blocks)
    counts.add(first, table + blocks, 1)
    maximum = (1 << (1 << header.refcount_order)) - 1
    for index in range(blocks):
        block = blank_block(per_block, header.refcount_order)
        for i, value in enumerate(counts.bytes[index * per_block : (index + 1) * per_block]):
            if value:
                exact = value if value < 255 else counts.get(index * per_block + i)
                if exact > maximum:
                    raise image.fault("cannot be repaired: a refcount does not fit", (index * per_block + i) << bits)
                block[i] = exact
        write_fully(image.fd, pack_block(block, header.refcount_order), (first + table + index) << bits)
    entries = array("Q", bytes(table * size))
    for index in range(blocks):
        entries[index] = (first + table + index) << bits
    write_table(image.fd, first << bits, entries)
    os.fdatasync(image.fd)
    header.refcount_table_offset = first << bits
    header.refcount_table_clusters = table
    image.write_header()
    os.fdatasync(image.fd)
    image.forget_refcounts()
