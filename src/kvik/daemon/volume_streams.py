"""The bytes of a volume to a client and from one. Files block, so threads read and write them, a few MiB at a time."""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from kvik.daemon.errors import client_error
from kvik.daemon.streams import Stream
from kvik.errors import InvalidArgument, KvikError
from kvik.manager.storage import extents, in_thread, punch
from kvik.rpc import message as m
from kvik.rpc.message import Key

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection
    from kvik.manager.storage import Opened

__all__ = ["VolumeDownload", "VolumeUpload"]

BATCH = 16 * m.STREAM_DATA_MAX  # bytes read or written by one call of a thread, about 4 MiB
WAITING_MAX = 2 * BATCH  # bytes from the client that wait for the disk before it is no longer read


class _VolumeStream(Stream):
    """Holds the volume (`held` gives it free) until the stream has ended, however it ends."""

    def __init__(self, connection: Connection, key: Key, opened: Opened, held: AsyncExitStack) -> None:
        super().__init__(connection, key)
        self.opened = opened
        self._held = held
        self._wake = asyncio.Event()
        self._task = connection.server.spawn(self._run(), "volume stream")

    async def _run(self) -> None:
        try:
            await self._wake.wait()
            await self._work()
        except asyncio.CancelledError:
            if not self.closed:
                raise
        except Exception as error:
            self.connection.abort_stream(self.key, client_error(error, "volume stream"))
        finally:
            await self._held.aclose()

    async def _work(self) -> None:
        raise NotImplementedError  # each direction's own

    def start(self) -> None:
        self._wake.set()

    def close(self) -> None:
        if not self.closed:
            super().close()
            if self._task is not asyncio.current_task():  # that one is ending already
                self._task.cancel()


class VolumeDownload(_VolumeStream):
    """`sparse`: holes are told, not sent as zeros."""

    def __init__(self, connection: Connection, key: Key, opened: Opened, held: AsyncExitStack, sparse: bool) -> None:
        super().__init__(connection, key, opened, held)
        self._sparse = sparse

    def drained(self) -> None:
        self._wake.set()

    async def _work(self) -> None:
        start, end = self.opened.start, self.opened.end
        if not self._sparse:
            await self._send(start, end)
        else:
            position = start
            while position < end and not self.closed:
                piece = await in_thread(self._extent, position, end)
                if piece is None:
                    break
                offset, length, is_data = piece
                if is_data:
                    await self._send(offset, offset + length)
                else:
                    self.connection.transport.write(m.stream_hole(self.key, length))
                position = offset + length
        if not self.closed:
            self.connection.transport.write(m.stream_end(self.key))

    def _extent(self, start: int, end: int) -> tuple[int, int, bool] | None:
        return next(extents(self.opened.fd, start, end), None)

    async def _send(self, start: int, end: int) -> None:
        transport = self.connection.transport
        while start < end and not self.closed:
            data = memoryview(await in_thread(os.pread, self.opened.fd, min(BATCH, end - start), start))
            if not data:
                raise KvikError("the volume became shorter while it was sent")
            start += len(data)
            while data and not self.closed:
                self._wake.clear()
                if transport.congested:
                    await self._wake.wait()
                    continue
                transport.write(m.stream_data(self.key, bytes(data[: m.STREAM_DATA_MAX])))
                data = data[m.STREAM_DATA_MAX :]


class VolumeUpload(_VolumeStream):
    """Ends well when the client finishes and all is on disk; whatever fails first, the client hears."""

    def __init__(self, connection: Connection, key: Key, opened: Opened, held: AsyncExitStack, sparse: bool) -> None:
        super().__init__(connection, key, opened, held)
        self._sparse = sparse
        self._queue: deque[bytes | int] = deque()  # data, or the length of a hole
        self._waiting = 0
        self._announced = 0  # how far the client has sent
        self._finishing = False
        self._stalled = False

    def received(self, data: bytes) -> None:
        self._take(len(data))
        self._queue.append(data)
        self._waiting += len(data)
        if self._waiting > WAITING_MAX and not self._stalled:
            self._stalled = True
            self.connection.stream_stalled(True)

    def hole(self, length: int) -> None:
        if not self._sparse:
            super().hole(length)
        self._take(length)
        self._queue.append(length)
        self._wake.set()

    def _take(self, length: int) -> None:
        opened = self.opened
        self._announced += length
        if opened.start + self._announced > opened.end:
            raise InvalidArgument(f"more than the {opened.end - opened.start} bytes announced were sent")
        self._wake.set()

    def finish(self) -> bool:
        self._finishing = True
        self._wake.set()
        return True

    async def _work(self) -> None:
        position = self.opened.start
        while True:
            self._wake.clear()
            if self._queue:
                batch = [*self._queue]
                self._queue.clear()
                position = await in_thread(self._write, batch, position)
                self._waiting -= sum(len(piece) for piece in batch if isinstance(piece, bytes))
                if self._stalled and self._waiting <= WAITING_MAX:
                    self._stalled = False
                    self.connection.stream_stalled(False)
            elif self._finishing:
                await in_thread(os.fdatasync, self.opened.fd)
                await self._held.aclose()  # first: who hears that it is done may ask for it again at once
                self.connection.finish_stream(self.key)
                return
            else:
                await self._wake.wait()

    def _write(self, batch: list[bytes | int], position: int) -> int:
        """Blocks. Raises OSError."""
        for piece in batch:
            if isinstance(piece, int):
                punch(self.opened.fd, position, piece, self.opened.growing)
                position += piece
                continue
            view = memoryview(piece)
            while view:
                done = os.pwrite(self.opened.fd, view, position)
                if not done:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                view, position = view[done:], position + done
        return position

    def close(self) -> None:
        if self._stalled:
            self._stalled = False
            self.connection.stream_stalled(False)
        super().close()
