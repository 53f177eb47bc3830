"""What every disk image is to its users: a run of bytes with holes, perhaps on top of another image.

A format has one primitive for reading, `runs`: which parts of a range the layer itself has, coalesced over clusters.
Everything else here (reading through the chain, the map that `kvik img map` prints) is made of it.
"""

from __future__ import annotations

import os

from kvik.errors import ImageError
from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

    # (name as the image states it, format as it states it) -> an open image; raises what the caller wants to say.
    BackingOpener = Callable[[str, str | None], "Image"]
    # Name of an external data file -> a descriptor that becomes the image's.
    DataOpener = Callable[[str], int]
    Run = tuple[int, int, int, int]
    Piece = tuple[int, int, int, "Image", int]
    Buffer = bytearray | memoryview

__all__ = ["BLANK", "COMPRESSED", "DATA", "DATA_HOLE", "HOLE", "ZERO", "ZERO_ALLOCATED", "Extent", "Image", "merge"]

# Kinds of run. The fourth member of a run is its offset in the file (-1: none), for COMPRESSED its descriptor.
HOLE = 0  # not in this layer: the backing image's, or zero (an offset: it has room, as subclusters have)
ZERO = 1
ZERO_ALLOCATED = 2  # reads as zero, and has room in the file
DATA = 3
COMPRESSED = 4
DATA_HOLE = 5  # data by the image's tables, and a hole of the file

# an image that is used without its secret
LOCKED = "is encrypted, and its secret was not given"
KEY_WANTED = (
    "kvik img has it with --object secret,id=NAME,file=FILE and --image-opts (key-secret=, encrypt.key-secret=)"
)

BLANK = bytes(1 << 16)
SECTOR = 512
IOV_MAX = 1024  # sysconf(_SC_IOV_MAX): vectors that one call takes


class Extent(NamedTuple):
    """A part of what `map` says: `depth` is that of the image that has it, `offset` where in its file it begins."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None


class Image:
    """An open image. `size` is what the guest sees, in bytes. Not safe for use by several threads at once, but for
    `read_into` of images that nobody writes.

    Every method raises `ImageError` for what the file says wrongly, `OSError` for what the kernel refuses.
    """

    format = ""

    def __init__(self, fd: int, path: str, *, writable: bool) -> None:
        self.fd = fd
        self.path = path
        self.writable = writable
        self.size = 0
        self.backing: Image | None = None
        self.data_fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- what a format provides

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """(kind, start, length, file offset) of this layer, in order, covering the range exactly."""
        raise NotImplementedError

    def read_compressed(self, descriptor: int, start: int) -> bytes:
        """The whole cluster that a COMPRESSED run at `start` stands for."""
        raise NotImplementedError

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """`data` at `offset`; on disk after the next `flush`."""
        self.writev(offset, [memoryview(data).cast("B")])

    def writev(self, offset: int, buffers: list[memoryview]) -> None:
        """The same for bytes that lie in several places, as a guest's do. None of them is copied."""
        raise NotImplementedError

    def place(self, offset: int, length: int) -> int:
        """Where in `data_fd` a range lies that is one run of this layer's own data; -1 where it is not, or not surely:
        `runs` tells then. For whoever asks for every request."""
        return -1

    def place_to_write(self, offset: int, length: int) -> int:
        """The same for a range that may be written right there, without `write` having anything to do."""
        return -1

    def write_zeroes(self, offset: int, length: int, discard: bool = False) -> None:
        """Make the range read as zero; with `discard` give its room back."""
        raise NotImplementedError

    def discard(self, offset: int, length: int) -> None:
        """Give room back where the format can; what is then read there is zero or what was."""
        raise NotImplementedError

    def write_back(self) -> None:
        """What waits in memory goes into the file: tables. `flush` does it, too."""

    def flush(self) -> None:
        """All that was written survives a loss of power."""
        raise NotImplementedError

    def _backing_of(self, offset: int) -> Image | None:
        """The image below, for a hole at `offset`; raises where one is named but was not allowed."""
        return self.backing

    def fault(self, what: str, offset: int | None = None, remedy: str = "") -> ImageError:
        return ImageError(what, file=self.path, offset=offset, remedy=remedy)

    def close(self) -> None:
        """Flush if written, and close the descriptors of the whole chain."""
        try:
            if self.writable and self.fd >= 0:
                self.finish()
        finally:
            self.release()

    def finish(self) -> None:
        """What is to be on disk when an image is closed in order."""
        self.flush()

    def release(self) -> None:
        """Close descriptors and nothing else, as after a kill."""
        for fd in {self.fd, self.data_fd} - {-1}:
            os.close(fd)
        self.fd = self.data_fd = -1
        backing, self.backing = self.backing, None
        if backing is not None:
            backing.release()

    # -- made of it

    def check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ImageError(
                f"{length} bytes at {offset} are outside the disk of {self.size} bytes", file=self.path, offset=offset
            )

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; the range must lie inside the disk."""
        data = bytearray(length)
        self.read_into(offset, data)
        return bytes(data)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` from `offset` on, through the whole chain."""
        view = memoryview(buffer)
        self.check_range(offset, len(view))
        self._read(offset, view)

    def _read(self, offset: int, view: memoryview) -> None:
        data_fd = self.data_fd
        for kind, start, length, host in self.runs(offset, len(view)):
            at = start - offset
            part = view[at : at + length]
            if kind == DATA:
                read_fully(data_fd, part, host)
            elif kind == COMPRESSED:
                cluster = self.read_compressed(host, start)
                skip = start & (len(cluster) - 1)
                part[:] = cluster[skip : skip + length]
            elif kind == HOLE and (below := self._backing_of(start)) is not None:
                there = max(0, min(length, below.size - start))
                if there:
                    below._read(start, part[:there])
                zero(part[there:])
            else:
                zero(part)

    def map(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """What the range is made of, through the chain; neighbours that continue each other are one extent."""
        length = self.size - offset if length is None else length
        self.check_range(offset, length)
        return merge(self._extents(offset, length, 0))

    def layer_extents(self, offset: int, length: int, depth: int) -> Iterator[Extent]:
        """`runs` as extents; what is not in this layer has neither `data` nor `zero`."""
        for kind, start, size, host in self.runs(offset, length):
            if kind == DATA:
                yield Extent(start, size, depth, True, False, True, False, host)
            elif kind == COMPRESSED:
                yield Extent(start, size, depth, True, False, True, True, None)
            elif kind == HOLE:
                yield Extent(start, size, depth, False, False, False, False, host if host >= 0 else None)
            elif kind == DATA_HOLE:
                yield Extent(start, size, depth, True, True, True, False, host)
            else:
                yield Extent(start, size, depth, True, True, False, False, host if kind == ZERO_ALLOCATED else None)

    def _extents(self, offset: int, length: int, depth: int) -> Iterator[Extent]:
        for extent in self.layer_extents(offset, length, depth):
            if extent.present:
                yield extent
                continue
            start, size = extent.start, extent.length
            below = self._backing_of(start)
            if below is None:
                yield Extent(start, size, depth, False, True, False, False, extent.offset)
                continue
            there = max(0, min(size, below.size - start))
            if there:
                yield from below._extents(start, there, depth + 1)
            if there < size:  # the image below is shorter
                place = None if extent.offset is None else extent.offset + there
                yield Extent(start + there, size - there, depth, False, True, False, False, place)

    def pieces(self, offset: int, length: int, *, own: bool = False) -> Iterator[Piece]:
        """What a range is read from, in order, through the chain: (kind, start, length, image that has it, offset in
        its file). A hole that is left reads as zero.

        With `own` the chain is not walked: what only the images below have is a HOLE, and ZERO where none reaches.
        """
        for kind, start, size, host in self.runs(offset, length):
            if kind != HOLE or (below := self._backing_of(start)) is None:
                yield kind if kind != HOLE else ZERO, start, size, self, host
                continue
            there = max(0, min(size, below.size - start))
            if there and own:
                yield HOLE, start, there, self, -1
            elif there:
                yield from below.pieces(start, there)
            if there < size:
                yield ZERO, start + there, size - there, self, -1

    def read_piece(self, kind: int, start: int, host: int, view: memoryview) -> None:
        """Fill `view` with (a part of) a piece of this image that is DATA or COMPRESSED."""
        if kind == DATA:
            read_fully(self.data_fd, view, host)
        else:
            cluster = self.read_compressed(host, start)
            skip = start & (len(cluster) - 1)
            view[:] = cluster[skip : skip + len(view)]

    def chain(self) -> list[Image]:
        """This image and those below it, top first."""
        found, image = [], self
        while True:
            found.append(image)
            if image.backing is None:
                return found
            image = image.backing


def merge(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Neighbours that continue each other become one."""
    held: Extent | None = None
    for extent in extents:
        if held is None:
            held = extent
        elif held[2:7] == extent[2:7] and (
            held.offset is None
            if extent.offset is None
            else held.offset is not None and held.offset + held.length == extent.offset
        ):
            held = Extent(held.start, held.length + extent.length, *held[2:])
        else:
            yield held
            held = extent
    if held is not None:
        yield held


def read_fully(fd: int, view: memoryview, offset: int) -> None:
    """Fill `view` from the file; what lies behind its end reads as zero."""
    while len(view):
        count = os.preadv(fd, [view], offset)
        if count == 0:
            zero(view)
            return
        view = view[count:]
        offset += count


def write_fully(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view.nbytes:
        count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count


def writev_fully(fd: int, buffers: list[memoryview], offset: int) -> None:
    """All of the buffers, one behind the other."""
    if len(buffers) == 1:
        write_fully(fd, buffers[0], offset)
        return
    while buffers:
        count = os.pwritev(fd, buffers[:IOV_MAX], offset)
        offset += count
        buffers = cut(buffers, count, -1)


def cut(buffers: list[memoryview], start: int, stop: int) -> list[memoryview]:
    """The bytes from `start` to `stop` (-1: the end) of buffers that follow each other."""
    if len(buffers) == 1:
        return [buffers[0][start : stop if stop >= 0 else None]] if start < len(buffers[0]) else []
    found: list[memoryview] = []
    at = 0
    for view in buffers:
        end = at + len(view)
        if stop >= 0 and at >= stop:
            break
        if end > start:
            found.append(view[max(0, start - at) : stop - at if 0 <= stop < end else None])
        at = end
    return found


def zero(view: memoryview) -> None:
    size = len(view)
    for at in range(0, size, len(BLANK)):
        count = min(len(BLANK), size - at)
        view[at : at + count] = BLANK[:count]
