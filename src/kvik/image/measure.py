"""How much room an image will take, as `qemu-img measure` reckons it.

Reference: QEMU's docs/interop/qcow2.rst for what the tables take; that a qcow2 file which holds little data is reckoned
with the tables of one that is full is qemu-img's way.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument
from kvik.image.base import COMPRESSED, DATA
from kvik.image.create import CreateOptions, new_header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.image.base import Image

__all__ = ["Measure", "measure"]


class Measure:
    """Bytes: of the new file with the data there is, of one that is full, and of its bitmaps (None: cannot be)."""

    __slots__ = ("bitmaps", "fully_allocated", "required")

    def __init__(self, required: int, fully_allocated: int, bitmaps: int | None = None) -> None:
        self.required = required
        self.fully_allocated = fully_allocated
        self.bitmaps = bitmaps


def measure(format: str, *, size: int | None = None, source: Image | None = None, **options: Any) -> Measure:
    """What a new image of `size` bytes takes, or one into which `source` is converted.

    `options` are those of `CreateOptions`. Raises `InvalidArgument`, `ImageError`.
    """
    if source is not None:
        size = source.size
    if size is None:
        raise InvalidArgument("neither a size nor an image was given to measure")
    size = (size + 511) & -512
    if format == "raw":
        return Measure(size, size)
    if format != "qcow2":
        raise InvalidArgument(f"images of format '{format}' cannot be measured", remedy="raw or qcow2")
    chosen = CreateOptions(**options)
    chosen.check()
    new_header(size, chosen)  # raises where the disk is too big
    cluster = chosen.cluster_size
    virtual = (size + cluster - 1) & -cluster
    required = 0
    if chosen.preallocation in ("falloc", "full"):
        required = virtual
    elif source is not None:
        required = virtual if chosen.backing_file is not None else _clusters(source, cluster)
    full = _prealloc_size(virtual, cluster, chosen.refcount_bits, 16 if chosen.extended_l2 else 8)
    bitmaps = None
    if source is not None and chosen.version >= 3:
        bitmaps = _bitmaps(source, cluster)
    return Measure(full - virtual + required, full, bitmaps)


def _clusters(source: Image, cluster: int) -> int:
    """Bytes of the clusters that have data."""
    found = end = 0
    for kind, start, length, _, _ in source.pieces(0, source.size):
        if kind in (DATA, COMPRESSED):
            first, last = max(end, start & -cluster), (start + length + cluster - 1) & -cluster
            found += max(0, last - first)
            end = max(end, last)
    return found


def _up(number: int, unit: int) -> int:
    return (number + unit - 1) // unit * unit


def _prealloc_size(virtual: int, cluster: int, refcount_bits: int, entry: int) -> int:
    """Header, L2 tables, L1 table, refcounts and data of an image that is full."""
    entries = _up(virtual // cluster, cluster // entry)
    tables = cluster + entries * entry + _up(entries * entry // cluster, cluster // 8) * 8
    clusters = (tables + virtual) // cluster
    per_block = cluster * 8 // refcount_bits
    blocks = table = last = -1
    n = blocks = table = 0
    while n != last:
        last = n
        blocks = (clusters + table + blocks + per_block - 1) // per_block
        table = (blocks + cluster // 8 - 1) // (cluster // 8)
        n = clusters + blocks + table
    return tables + (blocks + table) * cluster + virtual


def _bitmaps(source: Image, cluster: int) -> int | None:
    """What copies of the source's bitmaps take: all of their bits, tables and directory."""
    from kvik.image.qcow2.bitmaps import IN_USE
    from kvik.image.qcow2.reader import Qcow2Reader

    if not isinstance(source, Qcow2Reader) or source.header.version < 3:
        return None
    found = directory = 0
    for bitmap in source.bitmaps:
        if bitmap.flags & IN_USE:
            continue
        clusters = (bitmap.bytes_needed(source.size) + cluster - 1) // cluster
        found += clusters * cluster + _up(clusters * 8, cluster)
        directory += len(bitmap.pack())
    return found + _up(directory, cluster)
