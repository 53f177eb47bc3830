"""Raw images: the file is the disk. Holes are found by lseek(2)'s SEEK_DATA and SEEK_HOLE."""

from __future__ import annotations

import errno
import os

from kvik.image.base import BLANK, DATA, SECTOR, ZERO_ALLOCATED, Image, write_fully, writev_fully

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvik.image.base import Run

__all__ = ["RawImage", "punch", "segments", "zero_range"]

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 1, 2, 16  # linux/falloc.h


def segments(fd: int, offset: int, length: int, file_end: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, has data) of the range; behind `file_end`, the file's size, it has none.

    A file system that knows no holes has data everywhere.
    """
    end = offset + length
    at = offset
    while at < end:
        if at >= file_end:
            yield at, end - at, False
            return
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                yield at, end - at, False
            else:  # EINVAL: not known here
                yield from _without_holes(at, end, file_end)
            return
        if data > at:
            yield at, min(data, end) - at, False
            at = data
            if at >= end:
                return
        hole = max(at + 1, os.lseek(fd, at, os.SEEK_HOLE))
        yield at, min(hole, end) - at, True
        at = hole


def _without_holes(at: int, end: int, file_end: int) -> Iterator[tuple[int, int, bool]]:
    yield at, min(end, file_end) - at, True
    if end > file_end:
        yield file_end, end - file_end, False


def zero_range(fd: int, offset: int, length: int, *, unmap: bool) -> None:
    """Make a range of a file or block device zero, as fast as the kernel can; with `unmap` give its room back."""
    if length <= 0:
        return
    if unmap and punch(fd, offset, length):
        return
    from kvik.image.fallocate import fallocate

    if fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length):
        return
    while length:
        count = min(length, len(BLANK))
        write_fully(fd, BLANK[:count], offset)
        offset += count
        length -= count


def punch(fd: int, offset: int, length: int) -> bool:
    """Give the room of a range back, which then reads as zero; whether the kernel could."""
    from kvik.image.fallocate import fallocate

    return length <= 0 or fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


class RawImage(Image):
    """A file or block device as a disk. A file whose size is no multiple of 512 bytes has zeros up to there.

    With `barriers` off closing it does not wait for the disk: for an image that is worthless until it is whole.
    """

    format = "raw"

    def __init__(self, fd: int, path: str = "", *, writable: bool = False, barriers: bool = True) -> None:
        super().__init__(fd, path, writable=writable)
        self._barriers = barriers
        self.file_end = os.lseek(fd, 0, os.SEEK_END)
        self.size = (self.file_end + SECTOR - 1) & -SECTOR

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        for start, size, is_data in segments(self.fd, offset, length, self.file_end):
            yield (DATA if is_data else ZERO_ALLOCATED), start, size, start

    def _read(self, offset: int, view: memoryview) -> None:
        from kvik.image.base import read_fully

        read_fully(self.fd, view, offset)

    def place(self, offset: int, length: int) -> int:
        return offset if offset + length <= self.file_end else -1

    def place_to_write(self, offset: int, length: int) -> int:
        return self.place(offset, length)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.check_range(offset, len(data))
        write_fully(self.fd, data, offset)
        self.file_end = max(self.file_end, offset + len(data))

    def writev(self, offset: int, buffers: list[memoryview]) -> None:
        length = sum(map(len, buffers))
        self.check_range(offset, length)
        writev_fully(self.fd, buffers, offset)
        self.file_end = max(self.file_end, offset + length)

    def write_zeroes(self, offset: int, length: int, discard: bool = False) -> None:
        self.check_range(offset, length)
        zero_range(self.fd, offset, length, unmap=discard)

    def discard(self, offset: int, length: int) -> None:
        self.check_range(offset, length)
        punch(self.fd, offset, length)

    def flush(self) -> None:
        os.fdatasync(self.fd)

    def finish(self) -> None:
        if self._barriers:
            self.flush()

    def resize(self, size: int) -> None:
        os.ftruncate(self.fd, size)
        self.file_end = size
        self.size = (size + SECTOR - 1) & -SECTOR
