"""Copy of the disk into another image, where the guest goes on, or which is closed, when it is whole and told to.

    first   all of the disk, or what its top image has: a piece each turn of the loop
    then    what the guest wrote meanwhile. It is marked before it is written, and read when nothing is in flight
    ready   nothing was left; what the guest writes goes on being copied
    end     between two requests the rest is copied, and the guest changes over, or the copy is closed as it is then

A thread of its own writes to the copy (`writer`): storage that is slow there, or does not answer, holds up nobody until
the end. As long as it writes, the copy rests on an image of no bytes, for images have one thread: what is copied of a
top image alone is whole clusters, which need nothing from below. What fails there fails the job.

From the change on the document's chain is wrong, and the file of changed tables says so to the process that comes after
this one. Until then nobody reads the copy.
"""

from __future__ import annotations

import os

from kvik.errors import ImageError, KvikError, OperationInvalid
from kvik.image.base import COMPRESSED, DATA, HOLE, Image
from kvik.image.lock import lock_image
from kvik.image.opening import open_image
from kvik.image.qcow2.tracking import first_bit, set_bits
from kvik.image.qcow2.writer import Qcow2Writer
from kvik.vmm.blk.bitmaps import merge_into
from kvik.vmm.blk.block_job import STEP, BlockJob
from kvik.vmm.blk.chain import check_can_open, check_served, name_of, open_chain
from kvik.vmm.blk.image import FormatImage
from kvik.vmm.blk.writer import ROOM, Writer, put

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvik.vmm.blk.overlay import Overlays
    from kvik.vmm.virtio.blk import Blk

__all__ = ["Copy", "open_copy"]

LOOK = 64 << 20  # bytes of the disk that one turn of the loop looks at
CHUNK_BITS = 16, 20  # of what is marked: at least and, but for clusters that are bigger, at most
FEW = 4 << 20  # bytes that may be left to copy while the guest's requests wait


def open_copy(images: list[tuple[int, str]], below: Image | None, *, locking: bool) -> Image:
    """(descriptor, format) of the copy, and of what it rests on if that is its own; `below`: what it is to lie on that
    somebody has open. Takes over the descriptors. Raises `KvikError`, OSError; then they are closed."""
    try:
        for number, (fd, form) in enumerate(images):
            if locking and not number:
                lock_image(fd, name_of(fd), write=True)
            if form == "qcow2":
                check_can_open(fd, name_of(fd))
    except BaseException:
        for fd, _ in images:
            os.close(fd)
        raise
    if len(images) > 1 or below is None:
        return open_chain(images, read_only=False, locking=locking)
    ((fd, form),) = images
    try:
        image = open_image(fd, format=form, writable=True, path=name_of(fd))
    except BaseException:
        os.close(fd)
        raise
    try:
        check_served(image, below)
    except BaseException:
        image.release()
        raise
    return image


class Copy(BlockJob):
    """Of what `device` has, which is `image`, into `target`, whose node the manager calls `node`.

    `shallow`: what the top image has; `shared`: the copy is to lie on what that lies on. `blank`: it reads as zero all
    over. `granularity`: bytes that are marked at least; `room`: bytes that wait to be written at most.
    """

    def __init__(
        self,
        job: str,
        device: Blk,
        image: FormatImage,
        target: Image,
        *,
        data: int,
        shallow: bool,
        shared: bool,
        blank: bool,
        node: str,
        overlays: Overlays,
        speed: int,
        granularity: int,
        room: int,
        ended: Callable[[], object],
        log: Callable[[str], object],
    ) -> None:
        """Takes over `target` and `data`, another open file of it (-1: none) for caches that want O_DIRECT. Raises
        `KvikError`, OSError; then both are closed."""
        size = image.image.size
        try:
            if target.size < size:
                raise ImageError(f"has {target.size} bytes, and the disk {size}", file=target.path)
            fd, data = data if data >= 0 else os.dup(target.fd), -1
            self._new = FormatImage(
                target,
                fd,
                cache=image.cache,
                discard=image.can_discard,
                locking=False,  # it is
                name=target.path,
                log=log,
            )
        except BaseException:
            target.release()
            if data >= 0:
                os.close(data)
            raise
        # The guest's disk keeps its size, and what is more is seen at the next start.
        self._new.size = self._new.end = image.size
        self._shallow = shallow and len(image.image.chain()) > 1
        self._shared, self._blank = shared, blank and not self._shallow
        self._below, target.backing = target.backing, None
        if shared or self._below is not None:
            target.backing = Image(-1, "", writable=False)
        header = getattr(target, "header", None)
        bits = min(max(CHUNK_BITS[0], granularity.bit_length() - 1), CHUNK_BITS[1])
        self._bits = max(bits, header.cluster_bits if header is not None else 0)
        self._dirty = bytearray((((size - 1) >> self._bits) >> 3) + 1)
        self._until = 0  # what lies before is copied, whatever image has it
        self._node, self._overlays, self._log = node, overlays, log
        self._carried: list[int] = []  # images whose bitmaps the copy is to have
        self.ready = self._completing = self._apart = False
        self._room = max(room, 2 * STEP) if room else ROOM
        self._writer: Writer | None = None
        self._goal = -1  # bytes that the thread has to have written for all to be copied; -1: not all was read yet
        super().__init__(job, device, image, speed=speed, ended=ended)
        self.total = size
        image.changing = self._mark

    def report(self) -> dict[str, Any]:
        told = super().report()
        return told | {"state": "ready"} if self.ready and self.state == "running" else told

    def _mark(self, offset: int, length: int) -> None:
        last = min(offset + length, self.total) - 1  # the disk's last sector may not be all there
        if last >= offset:
            set_bits(self._dirty, offset >> self._bits, (last >> self._bits) + 1)

    def complete(self, *, apart: bool = False) -> bool:
        """Whether it does: only one that is ready. `apart`: the guest stays where it is."""
        if self.ready and not self._completing:
            self._completing, self._apart = True, apart
        return self.ready and self._apart == apart

    def carry(self, images: list[int]) -> None:
        """When the guest goes on in the copy, that has what the bitmaps of these images of the disk's tell."""
        if not isinstance(self._new.image, Qcow2Writer):
            raise OperationInvalid(f"{self._new.name} is raw, which keeps no bitmaps")
        self._carried = images

    def waits(self) -> bool:
        left, writer = int.from_bytes(self._dirty, "little").bit_count(), self._writer
        if not self.ready and writer is not None:
            if not left and self._goal < 0:
                self._goal = writer.given
            self.ready = writer.written >= self._goal >= 0
        return not self._completing or left << self._bits > FEW

    def crowded(self) -> bool:
        return self._writer is not None and self._writer.crowded

    # Copying -----------------------------------------------------------------------------------------------------

    def step(self) -> int:
        if self._writer is None:
            loop, target = self._device.loop, self._new.image
            self._writer = Writer(target, loop, self.failed, self._writer_ended, room=self._room)
        if self.current < self.total:
            if self.current >= self._until:
                self.current, self._until = self._next(self.current)
            self.current, copied = self._take(self.current, self._until, STEP, holes=not self._blank)
            return copied
        return self._copy_marked(STEP) if self.settled() else 0

    def _next(self, begin: int) -> tuple[int, int]:
        """The next range to copy."""
        end = min(begin + LOOK, self.total)
        if not self._shallow:
            return begin, end
        chunk = 1 << self._bits
        for kind, start, size, _ in self._image.image.runs(begin, end - begin):
            if kind != HOLE:
                return max(begin, start & -chunk), min((start + size + chunk - 1) & -chunk, self.total)
        return end, end

    def _take(self, begin: int, end: int, most: int, *, holes: bool) -> tuple[int, int]:
        """Copy what the disk reads as, `most` bytes of data. As far as it came, and how much data that was."""
        copied = 0
        for kind, at, size, image, host in self._image.image.pieces(begin, end - begin):
            if kind not in (DATA, COMPRESSED):
                if holes:
                    self._put(at, size, None)
                continue
            part = min(size, most - copied)
            data = bytearray(part)
            image.read_piece(kind, at, host, memoryview(data))
            self._put(at, part, data)
            copied += part
            if copied >= most:
                return at + part, copied
        return end, copied

    def _put(self, at: int, size: int, data: bytearray | None) -> None:
        if self._writer is not None:
            self._writer.put(at, size, data)
        else:
            put(self._new.image, at, size, data)

    def _copy_marked(self, most: int) -> int:
        """What was written since it was copied; nothing is in flight."""
        copied, at = 0, 0
        while copied < most and (bit := first_bit(self._dirty, at)) >= 0:
            at = bit >> 3
            start = bit << self._bits
            end = min(start + (1 << self._bits), self.total)
            copied += self._take(start, end, end - start + 1, holes=True)[1]
            self._dirty[at] &= ~(1 << (bit & 7))
        return copied

    # The end -----------------------------------------------------------------------------------------------------

    def write_out(self) -> None:
        assert self._writer is not None
        self._writer.finish(give_back=True)

    def _writer_ended(self, error: str) -> None:
        """The copy is ours again."""
        self._writer = None
        if self.state == "ending":
            self._let_go()
            self.error = self.error or error
            self.conclude()
        else:
            self.written_out(error)

    def finish(self) -> None:
        old, target = self._image, self._new.image
        self._copy_marked(1 << 62)
        if self._apart:
            target.finish()
            old.changing = None
            self._let_go()
            return
        self._carry(old, target)
        target.flush()
        old.changing = None
        target.backing, self._below = old.image.backing if self._shared else self._below, None
        if self._shared:
            old.image.backing = None
        self._overlays.pivot(self._new, self._node)
        try:
            old.close()
        except (KvikError, OSError) as error:  # its bitmaps; what it held is in the copy
            self._log(f"{old.name} was not closed in order: {error}")

    def _carry(self, old: FormatImage, target: Image) -> None:
        """What bitmaps tell goes along. Where that fails the copy lacks them, which counts as not knowing."""
        if not self._carried or not isinstance(target, Qcow2Writer):
            return
        chain = old.image.chain()
        try:
            target.store_bitmaps()  # the next write looks which there are
            merge_into(target, [chain[number] for number in self._carried if number < len(chain)])
        except (KvikError, OSError) as error:
            self._log(f"{target.path} has not the bitmaps of {old.name}: {error}")

    def abandon(self) -> bool:
        self._image.changing = None
        if self._writer is not None:
            self._writer.abandon()
            return False
        self._let_go()
        return True

    def _let_go(self) -> None:
        """The copy is closed as it is."""
        below, self._below = self._below, None
        if below is not None:
            below.release()
        self._new.image.release()
        self._new.close()
