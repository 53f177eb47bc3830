"""Persistent bitmaps made, removed, cleared, merged: all changes together come about with one write of the header.

What changed gets new clusters, as does the directory; those of before are given back when the header leads to the new
ones. Reference: QEMU's docs/interop/qcow2.rst, "Bitmaps"; qemu-img's bitmap command.
"""

from __future__ import annotations

from array import array

from kvik.errors import InvalidArgument, OperationInvalid
from kvik.image.base import write_fully
from kvik.image.qcow2.bitmaps import AUTO, IN_USE, MAX_BITS, Bitmap, bitmap_table, pack_directory, read_bits
from kvik.image.qcow2.header import AUTOCLEAR_BITMAPS, MAX_NAME
from kvik.image.qcow2.tables import OFFSET, write_table
from kvik.image.qcow2.tracking import set_bits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvik.image.qcow2.reader import Qcow2Reader
    from kvik.image.qcow2.writer import Qcow2Writer

__all__ = ["BitmapChanges"]

MOST = 65535


class BitmapChanges:
    """Changes to an image's bitmaps, brought about by `store`. Every method raises `InvalidArgument`,
    `OperationInvalid` or `ImageError` for what cannot be; until `store` nothing happened."""

    def __init__(self, image: Qcow2Writer) -> None:
        if image.tracking is not None:
            raise image.fault("has bitmaps that record its writes now", remedy="close it first")
        self._image = image
        self._before = image.bitmaps
        self._now = list(self._before)
        self._bits: dict[str, bytearray] = {}  # of those that change

    def _find(self, name: str, *, damaged: bool = False) -> Bitmap:
        for bitmap in self._now:
            if bitmap.name == name:
                if bitmap.flags & IN_USE and not damaged:
                    raise OperationInvalid(
                        f"Bitmap '{name}' is inconsistent and cannot be used", remedy="it can only be removed: --remove"
                    )
                return bitmap
        known = ", ".join(bitmap.name for bitmap in self._now[:10]) or "none"
        raise InvalidArgument(f"Dirty bitmap '{name}' not found", remedy=f"the image has: {known}")

    def add(self, name: str, granularity: int | None = None) -> None:
        """A new one, all clear, that records writes."""
        image = self._image
        if image.header.version < 3:
            raise OperationInvalid(
                "Cannot store dirty bitmaps in qcow2 v2 files",
                remedy=f"upgrade it first: kvik img amend -o compat=1.1 {image.path}",
            )
        size = min(65536, max(4096, image.cluster_size)) if granularity is None else granularity
        if size & (size - 1) or not 512 <= size <= 1 << 31:
            raise InvalidArgument("Granularity must be power of 2 and at least 512", remedy="2 GiB is the most")
        if not 0 < len(name.encode(errors="surrogateescape")) <= MAX_NAME:
            raise InvalidArgument(f"a bitmap's name has 1 to {MAX_NAME} bytes")
        if any(bitmap.name == name for bitmap in self._now):
            raise OperationInvalid(f"Bitmap already exists: {name}")
        if len(self._now) >= MOST:
            raise OperationInvalid(f"the image has {MOST} bitmaps already, which is the most")
        bitmap = Bitmap(name, granularity_bits=size.bit_length() - 1)
        if bitmap.bytes_needed(image.size) > MAX_BITS:
            raise OperationInvalid("the bitmap would be too big", remedy="use a bigger granularity: -g 64k")
        self._now.append(bitmap)
        self._bits[name] = bytearray(bitmap.bytes_needed(image.size))

    def remove(self, name: str) -> None:
        self._now.remove(self._find(name, damaged=True))
        self._bits.pop(name, None)

    def clear(self, name: str) -> None:
        self._bits[name] = bytearray(self._find(name).bytes_needed(self._image.size))

    def enable(self, name: str, *, on: bool = True) -> None:
        bitmap = self._find(name)
        copied = Bitmap(
            name,
            granularity_bits=bitmap.granularity_bits,
            flags=bitmap.flags | AUTO if on else bitmap.flags & ~AUTO,
            table_offset=bitmap.table_offset,
            table_size=bitmap.table_size,
            extra=bitmap.extra,
        )
        self._now[self._now.index(bitmap)] = copied

    def merge(self, name: str, source: str, source_image: Qcow2Reader | None = None) -> None:
        """What is set in `source`, of another image where one is given, is set in `name`, too."""
        target = self._find(name)
        if source_image is None:
            other = self._find(source)
            theirs = self._bits_of(other)
        else:
            found = [bitmap for bitmap in source_image.bitmaps if bitmap.name == source]
            if not found:
                raise InvalidArgument(f"Dirty bitmap '{source}' not found", remedy=f"in {source_image.path}")
            other = found[0]
            if other.flags & IN_USE:
                raise OperationInvalid(f"Bitmap '{source}' is inconsistent and cannot be used")
            if source_image.header.size != self._image.size:
                raise OperationInvalid(
                    f"Bitmaps are of different sizes (destination size is {self._image.size}, source size is "
                    f"{source_image.header.size}) and can't be merged"
                )
            theirs = read_bits(source_image, other)
        bits = bytearray(self._bits_of(target))
        if other.granularity_bits == target.granularity_bits:
            joined = int.from_bytes(bits, "little") | int.from_bytes(theirs, "little")
            bits[:] = joined.to_bytes(len(bits), "little")
        else:
            for start, end in runs_of_bits(theirs, other.granularity_bits):
                end = min(end, self._image.size)
                set_bits(bits, start >> target.granularity_bits, ((end - 1) >> target.granularity_bits) + 1)
        self._bits[name] = bits

    def _bits_of(self, bitmap: Bitmap) -> bytearray:
        found = self._bits.get(bitmap.name)
        return read_bits(self._image, bitmap) if found is None else found

    # -- bringing it about

    def store(self) -> None:
        image = self._image
        image.check_writable(data=False)
        image.begin(data=False)
        image.check_structure()
        old: list[tuple[int, int]] = []  # (offset, clusters)
        size = image.cluster_size
        kept = {bitmap.table_offset for bitmap in self._now if bitmap.name not in self._bits and bitmap.table_offset}
        for bitmap in self._before:
            if bitmap.table_offset in kept or not bitmap.table_size:
                continue
            old += [(entry & OFFSET, 1) for entry in bitmap_table(image, bitmap) if entry & OFFSET]
            old.append((bitmap.table_offset, (bitmap.table_size * 8 + size - 1) // size))
        for offset, count in old:
            if image.in_structure(offset >> image.cluster_bits, count):
                raise image.fault("a bitmap leads to a table of the image", offset, image.repair_hint)
        header = image.header
        if header.bitmaps is not None:
            old.append((header.bitmaps[2], (header.bitmaps[1] + size - 1) // size))
        self._now = [self._stored(bitmap) for bitmap in self._now]
        directory = pack_directory(self._now)
        place = 0
        if directory:
            if len(directory) > MOST * 2048:
                raise image.fault("has no room left in its bitmap directory")
            place = image.allocate((len(directory) + size - 1) // size, table=True)
            write_fully(image.fd, directory + bytes(-len(directory) % size), place)
        image.write_back()
        image.barrier()
        header.bitmaps = (len(self._now), len(directory), place) if directory else None
        header.autoclear = header.autoclear & ~AUTOCLEAR_BITMAPS | (AUTOCLEAR_BITMAPS if directory else 0)
        image.write_header()
        image.barrier()
        image.tables_moved()
        for offset, count in old:
            image.release_later(offset, count)
        image.flush()
        self._before, self._bits = list(self._now), {}

    def _stored(self, bitmap: Bitmap) -> Bitmap:
        """Its entry, with a table of its own where its bits changed."""
        bits = self._bits.get(bitmap.name)
        if bits is None:
            return bitmap
        image, size = self._image, self._image.cluster_size
        table = array("Q", bytes((len(bits) + size - 1) // size * 8))
        for index in range(len(table)):
            part = bits[index * size : (index + 1) * size]
            if any(part):
                table[index] = image.allocate(1)
                write_fully(image.fd, part + bytes(size - len(part)), table[index])
        place = 0
        if len(table):
            count = (len(table) * 8 + size - 1) // size
            place = image.allocate(count, table=True)
            padded = table[:]
            padded.frombytes(bytes(count * size - len(table) * 8))
            write_table(image.fd, place, padded)
        return Bitmap(
            bitmap.name,
            granularity_bits=bitmap.granularity_bits,
            flags=bitmap.flags,
            table_offset=place,
            table_size=len(table),
            extra=bitmap.extra,
        )


def runs_of_bits(bits: bytearray, shift: int) -> Iterator[tuple[int, int]]:
    """(start, end) in bytes of the disk of what is set; a bit stands for 2 to the power of `shift` of them."""
    begin = -1
    for index, byte in enumerate(bits):
        if byte in (0, 0xFF):
            if byte and begin < 0:
                begin = index * 8
            elif not byte and begin >= 0:
                yield begin << shift, index * 8 << shift
                begin = -1
            continue
        for bit in range(8):
            if byte >> bit & 1:
                begin = index * 8 + bit if begin < 0 else begin
            elif begin >= 0:
                yield begin << shift, index * 8 + bit << shift
                begin = -1
    if begin >= 0:
        yield begin << shift, len(bits) * 8 << shift
