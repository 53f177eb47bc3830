"""A backup of the disk while its guest goes on writing: the disk as it was at one moment.

What is about to be overwritten is copied first, into the backup's image. Pushed, that is the target, and a job copies
all the rest, a piece each turn of the loop; a thread writes it (`writer`). Pulled, it is a scratch image: NBD clients
read what is there, and the rest from the disk.

A backup whose image fails ends, and the guest's request goes on: no backup harms its machine.
"""

from __future__ import annotations

from kvik.errors import ImageError, KvikError
from kvik.image.base import COMPRESSED, DATA
from kvik.image.qcow2.tracking import first_bit, set_bits
from kvik.vmm.blk.writer import Writer, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from kvik.image.base import Image, Piece
    from kvik.vmm.blk.image import FormatImage
    from kvik.vmm.loop import EventLoop

__all__ = ["Backup"]

CHUNK_BITS = 16  # what is copied at least, as QEMU does; a target with bigger clusters has them copied as a whole
PAUSE = 0.005  # seconds until a slow target is looked at again
STEP = 1 << 20  # bytes that one turn of the loop copies: the guest's requests wait meanwhile


class Backup:
    """Of the disk that `source` serves, into `target`, which is closed when it is over.

    added      nothing is copied yet
    running    from `begin` on; the device's lock is held there, and in `wants` and `before_write`
    ending     the guest's requests are no longer looked at; what is left is the target's
    concluded  by itself, by `cancel` or by an error; what it was is known until it is cleared
    """

    def __init__(
        self,
        job: str,
        target: Image,
        *,
        pull: bool,
        incremental: bool,
        loop: EventLoop,
        lock: Any,
        ended: Callable[[], object],
    ) -> None:
        self.job, self.target, self.pull, self.incremental = job, target, pull, incremental
        self.state, self.error = "added", ""
        self.total = self.current = 0
        self.bits, self.bits_shift = bytearray(), CHUNK_BITS  # of an incremental one: what changed
        self._loop, self._lock, self._ended = loop, lock, ended
        header = getattr(target, "header", None)
        self.chunk_bits = max(CHUNK_BITS, header.cluster_bits if header is not None else 0)
        self._pending = bytearray()  # chunks that are still to be copied, a bit each
        self._source: FormatImage | None = None
        self._next = 0  # the first byte of those that may not be 0
        self._writer: Writer | None = None  # of the target; a scratch image is written to as it is read
        if incremental and not pull:
            target.keep_zeroes = True  # type: ignore[attr-defined]  # what it is put on top of later has other data there

    def report(self) -> dict[str, Any]:
        return {
            "job": self.job,
            "state": self.state,
            "total": self.total,
            "current": self.current,
            "error": self.error,
        }

    # Its course --------------------------------------------------------------------------------------------------

    def begin(self, source: FormatImage, bits: bytearray | None, shift: int) -> None:
        """From now on the backup is of this moment: nothing is in flight. `bits`: what changed, of an incremental one,
        a bit for 2 to the power of `shift` bytes: a chunk, if it is pushed. Raises `ImageError` for a target that is
        too small."""
        size = source.image.size
        if self.target.size < size:
            raise ImageError(f"has {self.target.size} bytes, and the disk {size}", file=self.target.path)
        chunks = (size + (1 << self.chunk_bits) - 1) >> self.chunk_bits
        every = bytearray((chunks + 7) >> 3)
        set_bits(every, 0, chunks)
        self.bits, self.bits_shift = bits if bits is not None else bytearray(), shift
        self._pending = bytearray(bits) if bits is not None and not self.pull else every
        self._source, source.backup = source, self
        self.state = "running"
        if not self.pull:
            self.total = int.from_bytes(self._pending, "little").bit_count() << self.chunk_bits
            if chunks and self._is_pending(chunks - 1):
                self.total -= (chunks << self.chunk_bits) - size  # the last one is not all there
            self._writer = Writer(self.target, self._loop, self._failed, self._conclude)
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        writer = self._writer
        if self.state != "running" or writer is None:
            return
        if writer.crowded:
            self._loop.call_later(PAUSE, self._step)
            return
        with self._lock:
            begin = self._first_pending()
            if begin < 0:
                self._let_go()
                self.state = "ending"
                writer.finish()
                return
            end = begin + 1
            most = min(begin + max(1, STEP >> self.chunk_bits), len(self._pending) * 8)
            while end < most and self._is_pending(end):
                end += 1
            self._keep(begin, end)
        self._loop.call_soon(self._step)

    def _conclude(self, error: str = "") -> None:
        self.state, self.error = "concluded", self.error or error
        self._ended()

    def _failed(self, error: str) -> None:
        with self._lock:
            self.error = self.error or error
            self.cancel()

    def cancel(self) -> None:
        """It ends as it is, under the device's lock. Its image is worth nothing then."""
        if self.state not in ("added", "running"):
            return
        self._let_go()
        if self._writer is not None:
            self.state = "ending"
            self._writer.abandon()
        else:
            self.target.release()
            self._conclude()

    def _let_go(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.backup = None

    # Copying -----------------------------------------------------------------------------------------------------

    def _is_pending(self, chunk: int) -> int:
        return self._pending[chunk >> 3] >> (chunk & 7) & 1

    def _first_pending(self) -> int:
        """-1: none is left."""
        found = first_bit(self._pending, self._next)
        self._next = found >> 3 if found >= 0 else len(self._pending)
        return found

    def _chunks(self, offset: int, length: int) -> range:
        """Those of a range; it may end behind the image, in the disk's last sector."""
        last = min((offset + length - 1) >> self.chunk_bits, len(self._pending) * 8 - 1)
        return range(offset >> self.chunk_bits, last + 1)

    def wants(self, offset: int, length: int) -> bool:
        """Whether a range has anything that is still to be copied."""
        return any(self._is_pending(chunk) for chunk in self._chunks(offset, length))

    def before_write(self, offset: int, length: int) -> None:
        """The guest is about to change this range."""
        for chunk in self._chunks(offset, length):
            if self.state == "running" and self._is_pending(chunk):
                self._keep(chunk, chunk + 1)

    def _keep(self, begin: int, end: int) -> None:
        """Copy chunks. What fails ends the backup."""
        source = self._source
        assert source is not None
        start = begin << self.chunk_bits
        length = min(end << self.chunk_bits, source.image.size) - start
        try:
            for kind, at, size, image, host in source.image.pieces(start, length):
                self._copy(kind, at, size, image, host)
        except (KvikError, OSError) as error:
            self._failed(reason(error))
            return
        for chunk in range(begin, end):
            self._pending[chunk >> 3] &= ~(1 << (chunk & 7))
        self.current += length

    def _copy(self, kind: int, at: int, size: int, image: Image, host: int) -> None:
        data = bytearray(size) if kind in (DATA, COMPRESSED) else None
        if data is not None:
            image.read_piece(kind, at, host, memoryview(data))
        if self._writer is not None:
            self._writer.put(at, size, data)
        elif data is not None:  # a scratch image is blank
            self.target.write(at, data)

    # The disk as it was, for who pulls it ------------------------------------------------------------------------

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """What a range of the disk was made of, as `Image.pieces` says it. Raises `ImageError` when it is over."""
        shift = self.chunk_bits
        end = offset + length
        while offset < end:
            source = self._source
            if source is None or self.state != "running":
                raise ImageError("the backup is over", file=self.target.path)
            kept = not self._is_pending(offset >> shift)
            stop = ((offset >> shift) + 1) << shift
            while stop < end and (not self._is_pending(stop >> shift)) == kept:
                stop += 1 << shift
            stop = min(stop, end)
            yield from (self.target if kept else source.image).pieces(offset, stop - offset)
            offset = stop
