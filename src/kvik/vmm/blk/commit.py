"""Commit: what images of the middle of the chain have goes into the one below them, and they leave the chain.

All that is written below is hidden by the images that it comes from, until the header of the image above names the
base. So the guest reads the same whenever it ends. The base is written by a descriptor that was passed for that, and
locked as one that is written, for as long as it takes.
"""

from __future__ import annotations

import os

from kvik.errors import ImageError, InvalidArgument
from kvik.image.layers import own_parts
from kvik.image.lock import lock_image, unlock_image
from kvik.image.opening import open_image
from kvik.image.qcow2.redo import identity
from kvik.image.rebase import change_backing
from kvik.image.resize import resize
from kvik.vmm.blk.block_job import STEP, BlockJob
from kvik.vmm.blk.chain import check_can_open

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.image.base import Image
    from kvik.image.qcow2.writer import Qcow2Writer
    from kvik.vmm.blk.image import FormatImage
    from kvik.vmm.virtio.blk import Blk

__all__ = ["Base", "Commit"]

LOOK = 64 << 20  # bytes of the disk that one turn of the loop looks at


class Base:
    """An image of the chain below `above`, open for writing in its reader's place. Takes over `fd`. Raises `KvikError`,
    OSError; then all is as it was."""

    def __init__(self, above: Image, fd: int, *, locking: bool) -> None:
        reader = above.backing
        assert reader is not None
        self._above, self._reader, self._locking = above, reader, locking
        try:
            if identity(fd) != identity(reader.fd):
                raise InvalidArgument(f"{reader.path} is another file by now than the one that is read")
            if reader.format == "qcow2":
                check_can_open(fd, reader.path)
            if locking:
                unlock_image(reader.fd)
                lock_image(fd, reader.path, write=True)
            self.image = open_image(fd, format=reader.format, writable=True, path=reader.path)
        except BaseException:
            os.close(fd)
            self._lock_again()
            raise
        self.image.backing, reader.backing = reader.backing, None
        above.backing = self.image
        self._buffer = bytearray(STEP)

    def _lock_again(self) -> None:
        if self._locking:
            lock_image(self._reader.fd, self._reader.path, write=False)

    def take(self, source: Image, count: int, begin: int, end: int) -> tuple[int, int]:
        """Write what the upper `count` images of the chain of `source` have between `begin` and `end`: `STEP` bytes of
        data at the most. As far as it came, and how much data that was."""
        copied = 0
        for at, size, zero in own_parts(source, count, begin, end - begin):
            length = size if zero else min(size, STEP)
            if zero:
                self.image.write_zeroes(at, length)
            else:
                part = memoryview(self._buffer)[:length]
                source.read_into(at, part)
                self.image.write(at, part)
                copied += length
            if length < size or copied >= STEP:
                return at + length, copied
        return end, copied

    def finish(self) -> None:
        """All that was written is on the medium, as of an image that is closed in order."""
        self.image.finish()

    def keep(self) -> Image:
        """It is written from here on; its reader goes."""
        self._above.backing = None
        self._reader.release()
        return self.image

    def abandon(self) -> None:
        """What was written to it is not what it is read for: it is read again as it was, for what is above hides that.
        Nothing is in flight."""
        try:
            self.finish()
        finally:
            self.let_go(self._above)

    def let_go(self, above: Image) -> None:
        """It is read again, below `above`. Nothing is in flight."""
        written, reader = self.image, self._reader
        fresh = open_image(os.dup(reader.fd), format=reader.format, path=reader.path)
        fresh.backing, written.backing = written.backing, None
        written.release()
        reader.release()
        above.backing = fresh
        if self._locking:
            lock_image(fresh.fd, fresh.path, write=False)


class Commit(BlockJob):
    """The images behind `above` in the chain of `top`, `count` of them, into the one that follows, which `above` is to
    name as `name`."""

    def __init__(
        self,
        job: str,
        device: Blk,
        image: FormatImage,
        top: Qcow2Writer,
        *,
        above: Image,
        count: int,
        fds: tuple[int, int],
        name: str,
        locking: bool,
        speed: int,
        ended: Callable[[], object],
    ) -> None:
        """Takes over `fds`: of the base, and of `above`, -1 where that is `top`."""
        source = above.backing
        assert source is not None
        upper = source.chain()[:count]
        base_fd, self._header = fds
        try:
            last = upper[-1].backing
            assert last is not None
            if last.size > source.size and above.size > source.size:
                raise ImageError(
                    f"is longer than {source.path}, which ends the disk before: it would be seen there", file=last.path
                )
            if self._header >= 0:
                if identity(self._header) != identity(above.fd):
                    raise InvalidArgument(f"{above.path} is another file by now than the one that is read")
                check_can_open(self._header, above.path)
        except BaseException:
            os.close(base_fd)
            self._close_header()
            raise
        try:
            self._base = Base(upper[-1], base_fd, locking=locking)
        except BaseException:
            self._close_header()
            raise
        self._top, self._above, self._source, self._upper, self._name = top, above, source, upper, name
        self._settles = bool(getattr(self._base.image, "snapshots", ()))  # clusters that are shared get new places
        try:
            if source.size > self._base.image.size:
                resize(self._base.image, (source.size + 511) & -512)
        except BaseException:
            self._close_header()
            self._base.let_go(upper[-1])
            raise
        super().__init__(job, device, image, speed=speed, ended=ended)
        self.total = source.size

    def _close_header(self) -> None:
        fd, self._header = self._header, -1
        if fd >= 0:
            os.close(fd)

    @property
    def written(self) -> int:
        return self._base.image.data_fd

    def step(self) -> int:
        if self._settles and not self.settled():
            return 0
        end = min(self.current + LOOK, self.total)
        self.current, copied = self._base.take(self._source, len(self._upper), self.current, end)
        return copied

    def finish(self) -> None:
        self._base.finish()
        base = self._base.image
        if self._above is self._top:
            self._top.flush()
            change_backing(self._top, self._name, base.format)
        else:
            fd, self._header = self._header, -1
            with open_image(fd, format="qcow2", writable=True, path=self._above.path) as header:
                change_backing(header, self._name, base.format)  # type: ignore[arg-type]  # it is qcow2
        self._base.let_go(self._above)
        for gone in self._upper:
            gone.backing = None
            gone.release()

    def abandon(self) -> bool:
        self._close_header()
        if self.settled():  # else the base stays as it is, and open, until the disk ends
            self._base.abandon()
        return True
