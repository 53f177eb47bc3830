"""The saver's loop.

    a write waits at a page    -> its piece of 2 MiB is copied, and may be written in all processes
    room in the pipe           -> what was copied goes; the next piece that was not
    all of it is in the pipe   -> every process is told, and says that it has let go

A piece is copied once, whoever asked first. Who waits never waits for the disk behind the pipe, unless more than
MAX_QUEUED is copied and not written yet.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import socket
import time
from collections import deque

from kvik.errors import KvikError, OperationFailed
from kvik.vmm.layout import PAGE
from kvik.vmm.saver.mappings import Mapping, Memory, hear
from kvik.vmm.state.memory_file import is_zero
from kvik.vmm.state.protection import ALL_SAVED, LET_GO
from kvik.vmm.state.stream import CHUNK, PAGES, frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from kvik.vmm.saver.mappings import Piece

__all__ = ["Saver"]

MAX_QUEUED = 256 << 20  # bytes
_FEW = 4 << 20  # bytes that wait for the pipe, below which the next piece is copied
STUCK = 30.0  # seconds that the guest waits for a disk on which nothing happens, before its snapshot is given up
TOLD = 60.0  # seconds from the first process that tells of its memory to the last
_STEP = 0.2  # seconds
_PATIENCE = 10.0  # seconds that a process has for its last word
_GONE = "a process that has the memory mapped has given up, or ended"


class Saver:
    """`out` never blocks. `channels`: the VMM's first."""

    def __init__(self, out: int, channels: list[socket.socket]) -> None:
        self._out, self._channels = out, channels
        self._mappings: list[Mapping] = []
        buffer = mmap.mmap(-1, CHUNK)
        self._buffer = memoryview(buffer)
        self._address = ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))
        self._queue: deque[memoryview] = deque()
        self._queued = 0
        self._poll = select.poll()
        self._saved: set[int] = set()

    def run(self) -> None:
        """Raises `OperationFailed`, `HostError`, OSError; then the stream is not whole."""
        self._hear_all()
        for mapping in self._mappings:
            self._poll.register(mapping.uffd.fd, select.POLLIN)
        self._put(os.pread(self._memory.head, self._memory.first, 0))
        source = self._rest()
        scanning = True
        while scanning or self._queue:
            more = scanning and self._queued < _FEW
            self._turn(wait=not more)
            if more:
                scanning = next(source, False)
        self._end()

    def _hear_all(self) -> None:
        """Who has told already may wait to write: the others have to follow soon."""
        for channel in self._channels:
            self._poll.register(channel, select.POLLIN)
        told: dict[int, tuple[dict[str, Any], list[int]]] = {}
        end = 0.0
        while len(told) < len(self._channels):
            ready = self._look(_STEP)
            for channel in self._channels:
                if channel.fileno() in ready:
                    if channel.fileno() in told:
                        raise OperationFailed(_GONE)
                    told[channel.fileno()] = hear(channel)
                    end = end or time.monotonic() + TOLD
            if end and time.monotonic() > end:
                raise OperationFailed("not all processes that have the memory mapped have told of it")
        self._memory = Memory(*told[self._channels[0].fileno()], self._channels[0])
        self._mappings.append(self._memory.mapping)
        wanted = [(start, size) for start, size, _ in self._memory.mapping.regions]
        for channel in self._channels[1:]:
            facts, fds = told[channel.fileno()]
            mapping = Mapping(facts, fds[0], channel)
            self._mappings.append(mapping)
            if [(start, size) for start, size, _ in mapping.regions] != wanted:
                raise OperationFailed("a back end has other memory mapped than the VMM")

    def _rest(self) -> Iterator[bool]:
        """The rest of the stream, a piece with each step."""
        at, end = self._memory.first, os.fstat(self._memory.head).st_size
        while at < end:
            data = os.pread(self._memory.head, CHUNK, at)
            self._put(data)
            at += len(data)
            yield True
        for chunk in self._memory.pieces:
            if chunk not in self._saved:
                self._save(chunk)
                yield True
        self._put(os.pread(self._memory.tail, os.fstat(self._memory.tail).st_size, 0))

    def _look(self, seconds: float | None) -> set[int]:
        """Write what can be written; descriptors that have something to say."""
        self._poll.register(self._out, select.POLLOUT if self._queue else 0)  # POLLERR, if it is broken, comes unasked
        ready = dict(self._poll.poll(None if seconds is None else seconds * 1000))
        if ready.pop(self._out, 0) & (select.POLLERR | select.POLLNVAL):
            raise OperationFailed("nobody takes the machine's memory any more")
        self._flush()
        return set(ready)

    def _turn(self, *, wait: bool) -> None:
        ready = self._look(None if wait else 0)
        for mapping in self._mappings:
            if mapping.channel.fileno() in ready:
                raise OperationFailed(_GONE)
            if mapping.uffd.fd in ready:
                for address in mapping.uffd.faults():
                    self._fault(mapping, address)

    def _wait_for_room(self) -> None:
        """Too much is copied and not written. Whoever waits to write waits for this; but not for ever."""
        left, end = self._queued, time.monotonic() + STUCK
        for mapping in self._mappings:
            self._poll.unregister(mapping.uffd.fd)
        while self._queued > MAX_QUEUED:
            if self._look(_STEP):
                raise OperationFailed(_GONE)
            if self._queued < left:
                left, end = self._queued, time.monotonic() + STUCK
            elif time.monotonic() > end:
                raise OperationFailed(f"nothing of the machine's memory could be written for {STUCK:.0f} seconds")
        for mapping in self._mappings:
            self._poll.register(mapping.uffd.fd, select.POLLIN)

    def _fault(self, mapping: Mapping, address: int) -> None:
        chunk = mapping.guest(address) // CHUNK
        if chunk not in self._saved:
            self._wait_for_room()
            self._save(chunk)
        else:  # it asked before it was let through
            self._let_through(mapping, chunk)

    def _save(self, chunk: int) -> None:
        for piece in self._memory.pieces[chunk]:
            if self._memory.read(piece, self._buffer):
                self._copy(piece)
        self._saved.add(chunk)
        for mapping in self._mappings:
            self._let_through(mapping, chunk)

    def _let_through(self, mapping: Mapping, chunk: int) -> None:
        for address, size in self._memory.pieces[chunk]:
            mapping.uffd.protect(mapping.here(address), size, on=False)

    def _copy(self, piece: Piece) -> None:
        """What is in the buffer, without its zeroes."""
        address, size = piece
        start, kind = 0, is_zero(self._address, PAGE)
        for at in range(PAGE, size + PAGE, PAGE):
            if at < size and is_zero(self._address + at, PAGE) == kind:
                continue
            if not kind:
                self._put(frame(PAGES, at - start, address + start))
                self._put(bytes(self._buffer[start:at]))
            start, kind = at, not kind

    def _put(self, data: bytes) -> None:
        self._queue.append(memoryview(data))
        self._queued += len(data)

    def _flush(self) -> None:
        while self._queue:
            try:
                count = os.write(self._out, self._queue[0])
            except BlockingIOError:
                return
            self._queued -= count
            if count == len(self._queue[0]):
                self._queue.popleft()
            else:
                self._queue[0] = self._queue[0][count:]

    def _end(self) -> None:
        """Memory is as any again; whoever could not keep it in place until now says so."""
        for mapping in self._mappings:
            for address, size in self._memory.protected:
                mapping.uffd.unregister(mapping.here(address), size)
            mapping.channel.send(ALL_SAVED)
        for mapping in self._mappings:
            mapping.channel.settimeout(_PATIENCE)
            if mapping.channel.recv(1) != LET_GO:
                raise OperationFailed(_GONE)

    def let_go(self) -> None:
        """After an error: nobody waits for us any more. Closing would do it; Linux before 6.9 then leaves marks."""
        for mapping in self._mappings:
            for address, size in self._memory.protected:
                try:
                    mapping.uffd.unregister(mapping.here(address), size)
                except KvikError:
                    pass  # that process has ended, or has mapped something else there
            mapping.uffd.close()
