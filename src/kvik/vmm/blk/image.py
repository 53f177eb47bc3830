"""An image of `kvik.image` as a disk's storage: what `backends.block.BlockImage` is for raw files.

A request whose bytes lie in one run of the file is one preadv(2) or pwritev(2) between guest memory and that run, at
once where the page cache has it, else by io_uring or threads as any raw disk's. Everything else (several runs, zeros,
compressed clusters, new clusters, discards) is done piece by piece here, on the disk's one thread: tables have one
owner.
"""

from __future__ import annotations

import errno
import os

from kvik.errors import HostError, ImageError, InvalidArgument, OperationInvalid
from kvik.image.base import COMPRESSED, DATA, cut, zero
from kvik.vmm.backends.block import RWF_DSYNC, BlockImage
from kvik.vmm.backends.request import DISCARD, FLUSH, READ, WRITE, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.image.base import Image
    from kvik.vmm.blk.backup import Backup
    from kvik.vmm.blk.block_job import BlockJob
    from kvik.vmm.virtio.blk import Blk

__all__ = ["FormatImage", "flush", "formatted", "plain_again"]

SECTOR = 512
SETTLES = 10.0  # seconds for requests that are under way


class FormatImage(BlockImage):
    """`image` is closed with it, and so is `data_fd`, another descriptor of its file: opened anew where `cache` wants
    O_DIRECT, which is a property of the open file. `log` is told of what is wrong with the image."""

    def __init__(
        self,
        image: Image,
        data_fd: int,
        *,
        read_only: bool = False,
        cache: str = "writeback",
        discard: bool = True,
        locking: bool = True,
        share_write: bool = False,
        name: str = "",
        log: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.image = image
        self._log = log
        self.backup: Backup | None = None  # wants to have what is about to be overwritten
        self.job: BlockJob | None = None  # works on it
        self.stands_for: BlockImage | None = None  # a raw disk's own, for which it stands in for the time being
        self.changing: Callable[[int, int], None] | None = None  # is told of what is about to be written
        self._unflushed = False  # tables changed since the last write that waited for the medium
        super().__init__(
            data_fd,
            image_format="raw",  # of the file that it lies in
            read_only=read_only,
            cache=cache,
            discard=discard,
            locking=locking,
            share_write=share_write,
            name=name or image.path,
        )
        self.mapped = True

    def _open_buffered(self) -> int:
        return os.dup(self.image.fd)  # tables go through the page cache anyway

    # Size --------------------------------------------------------------------------------------------------------

    def refresh_size(self) -> bool:
        size = -(-self.image.size // SECTOR) * SECTOR
        changed = size != self.size
        self.end = self.size = size
        return changed

    def resize(self, size: int) -> None:
        if size < 0 or size % SECTOR:
            raise InvalidArgument(f"a disk cannot have {size} bytes", remedy="give a multiple of 512")
        if self.read_only:
            raise InvalidArgument(f"disk {self.name} is read-only")
        if self.backup is not None:
            raise OperationInvalid(f"disk {self.name} has a backup under way", remedy="wait for its end")
        if self.job is not None:
            raise OperationInvalid(f"disk {self.name} has a block job under way", remedy="wait for its end")
        from kvik.image.qcow2.writer import Qcow2Writer
        from kvik.image.resize import resize

        self.drain(30.0)
        if isinstance(self.image, Qcow2Writer):
            self.image.store_bitmaps()  # those that record count as inconsistent on disk, which is not resized
        resize(self.image, size, shrink=size < self.image.size)
        self.refresh_size()

    # I/O ---------------------------------------------------------------------------------------------------------

    def place(self, offset: int, length: int) -> tuple[int, int]:
        image: Image | None = self.image
        try:
            while image is not None and offset + length <= image.size:
                place = image.place(offset, length)
                if place >= 0:
                    return (self.fd if image is self.image else image.data_fd), place
                if image.backing is None:
                    break
                kind, _, size, _ = next(image.runs(offset, length))
                if kind or size < length:  # not a hole all over
                    break
                image = image.backing
        except ImageError:
            pass  # whoever reads it by `pieces` meets it again, and tells
        return -1, -1

    def place_to_write(self, offset: int, length: int) -> tuple[int, int]:
        if self.changing is not None:
            self.changing(offset, length)
        if self.backup is not None and self.backup.wants(offset, length):
            return -1, -1
        try:
            return self.fd, self.image.place_to_write(offset, length)
        except ImageError:
            return -1, -1

    def now(self, op: int, buffers: list[memoryview], offset: int, length: int, write_through: bool = False) -> bool:
        try:
            if op == READ:
                if not self._nowait or self._skip:
                    self._skip = max(self._skip - 1, 0)
                    return False
                fd, place = self.place(offset, length)
                if place < 0 or os.preadv(fd, buffers, place, self.read_flags) != length:
                    return False
                self._cold = 0
                return True
            if write_through or length > self.inline_write_limit:
                return False
            fd, place = self.place_to_write(offset, length)
            return place >= 0 and os.pwritev(fd, buffers, place) == length
        except OSError as error:
            if op == READ and error.errno == errno.EAGAIN:  # as for a raw disk
                self._cold = self._skip = min(2 * self._cold + 1, 63)
            elif op == READ and error.errno != errno.EINVAL:
                self._nowait = False
        return False

    def submit(self, request: Request, *, write_through: bool = False) -> bool:
        try:
            return self._submit(request, write_through or self.sync)
        except OSError as error:
            request.result = -(error.errno or errno.EIO)
        except ImageError as error:
            request.result = -errno.EIO
            self._log(str(error))
        return True

    def _submit(self, request: Request, sync: bool) -> bool:
        op = request.op
        if op == READ:
            return self._read(request)
        if op == FLUSH:
            if self.ignore_flush or self.read_only:
                request.result = 0
                return True
            self.image.write_back()
            return self._to_engine(request, self.fd, 0)
        if self.backup is not None and self.backup.wants(request.offset, request.length):
            if op == DISCARD:  # which is advice: copying all that first would take longer than it is worth
                request.result = 0
                return True
            self.backup.before_write(request.offset, request.length)
        if op == WRITE:
            fd, place = self.place_to_write(request.offset, request.length)
            if place >= 0:
                if sync and self._unflushed:  # the way to these clusters may not be on the medium
                    self.image.flush()
                    self._unflushed = False
                request.flags = RWF_DSYNC if sync else 0
                return self._to_engine(request, fd, place)
            self.image.writev(request.offset, request.buffers)
        else:
            if self.changing is not None:
                self.changing(request.offset, request.length)
            # What is in flight may be on its way into clusters that are given back now.
            if self.in_flight and not self.drain(30.0):
                raise OSError(errno.ETIMEDOUT, "requests before a discard have not ended")
            if op == DISCARD:
                self.image.discard(request.offset, request.length)
            else:
                self.image.write_zeroes(request.offset, request.length, discard=request.unmap)
        if sync:
            self.image.flush()
        self._unflushed = not sync
        request.result = 0
        return True

    def _to_engine(self, request: Request, fd: int, place: int) -> bool:
        """One piece of the file, as it is."""
        engine = self._engine
        assert engine is not None, "not started"
        request.fd, request.offset, request.end = fd, place, 0
        if self.direct and fd == self.fd and request.op != FLUSH:
            request.buffered_fd = self._buffered
            if (place | request.length) % self.alignment:
                request.fd = self._buffered
        engine.submit(request)
        return False

    def _read(self, request: Request) -> bool:
        offset, length = request.offset, request.length
        fd, place = self.place(offset, length)
        if place >= 0:
            return self._to_engine(request, fd, place)
        parts: list[Request] = []
        for kind, start, size, image, host in self.image.pieces(offset, length):
            part = cut(request.buffers, start - offset, start - offset + size)
            if kind == DATA:
                parts.append(Request(READ, host, size, part, unmap=False))
                parts[-1].fd = self.fd if image is self.image else image.data_fd
            elif kind == COMPRESSED:
                cluster = image.read_compressed(host, start)
                skip = start & (len(cluster) - 1)
                _fill(part, memoryview(cluster)[skip : skip + size])
            else:
                for view in part:
                    zero(view)
        request.result = 0
        if not parts:
            return True
        left = len(parts)

        def ended(part: Request) -> None:
            nonlocal left
            left -= 1
            request.result = request.result or part.result
            if not left and request.done is not None:
                request.done(request)

        for part_request in parts:
            part_request.done = ended
            self._to_engine(part_request, part_request.fd, part_request.offset)
        return False

    def close(self) -> None:
        super().close()
        try:
            self.image.close()
        finally:
            if self.stands_for is not None:
                self.stands_for.close()


def _fill(parts: list[memoryview], data: memoryview) -> None:
    for view in parts:
        view[:] = data[: len(view)]
        data = data[len(view) :]


def formatted(device: Blk, log: Callable[[str], object]) -> FormatImage:
    """The disk's image as one that can be asked what it is made of: a raw disk's gets one that stands in for it. The
    device's lock is held, and nothing is in flight."""
    old = device.image
    if isinstance(old, FormatImage):
        return old
    from kvik.image.opening import open_image

    fd = os.dup(old._buffered if old.direct else old.fd)
    image = open_image(fd, format="raw", writable=not old.read_only, path=old.name)
    try:
        new = FormatImage(
            image,
            os.dup(old.fd),
            read_only=old.read_only,
            cache=old.cache,
            discard=old.can_discard,
            locking=False,  # `old` stays open
            name=old.name,
            log=log,
        )
    except BaseException:
        image.release()
        raise
    new.take_over(old)
    device.image, new.stands_for = new, old
    return new


def plain_again(device: Blk) -> None:
    """A raw disk is served as it was, unless somebody works on what stands in for it, or the host's storage does not
    answer. The device's lock is held."""
    new = device.image
    if not isinstance(new, FormatImage) or new.stands_for is None or new.backup is not None or new.job is not None:
        return
    if not new.drain(SETTLES):
        return
    device._publish()
    old, new.stands_for = new.stands_for, None
    old.take_over(new)
    old.refresh_size()
    device.image = old
    new.close()


def flush(device: Blk) -> None:
    """Everything that was answered survives a loss of power. Raises `HostError`, `ImageError`, OSError."""
    image = getattr(device.image, "image", None)
    if image is not None and image.writable:
        image.flush()
    elif image is None and not device.image.read_only:
        os.fdatasync(device.image.fd)
    if not device.image.drain(30.0):
        raise HostError("the host's storage does not answer")
