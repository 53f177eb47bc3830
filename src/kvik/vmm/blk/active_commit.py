"""Commit of the image that the guest writes to: it changes over to the base when that has caught up and it is told to.

What the guest writes meanwhile is marked before it is written, and copied again when nothing is in flight. The change
is made between two requests. Until then nobody reads what was written to the base; from then on the document's chain is
wrong, and the file of changed tables says so to the process that comes after this one.
"""

from __future__ import annotations

import os

from kvik.errors import ImageError, KvikError
from kvik.image.qcow2.tracking import first_bit, set_bits
from kvik.image.resize import resize
from kvik.vmm.blk.block_job import STEP, BlockJob
from kvik.vmm.blk.commit import LOOK, Base
from kvik.vmm.blk.image import FormatImage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvik.image.qcow2.writer import Qcow2Writer
    from kvik.vmm.blk.overlay import Overlays
    from kvik.vmm.virtio.blk import Blk

__all__ = ["ActiveCommit"]

CHUNK_BITS = 16  # of what is marked
FEW = 4 << 20  # bytes that may be left to copy while the guest's requests wait


class ActiveCommit(BlockJob):
    """`count` images, `top` the first of them, into the one that follows, whose node the manager calls `node`."""

    def __init__(
        self,
        job: str,
        device: Blk,
        image: FormatImage,
        top: Qcow2Writer,
        *,
        count: int,
        fds: tuple[int, int],
        node: str,
        overlays: Overlays,
        locking: bool,
        speed: int,
        ended: Callable[[], object],
        log: Callable[[str], object],
    ) -> None:
        """Takes over `fds` of the base: for writing, and another open file (-1: none) for caches that want O_DIRECT."""
        base_fd, self._data = fds
        self._upper = top.chain()[:count]
        try:
            self._base = Base(self._upper[-1], base_fd, locking=locking)
        except BaseException:
            self._close_data()
            raise
        base = self._base.image
        try:
            if base.size > top.size:
                raise ImageError(f"has {base.size} bytes, and the disk {top.size}", file=base.path)
            if base.size < top.size:
                resize(base, (top.size + 511) & -512)
        except BaseException:
            self._close_data()
            self._base.let_go(self._upper[-1])
            raise
        self._top, self._node, self._overlays, self._log = top, node, overlays, log
        self._dirty = bytearray((((top.size - 1) >> CHUNK_BITS) >> 3) + 1)
        self.ready = self._completing = False
        super().__init__(job, device, image, speed=speed, ended=ended)
        image.changing = self._mark

    def report(self) -> dict[str, Any]:
        told = super().report()
        return told | {"state": "ready"} if self.ready and self.state == "running" else told

    def _mark(self, offset: int, length: int) -> None:
        set_bits(self._dirty, offset >> CHUNK_BITS, ((offset + length - 1) >> CHUNK_BITS) + 1)

    @property
    def written(self) -> int:
        return self._base.image.data_fd

    def complete(self) -> bool:
        """Whether it does: only one that is ready."""
        self._completing = self.ready
        return self.ready

    def waits(self) -> bool:
        left = int.from_bytes(self._dirty, "little").bit_count()
        self.ready = self.ready or not left
        return not self._completing or left << CHUNK_BITS > FEW

    def step(self) -> int:
        if self.current < self.total:
            end = min(self.current + LOOK, self.total)
            self.current, copied = self._base.take(self._top, len(self._upper), self.current, end)
            return copied
        return self._copy_marked(STEP) if self.settled() else 0

    def _copy_marked(self, most: int) -> int:
        """What was written since it was copied; nothing is in flight."""
        copied, at = 0, 0
        while copied < most and (bit := first_bit(self._dirty, at)) >= 0:
            at = bit >> 3
            start = bit << CHUNK_BITS
            end = min(start + (1 << CHUNK_BITS), self._top.size)
            while start < end:
                start, part = self._base.take(self._top, len(self._upper), start, end)
                copied += part
            self._dirty[at] &= self._dirty[at] - 1
        return copied

    def finish(self) -> None:
        old, base = self._image, self._base.image
        self._copy_marked(1 << 62)
        base.flush()
        self._top.flush()
        data, self._data = self._data, -1
        new = FormatImage(
            base,
            data if data >= 0 else os.dup(base.fd),
            cache=old.cache,
            discard=old.can_discard,
            locking=False,  # the base is
            name=base.path,
            log=self._log,
        )
        old.changing = None
        self._overlays.pivot(new, self._node)
        self._base.keep()
        gone, self._top.backing = self._top.backing, None
        try:
            old.close()
        except (KvikError, OSError) as error:  # its bitmaps; what it held is in the base
            self._log(f"{old.name} was not closed in order: {error}")
        if gone is not None:
            gone.release()

    def abandon(self) -> bool:
        self._image.changing = None
        self._close_data()
        if self.settled():  # else the base stays as it is, and open, until the disk ends
            self._base.abandon()
        return True

    def _close_data(self) -> None:
        fd, self._data = self._data, -1
        if fd >= 0:
            os.close(fd)
