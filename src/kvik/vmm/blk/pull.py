"""Pull: what the images below have becomes the top image's own, which then rests on a lower one, or on none.

Nothing of what the guest reads changes by it, whenever it ends. Bitmaps do not record what is copied: the disk holds
what it held.
"""

from __future__ import annotations

from kvik.image.base import HOLE
from kvik.image.rebase import change_backing, changed
from kvik.vmm.blk.block_job import STEP, BlockJob

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.image.base import Image
    from kvik.image.qcow2.writer import Qcow2Writer
    from kvik.vmm.blk.image import FormatImage
    from kvik.vmm.virtio.blk import Blk

__all__ = ["Pull"]

LOOK = 64 << 20  # bytes of the disk that one turn of the loop looks at


class Pull(BlockJob):
    """`base`: what of the chain stays below `top`, by the name that its header is to state; or None."""

    def __init__(
        self,
        job: str,
        device: Blk,
        image: FormatImage,
        top: Qcow2Writer,
        *,
        base: Image | None,
        name: str | None,
        speed: int,
        ended: Callable[[], object],
    ) -> None:
        self._top, self._base, self._name = top, base, name
        self._buffer = bytearray(STEP)
        super().__init__(job, device, image, speed=speed, ended=ended)

    @property
    def written(self) -> int:
        return self._top.data_fd

    def step(self) -> int:
        top = self._top
        end = min(self.current + LOOK, top.size)
        copied = 0
        for kind, start, length, _ in list(top.runs(self.current, end - self.current)):
            if kind != HOLE:
                continue
            for at, size, zero in changed(top, self._base, start, length):
                self._copy(at, size, zero)
                copied += size if not zero else 0
                if copied >= STEP:
                    self.current = at + size
                    return copied
        self.current = end
        return copied

    def _copy(self, at: int, size: int, zero: bool) -> None:
        top = self._top
        top.begin()
        tracking, top.tracking = top.tracking, None
        try:
            if zero:
                top.write_zeroes(at, size)
            while size and not zero:
                part = memoryview(self._buffer)[: min(size, STEP)]
                top.read_into(at, part)
                top.write(at, part)
                at, size = at + len(part), size - len(part)
        finally:
            top.tracking = tracking

    def finish(self) -> None:
        top, base = self._top, self._base
        top.flush()
        change_backing(top, self._name, base.format if base is not None else None)
        gone, top.backing = top.backing, base
        while gone is not None and gone is not base:
            following, gone.backing = gone.backing, None
            gone.release()
            gone = following
