"""Making a qcow2 image bigger or smaller, in place.

One that shrinks gives back the clusters behind its new end, and its file ends after the last cluster in use. Power lost
meanwhile leaves an image of the old or of the new size, at worst with leaked clusters and inconsistent bitmaps.
Reference: QEMU's docs/interop/qcow2.rst, "Header", "Cluster mapping" and "Bitmaps".
"""

from __future__ import annotations

import os
from array import array

from kvik.errors import InvalidArgument, OperationInvalid
from kvik.image.qcow2.bitmaps import IN_USE, Bitmap, bitmap_table, read_bits
from kvik.image.qcow2.header import AUTOCLEAR_RAW, MAX_L1
from kvik.image.qcow2.tables import OFFSET, write_table
from kvik.image.qcow2.tracking import store_bits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.image.qcow2.writer import Qcow2Writer

__all__ = ["resize_qcow2"]


def resize_qcow2(image: Qcow2Writer, size: int, preallocation: str) -> None:
    """See `kvik.image.resize.resize`."""
    if size % 512:
        raise InvalidArgument("The new size must be a multiple of 512")
    _check(image)
    if size < image.size:
        _shrink(image, size)
    elif size > image.size:
        _grow(image, size, preallocation)


def _check(image: Qcow2Writer) -> None:
    image.check_writable()
    if image.header.nb_snapshots and image.header.version < 3:
        raise OperationInvalid(
            f"{image.path}: Can't resize a v2 image which has snapshots",
            remedy="delete its snapshots, or make it version 3: kvik img amend -o compat=1.1",
        )
    for bitmap in image.bitmaps:
        if bitmap.flags & IN_USE:
            raise OperationInvalid(
                f"{image.path}: its bitmap {bitmap.name!r} is inconsistent and cannot be resized",
                remedy=f"remove it: kvik img bitmap --remove {image.path} {bitmap.name}",
            )


class _Bitmaps:
    """The bits of all bitmaps while the disk's size changes; on disk they count as in use meanwhile."""

    def __init__(self, image: Qcow2Writer) -> None:
        self._image = image
        self._kept = image.tracking
        self._still: list[tuple[Bitmap, bytearray]] = []  # those that no write changes
        if self._kept is None:
            return
        for bitmap in self._kept.bitmaps:
            if not bitmap.flags & IN_USE:
                self._still.append((bitmap, read_bits(image, bitmap)))
                bitmap.flags |= IN_USE
        if self._still:
            self._kept.write_directory()
            image.barrier()

    def resize(self) -> None:
        """To the image's new size; what is new is not marked."""
        if self._kept is None:
            return
        for bitmap, bits in (*self._still, *self._kept.bits):
            self._resize(bitmap, bits)
        self._image.write_back()
        self._image.barrier()
        for bitmap, bits in self._still:
            store_bits(self._image, bitmap, bits)
            bitmap.flags &= ~IN_USE
        self._image.write_back()
        self._image.barrier()
        self._kept.write_directory()
        self._image.barrier()

    def _resize(self, bitmap: Bitmap, bits: bytearray) -> None:
        image, size = self._image, self._image.size
        needed = bitmap.bytes_needed(size)
        del bits[needed:]
        bits.extend(bytes(needed - len(bits)))
        last = (size + bitmap.granularity - 1) >> bitmap.granularity_bits
        if last & 7:
            bits[-1] &= 0xFF >> (8 - (last & 7))
        table = bitmap_table(image, bitmap)
        entries = (needed + image.cluster_size - 1) // image.cluster_size
        if entries == len(table):
            return
        for entry in table[entries:]:
            if entry & OFFSET:
                image.release_later(entry & OFFSET)
        old, old_clusters = bitmap.table_offset, _clusters(image, len(table) * 8)
        count = _clusters(image, entries * 8)
        whole = table[:entries]
        whole.frombytes(bytes((count << image.cluster_bits) - len(whole) * 8))
        bitmap.table_offset, bitmap.table_size = image.allocate(count, table=True), entries
        write_table(image.fd, bitmap.table_offset, whole)
        image.release_later(old, old_clusters)


def _clusters(image: Qcow2Writer, length: int) -> int:
    return (length + image.cluster_size - 1) >> image.cluster_bits


def _set_size(image: Qcow2Writer, size: int) -> None:
    image.header.size = image.size = size
    image.write_header()
    image.barrier()


def _grow(image: Qcow2Writer, size: int, preallocation: str) -> None:
    old, header = image.size, image.header
    needed = header.l1_needed(size)
    if needed * 8 > MAX_L1:
        raise InvalidArgument(
            f"a disk of {size} bytes is too big for clusters of {image.cluster_size} bytes",
            remedy="convert it to an image with a bigger cluster_size",
        )
    image.begin()
    image.forget_vm_state()
    bitmaps = _Bitmaps(image)
    if needed > header.l1_size:
        _grow_l1(image, needed)
    if image.has_data_file:
        os.ftruncate(image.data_fd, size)
        if header.autoclear & AUTOCLEAR_RAW and preallocation == "off":
            preallocation = "metadata"
    image.size = size
    _clear(image, old, size)  # before anybody sees what is new
    image.write_back()
    image.barrier()
    _set_size(image, size)
    bitmaps.resize()
    cluster = image.cluster_size
    first = (old + cluster - 1) & -cluster
    if preallocation != "off" and first < size:
        from kvik.image.qcow2.preallocate import preallocate_range

        try:
            preallocate_range(image, first, size - first, preallocation)
        except OSError:
            try:
                _shrink(image, old)
            except OSError:
                pass  # it stays bigger, without its room
            raise
    image.flush()


def _clear(image: Qcow2Writer, old: int, size: int) -> None:
    """What is new reads as zero: the rest of the last cluster, and where the image below is longer."""
    cluster = image.cluster_size
    end = min(size, (old + cluster - 1) & -cluster)
    if image.header.backing_file is not None:
        below = image.backing
        end = max(end, min(size, below.size)) if below is not None else size
    if end > old:
        image.write_zeroes(old, end - old)


def _grow_l1(image: Qcow2Writer, entries: int) -> None:
    """A longer L1 table in a new place; the header follows when it is there."""
    header = image.header
    image.write_back()
    bits = image.cluster_bits
    old_offset, old_clusters = header.l1_offset, _clusters(image, header.l1_size * 8)
    count = _clusters(image, entries * 8)
    place = image.allocate(count, table=True)
    table = image.l1[:]
    table.frombytes(bytes((entries - len(table)) * 8))
    image.write_back()  # its refcounts before anything leads to it
    whole = array("Q", table)
    whole.frombytes(bytes((count << bits) - len(whole) * 8))
    write_table(image.fd, place, whole)
    image.barrier()
    image.l1 = table
    header.l1_offset, header.l1_size = place, entries
    image.write_header()
    image.barrier()
    image.tables_moved()
    if old_clusters:
        image.release_later(old_offset, old_clusters)


def _shrink(image: Qcow2Writer, size: int) -> None:
    old, cluster = image.size, image.cluster_size
    image.begin()
    image.forget_vm_state()
    bitmaps = _Bitmaps(image)
    _set_size(image, size)
    first = (size + cluster - 1) & -cluster
    image.unmap(first, ((old + cluster - 1) & -cluster) - first)
    image.write_back()
    image.forget_vm_state()  # and the tables that lead to nothing any more
    bitmaps.resize()
    if image.has_data_file:
        os.ftruncate(image.data_fd, size)
    image.flush()
    if not image.has_data_file:
        image.truncate_tail()
