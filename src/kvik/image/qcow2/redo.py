"""What has changed in an image's tables and is in memory only, in a file that outlives the process that has it there.

A write that was answered and not flushed may be lost with the machine's power, not with a process: its data is in the
page cache, but the way to it may be in memory only. So each change of an L2 entry is noted here as well, and the next
process makes the changes again that had not come to the image (`replay`). Notes are dropped when the tables were
written (`Qcow2Allocator.write_back`). The file means nothing after a loss of power: it belongs on a tmpfs, or is made
anew whenever a machine starts.

    header   magic, device and inode of the image, number of notes (the last store: a note counts, or is not there)
    note     first cluster of the disk, how many, whether their places follow each other; L2 entry and bitmap of the
             first
"""

from __future__ import annotations

import mmap
import os
import stat
from struct import Struct

from kvik.errors import HostError
from kvik.image.qcow2.header import DIRTY
from kvik.image.qcow2.tables import COMPRESSED_FLAG, COPIED, OFFSET, ZERO_FLAG

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvik.image.qcow2.allocator import Qcow2Allocator

__all__ = ["Redo", "identity", "identity_of", "mark", "replay"]

SIZE = 1 << 20
MAGIC = b"kvikredo"
ALONE = b"kvikonly"  # and only as the image on top: it was one of those below before
HEADER = Struct("=8sqqQ")
NOTE = Struct("=QIIQQ")
MOST = (SIZE - HEADER.size) // NOTE.size
_COUNT = HEADER.size // 8 - 1  # as a word of 64 bits
_TIMES = Struct("=I")  # a note's second field, behind 8 bytes


class Redo:
    """Maps the file `fd`, which becomes its own. Raises `HostError` where it is none of ours."""

    def __init__(self, fd: int) -> None:
        try:
            if os.fstat(fd).st_size == 0:
                os.ftruncate(fd, SIZE)
            self._map = mmap.mmap(fd, SIZE)
        except (OSError, ValueError) as error:
            raise HostError(f"the file of changed tables cannot be used: {error}") from error
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("Q")
        magic, device, inode, count = HEADER.unpack_from(self._map)
        if magic not in (MAGIC, ALONE, bytes(8)) or count > MOST:
            self.close()
            raise HostError("the file of changed tables is damaged", remedy="start the machine anew")
        self.identity: tuple[int, int] | None = (device, inode) if magic != bytes(8) else None
        self.alone = magic == ALONE
        self.count = count
        self.full = False  # notes are missing: tables have to be written before anything is answered
        self._last = (-1, 0, 0)  # of the last note, if more of its kind may be added: next cluster, entry, bitmap

    def begin(self, fd: int, *, alone: bool = False) -> None:
        """From now on it is about this image, of which nothing is in memory. `alone`: it lay below others until now,
        which hide what is written to it from here on."""
        self.clear()
        self.identity = identity(fd)
        HEADER.pack_into(self._map, 0, bytes(8), *self.identity, 0)
        self.alone = alone
        self._map[:8] = ALONE if alone else MAGIC  # last: whose it is counts, or it is nobody's

    def add(self, cluster: int, count: int, entry: int, bitmap: int = 0, *, follow: bool = False) -> None:
        """`follow`: each of `count` entries leads to the cluster behind the one before."""
        if not follow and (cluster, entry, bitmap) == self._last:
            at = HEADER.size + (self.count - 1) * NOTE.size + 8
            (had,) = _TIMES.unpack_from(self._map, at)
            if had + count < 1 << 32:
                _TIMES.pack_into(self._map, at, had + count)
                self._last = (cluster + count, entry, bitmap)
                return
        if self.count >= MOST:
            self.full = True
            return
        NOTE.pack_into(self._map, HEADER.size + self.count * NOTE.size, cluster, count, follow, entry, bitmap)
        self.count += 1
        self._words[_COUNT] = self.count  # x86 keeps the order of stores
        self._last = (-1, 0, 0) if follow else (cluster + count, entry, bitmap)

    def clear(self) -> None:
        """All of it is in the image."""
        self._words[_COUNT] = self.count = 0
        self.full = False
        self._last = (-1, 0, 0)

    def __iter__(self) -> Iterator[tuple[int, int, bool, int, int]]:
        for number in range(self.count):
            cluster, count, follow, entry, bitmap = NOTE.unpack_from(self._map, HEADER.size + number * NOTE.size)
            yield cluster, count, bool(follow), entry, bitmap

    def close(self) -> None:
        if hasattr(self, "_words"):
            self._words.release()
        self._map.close()


def mark(fd: int, image: int, *, alone: bool = False) -> None:
    """The header alone, for who notes no changes: from now on it is about this image (two descriptors). See `begin`."""
    os.pwrite(fd, HEADER.pack(ALONE if alone else MAGIC, *identity(image), 0), 0)


def identity(fd: int) -> tuple[int, int]:
    """Which file, or which device, an open one is."""
    return identity_of(os.fstat(fd))


def identity_of(status: os.stat_result) -> tuple[int, int]:
    return (-1, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def replay(image: Qcow2Allocator, redo: Redo) -> None:
    """Make the noted changes again, in an image that was opened and not repaired. `ImageError` for what cannot be.

    What they lead to counts as used before anything else is allocated, and all that is allocated lies behind it. The
    usual order on disk makes the rest whole whenever this ends, too: a clean image or one that is marked as dirty.
    """
    bits, size = image.cluster_bits, image.cluster_size
    file_clusters = -(-max(os.fstat(image.fd).st_size, os.lseek(image.fd, 0, os.SEEK_END)) // size)
    last = -(-image.size // size)
    places: list[tuple[int, int]] = []
    for cluster, count, follow, entry, _ in redo:
        first, used = (entry & OFFSET) >> bits, count if follow else 1
        wrong = entry & ~(OFFSET | COPIED | ZERO_FLAG) or entry & COMPRESSED_FLAG or entry & OFFSET & (size - 1)
        if wrong or cluster + count > last or first + used > file_clusters:
            raise image.fault("has a change noted that cannot be made", first << bits)
        if first:
            if image.in_structure(first, used):
                raise image.fault("has a change noted that leads to a table", first << bits)
            places.append((first, used))
    refcounts = image.refcounts
    refcounts.hint = file_clusters
    for first, used in places:
        refcounts.claim(first, used)
    for cluster, count, follow, entry, bitmap in redo:
        image.set_entries(cluster, count, entry, bitmap, step=size if follow else 0)
    if image.header.version > 2:
        image.header.incompatible |= DIRTY  # until all references were counted anew
    image.write_back()
