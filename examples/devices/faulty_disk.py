"""A disk that fails when it is told to: how does the guest's file system take it?

image = FaultyImage("disk.raw")
machine.add(Blk("disk0", image))
image.fail(first=2048, last=4095)              # sectors 2048 to 4095: EIO from now on
image.fail(every=100, number=errno.ENOSPC)     # each hundredth write anywhere
image.heal()
"""

import errno

from kvik.vmm.backends.block import SECTOR, BlockImage
from kvik.vmm.backends.request import WRITE, Request


class FaultyImage(BlockImage):
    def __init__(self, source: str | int, **options: object) -> None:
        super().__init__(source, **options)  # type: ignore[arg-type]  # BlockImage names them
        self.heal()

    def heal(self) -> None:
        self.first, self.last, self.every, self.number = 0, -1, 0, errno.EIO
        self.writes = self.failed = 0

    def fail(self, *, first: int = 0, last: int = -1, every: int = 0, number: int = errno.EIO) -> None:
        """Fail what touches the sectors `first` to `last`, and each `every`th write, with the errno `number`."""
        self.first, self.last, self.every, self.number = first, last, every, number

    def now(self, op: int, *request: object) -> bool:  # type: ignore[override]  # never: all requests come by `submit`
        return False

    def submit(self, request: Request, *, write_through: bool = False) -> bool:
        begin = request.offset // SECTOR
        end = (request.offset + request.length - 1) // SECTOR
        bad = request.length > 0 and begin <= self.last and end >= self.first
        if request.op == WRITE:
            self.writes += 1
            bad = bad or bool(self.every and self.writes % self.every == 0)
        if not bad:
            return super().submit(request, write_through=write_through)
        self.failed += 1
        request.result = -self.number
        return True  # done, badly
