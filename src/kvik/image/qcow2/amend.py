"""Options of an existing qcow2 image changed, as `qemu-img amend` does it: version, refcount width, lazy refcounts,
name of the data file. Each change is in force with one write of the header, when all it needs is on disk.

Reference: QEMU's docs/interop/qcow2.rst, "Header"; qcow2_amend_options.
"""

from __future__ import annotations

import os
from array import array

from kvik.errors import InvalidArgument
from kvik.image.base import ZERO, ZERO_ALLOCATED, write_fully
from kvik.image.create import COMPATS
from kvik.image.qcow2.header import AUTOCLEAR_RAW, DIRTY, LAZY_REFCOUNTS, MAX_REFCOUNT_TABLE
from kvik.image.qcow2.refcount import TABLE_OFFSET, blank_block, pack_block
from kvik.image.qcow2.switch import Switch
from kvik.image.qcow2.tables import COMPRESSED_FLAG, OFFSET, ZERO_FLAG, read_table, write_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.image.qcow2.writer import Qcow2Writer

__all__ = ["AMENDABLE", "amend"]

# attributes of `CreateOptions`
AMENDABLE = (
    "backing_file",
    "backing_format",
    "compat",
    "data_file",
    "data_file_raw",
    "lazy_refcounts",
    "refcount_bits",
)


def amend(image: Qcow2Writer, **options: Any) -> None:
    """`options` are those of `CreateOptions` that `AMENDABLE` names.

    Raises `InvalidArgument` for what cannot be changed, before anything is; `ImageError`.
    """
    _check(image, options)
    image.check_writable()
    image.begin(data=False)
    image.flush()
    version = COMPATS[options["compat"]] if "compat" in options else image.header.version
    if version > image.header.version:
        _upgrade(image)
    bits = options.get("refcount_bits")
    if bits is not None and bits != 1 << image.header.refcount_order:
        change_refcount_bits(image, bits)
    header = image.header
    if "data_file" in options:
        header.data_file = options["data_file"] or None
    if options.get("data_file_raw") is False:
        header.autoclear &= ~AUTOCLEAR_RAW
    if "lazy_refcounts" in options:
        header.compatible &= ~LAZY_REFCOUNTS
        header.compatible |= LAZY_REFCOUNTS if options["lazy_refcounts"] else 0
    image.write_header()
    if version < header.version:
        _downgrade(image)
    image.flush()


def _check(image: Qcow2Writer, options: dict[str, Any]) -> None:
    header = image.header
    if "compat" in options and options["compat"] not in COMPATS:
        raise InvalidArgument(f"Unknown compatibility level {options['compat']}", remedy="0.10 (v2) or 1.1 (v3)")
    for name in options:
        if name not in AMENDABLE:
            raise InvalidArgument(
                f"Invalid parameter '{name}'", remedy="this option is only supported for image creation"
            )
    version = COMPATS[options["compat"]] if "compat" in options else header.version
    bits = options.get("refcount_bits", 1 << header.refcount_order)
    if bits & (bits - 1) or not 1 <= bits <= 64:
        raise InvalidArgument("Refcount width must be a power of two and may not exceed 64 bits")
    if bits != 16 and version < 3:
        raise InvalidArgument("Refcount widths other than 16 bits require compatibility level 1.1 or above")
    lazy = options.get("lazy_refcounts", bool(header.compatible & LAZY_REFCOUNTS) and version == header.version)
    if lazy and version < 3:
        raise InvalidArgument(
            "Lazy refcounts only supported with compatibility level 1.1 and above", remedy="use compat=1.1"
        )
    named = options.get("backing_file"), options.get("backing_format")
    if named not in ((None, None), (header.backing_file, header.backing_format)):
        raise InvalidArgument("Cannot amend the backing file", remedy="use 'kvik img rebase' instead")
    if "data_file" in options and not image.has_data_file:
        raise InvalidArgument("data-file can only be set for images that use an external data file")
    if options.get("data_file_raw") and not header.autoclear & AUTOCLEAR_RAW:
        raise InvalidArgument("data-file-raw cannot be set on existing images")
    if version < header.version:
        _check_downgrade(image)


def _upgrade(image: Qcow2Writer) -> None:
    """Version 2 to 3: snapshots say how big their disk was, then the header has its new fields."""
    if any(one.disk_size is None for one in image.snapshots):
        with Switch(image, image.l1) as change:
            snapshots = list(image.snapshots)
            for one in snapshots:
                one.disk_size = image.size if one.disk_size is None else one.disk_size
            change.commit(image.l1, snapshots)
    image.header.version = 3
    image.write_header()
    image.barrier()


def _check_downgrade(image: Qcow2Writer) -> None:
    header = image.header
    if header.incompatible & ~DIRTY:
        raise InvalidArgument("Cannot downgrade an image with incompatible features set")
    if image.bitmaps:
        raise InvalidArgument("Cannot downgrade an image with bitmaps", remedy="remove them: kvik img bitmap --remove")
    for snapshot in image.snapshots:
        if snapshot.vm_state_size or snapshot.disk_size not in (None, image.size):
            raise InvalidArgument("Internal snapshots prevent downgrade of image", remedy="delete them first")
        l1 = read_table(image.fd, image.path, snapshot.l1_offset, snapshot.l1_size, "snapshot's L1 table")
        for place in sorted({entry & OFFSET for entry in l1 if entry & OFFSET}):
            if any(entry & ZERO_FLAG and not entry & COMPRESSED_FLAG for entry in image.l2.get(place)):
                raise InvalidArgument(
                    f"the snapshot '{snapshot.name}' has zero clusters, which version 2 has not",
                    remedy=f"delete it first: kvik img snapshot -d {snapshot.id} {image.path}",
                )


def _downgrade(image: Qcow2Writer) -> None:
    """Version 3 to 2, which has no zero clusters: they become holes, or data where an image is below."""
    size = image.cluster_size
    at = 0
    while at < image.size:
        length = min(image.size - at, 64 << 20)
        zeros = [run for run in image.runs(at, length) if run[0] in (ZERO, ZERO_ALLOCATED)]
        for _, start, count, _ in zeros:
            if image.header.backing_file is None:
                image.unmap(start, (count + size - 1) & -size)
                continue
            for first in range(start, start + count, 1 << 20):
                image.write(first, bytes(min(1 << 20, start + count - first)))
        at += length
    image.flush()
    image.unmark()  # which version 2 has no bit for
    header = image.header
    header.version, header.compatible, header.autoclear, header.extra = 2, 0, 0, b""
    image.write_header()


def change_refcount_bits(image: Qcow2Writer, bits: int) -> None:
    """All refcounts in a new table and new blocks, behind everything; the old ones are free when the header leads
    there."""
    header, refcounts = image.header, image.refcounts
    order, size = bits.bit_length() - 1, image.cluster_size
    per_block, maximum = size * 8 >> order, (1 << bits) - 1
    old = {(entry & TABLE_OFFSET) >> image.cluster_bits for entry in refcounts.table if entry & TABLE_OFFSET}
    first_old = header.refcount_table_offset >> image.cluster_bits
    old.update(range(first_old, first_old + header.refcount_table_clusters))
    first = refcounts.end()
    blocks = table = 1
    while True:
        needed = (first + table + blocks + per_block - 1) // per_block
        if needed <= blocks and blocks * 8 <= table * size:
            break
        blocks = max(blocks, needed)
        table = max(table, (blocks * 8 + size - 1) // size)
    if table * size > MAX_REFCOUNT_TABLE:
        raise image.fault("its refcount table would be bigger than 8 MiB", remedy="use fewer refcount_bits")
    for index in range(blocks):
        begin = index * per_block
        block = blank_block(per_block, order)
        for number, value in enumerate(refcounts.values(begin, max(0, min(per_block, first - begin)))):
            if value > maximum:
                raise image.fault(
                    f"Cannot decrease refcount entry width to {bits} bits: a cluster has a refcount of {value}",
                    (begin + number) << image.cluster_bits,
                    "delete snapshots, or keep more bits",
                )
            block[number] = 0 if begin + number in old else value
        for number in range(max(0, first - begin), max(0, min(per_block, first + table + blocks - begin))):
            block[number] = 1
        write_fully(image.fd, pack_block(block, order), (first + table + index) << image.cluster_bits)
    entries = array("Q", bytes(table * size))
    for index in range(blocks):
        entries[index] = (first + table + index) << image.cluster_bits
    write_table(image.fd, first << image.cluster_bits, entries)
    image.barrier()
    header.refcount_order = order
    header.refcount_table_offset, header.refcount_table_clusters = first << image.cluster_bits, table
    image.write_header()
    image.barrier()
    image.forget_refcounts()
    image.file_end = os.lseek(image.fd, 0, os.SEEK_END)
