"""What NBD clients read of a backup: the disk as it was, which parts of it have data, and which changed."""

from __future__ import annotations

import struct

from kvik.errors import KvikError
from kvik.image.base import COMPRESSED, DATA
from kvik.vmm.blk import nbd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from kvik.vmm.blk.backup import Backup

__all__ = ["Export"]

ALLOCATION, DIRTY = "base:allocation", "qemu:dirty-bitmap:"
HOLE, ZERO = 1, 2  # of base:allocation
STEP = 512 << 10  # bytes that one turn of the loop reads
MAX_EXTENTS = 1024  # of one reply
MAX_LOOKED_AT = 1 << 30  # bytes that one request for extents is answered for


class Export:
    """Read-only. `bitmap`: under which name what changed is told, "": it is not. `lock`: the device's."""

    def __init__(self, backup: Backup, bitmap: str, lock: Any) -> None:
        self._backup, self._lock = backup, lock
        self.size = backup.target.size
        self.contexts = [ALLOCATION, DIRTY + bitmap] if bitmap else [ALLOCATION]

    def read(self, offset: int, length: int) -> Iterator[tuple[int, bytes]]:
        """(bytes, data) in order; no data: zeros. Raises `KvikError`, OSError."""
        end = offset + length
        while offset < end:
            stop = min(end, offset + STEP)
            with self._lock:
                parts = []
                for kind, at, size, image, host in self._backup.pieces(offset, stop - offset):
                    if kind in (DATA, COMPRESSED):
                        buffer = bytearray(size)
                        image.read_piece(kind, at, host, memoryview(buffer))
                        parts.append((size, bytes(buffer)))
                    else:
                        parts.append((size, b""))
            yield from parts
            offset = stop

    def extents(self, context: str, offset: int, length: int, *, one: bool) -> list[tuple[int, int]]:
        """(bytes, flags) from `offset` on; not necessarily of all. Raises `KvikError`, OSError."""
        length = min(length, MAX_LOOKED_AT)
        found: list[tuple[int, int]] = []
        with self._lock:
            for size, flags in (self._allocation if context == ALLOCATION else self._dirty)(offset, length):
                if found and found[-1][1] == flags:
                    found[-1] = (found[-1][0] + size, flags)
                elif len(found) == (1 if one else MAX_EXTENTS):
                    break
                else:
                    found.append((size, flags))
        return found

    def _allocation(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        for kind, _, size, _, _ in self._backup.pieces(offset, length):
            yield size, 0 if kind in (DATA, COMPRESSED) else HOLE | ZERO

    def _dirty(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        bits, shift = self._backup.bits, self._backup.bits_shift
        end = offset + length
        while offset < end:
            bit = offset >> shift
            stop = min(end, (bit + 1) << shift)
            yield stop - offset, bits[bit >> 3] >> (bit & 7) & 1
            offset = stop

    # Replies -----------------------------------------------------------------------------------------------------

    def answer(self, request: nbd.Request, contexts: Sequence[str], *, structured: bool) -> Iterator[bytes]:
        """A request's reply, piece by piece. Raises `ProtocolError` where only closing is left."""
        error = self._refusal(request, contexts)
        if error:
            yield nbd.error_reply(request, error, structured=structured)
        elif request.type == nbd.FLUSH:
            yield nbd.chunk(request, nbd.T_NONE, done=True) if structured else nbd.simple_reply(request)
        elif request.type == nbd.BLOCK_STATUS:
            yield self._status(request, contexts)
        elif structured and not request.flags & nbd.DF:
            yield from self._in_chunks(request)
        else:
            yield from self._as_one(request, structured=structured)

    def _refusal(self, request: nbd.Request, contexts: Sequence[str]) -> int:
        if request.type not in (nbd.READ, nbd.FLUSH, nbd.BLOCK_STATUS):
            return nbd.EPERM if request.type in nbd.WRITING else nbd.EINVAL
        if request.type == nbd.FLUSH:
            return 0
        if not request.length or request.offset + request.length > self.size:
            return nbd.EINVAL
        if request.type == nbd.BLOCK_STATUS and not contexts:
            return nbd.EINVAL
        return nbd.EOVERFLOW if request.type == nbd.READ and request.length > nbd.MAX_LENGTH else 0

    def _status(self, request: nbd.Request, contexts: Sequence[str]) -> bytes:
        reply = b""
        try:
            for number, context in enumerate(contexts):
                found = self.extents(context, request.offset, request.length, one=bool(request.flags & nbd.REQ_ONE))
                data = struct.pack(">I", number) + b"".join(struct.pack(">II", *extent) for extent in found)
                reply += nbd.chunk(request, nbd.T_STATUS, data, done=number == len(contexts) - 1)
        except (KvikError, OSError):
            return nbd.error_reply(request, nbd.EIO, structured=True)
        return reply

    def _in_chunks(self, request: nbd.Request) -> Iterator[bytes]:
        at = request.offset
        try:
            for size, data in self.read(at, request.length):
                place = struct.pack(">Q", at)
                if data:
                    yield nbd.chunk(request, nbd.T_DATA, place, more=size) + data
                else:
                    yield nbd.chunk(request, nbd.T_HOLE, place + struct.pack(">I", size))
                at += size
        except (KvikError, OSError):
            yield nbd.error_reply(request, nbd.EIO, structured=True)
        else:
            yield nbd.chunk(request, nbd.T_NONE, done=True)

    def _as_one(self, request: nbd.Request, *, structured: bool) -> Iterator[bytes]:
        """With one header before all data: what fails when that was sent ends the connection."""
        place = struct.pack(">Q", request.offset)
        header = (
            nbd.chunk(request, nbd.T_DATA, place, more=request.length, done=True)
            if structured
            else nbd.simple_reply(request)
        )
        try:
            for size, data in self.read(request.offset, request.length):
                yield header + (data or bytes(size))
                header = b""
        except (KvikError, OSError) as error:
            if not header:
                raise nbd.ProtocolError("reading failed amid a reply") from error
            yield nbd.error_reply(request, nbd.EIO, structured=structured)
