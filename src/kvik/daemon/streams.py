"""Streams: bytes that follow a call, in one or both directions.

Output waits while the client does not take it (the source is not read), input waits while the sink does not take it
(the connection is not read). Nothing is buffered without bound on either side.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvik.errors import HostError, ResourceBusy, RpcError
from kvik.rpc import message as m
from kvik.rpc.message import Key

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

__all__ = ["DescriptorStream", "DownloadStream", "Stream"]

READ_SIZE = 65536
PENDING_MAX = 256 * 1024  # bytes of input that wait for the sink before the client is no longer read
STALL_LIMIT = 10.0  # seconds a sink may take nothing before the stream is given up


class Stream:
    """One stream of a connection. Subclasses say where data comes from and goes."""

    def __init__(self, connection: Connection, key: Key) -> None:
        self.connection = connection
        self.key = key
        self.closed = False

    def start(self) -> None:
        """The call was answered: data may flow."""

    def received(self, data: bytes) -> None:
        raise RpcError("this stream takes no data")

    def hole(self, length: int) -> None:
        """So many zero bytes, not sent."""
        raise RpcError("this stream takes no holes")

    def ended(self) -> None:
        """The client will send no more."""

    def finish(self) -> bool:
        """The client wants to hear that all was taken. True: it hears so later, by `Connection.finish_stream`."""
        return False

    def drained(self) -> None:
        """The client takes output again."""

    def tick(self, now: float) -> None:
        """About once a second."""

    def close(self) -> None:
        """Forget everything. Called once, by the connection."""
        self.closed = True


class DownloadStream(Stream):
    """Bytes that exist already, to the client."""

    def __init__(self, connection: Connection, key: Key, data: bytes) -> None:
        super().__init__(connection, key)
        self._data = memoryview(data)
        self._done = False

    def start(self) -> None:
        self.drained()

    def drained(self) -> None:
        transport = self.connection.transport
        while not self.closed and not self._done and not transport.congested:
            piece, self._data = self._data[: m.STREAM_DATA_MAX], self._data[m.STREAM_DATA_MAX :]
            transport.write(m.stream_data(self.key, bytes(piece)))
            self._done = not piece  # the empty packet just sent says so to the client

    def close(self) -> None:
        super().close()
        self._data = memoryview(b"")


class DescriptorStream(Stream):
    """Both directions of a descriptor (a console, a channel). Owns `fd`, which must be non-blocking.

    `on_close` is called once, however the stream ends.
    """

    def __init__(self, connection: Connection, key: Key, fd: int, on_close: Callable[[], None]) -> None:
        super().__init__(connection, key)
        self._fd = fd
        self._loop: asyncio.AbstractEventLoop = connection.server.loop
        self._on_close = on_close
        self._reading = False
        self._writing = False
        self._end_sent = False
        self._pending = bytearray()
        self._stalled_since = 0.0

    def start(self) -> None:
        if not self.closed:
            self._resume()

    # guest to client

    def _resume(self) -> None:
        if not self._reading and not self._end_sent:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""  # EIO: the other side of a pseudo terminal is gone
        transport = self.connection.transport
        transport.write(m.stream_data(self.key, data))
        if not data:
            self._pause()
            self._end_sent = True
        elif transport.congested:
            self._pause()

    def drained(self) -> None:
        if not self.closed:
            self._resume()

    # client to guest

    def received(self, data: bytes) -> None:
        if not self._pending:
            data = data[self._write(data) :]
        if data:
            self._pending += data
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._fd, self._writable)
            if len(self._pending) > PENDING_MAX and not self._stalled_since:
                self._stalled_since = self._loop.time()
                self.connection.stream_stalled(True)

    def _write(self, data: bytes | bytearray) -> int:
        try:
            return os.write(self._fd, data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise HostError(f"the console is gone: {error.strerror}", errno=error.errno or 0) from error

    def _writable(self) -> None:
        try:
            count = self._write(self._pending)
        except HostError as error:
            self.connection.abort_stream(self.key, error)
            return
        del self._pending[:count]
        if not self._pending:
            self._writing = False
            self._loop.remove_writer(self._fd)
        if self._stalled_since:
            if len(self._pending) <= PENDING_MAX:
                self._stalled_since = 0.0
                self.connection.stream_stalled(False)
            elif count:
                self._stalled_since = self._loop.time()

    def tick(self, now: float) -> None:
        if self._stalled_since and now - self._stalled_since > STALL_LIMIT:
            error = ResourceBusy(f"the guest took no input for {STALL_LIMIT:.0f} s")
            self.connection.abort_stream(self.key, error)

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        self._pause()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)
        if self._stalled_since:
            self._stalled_since = 0.0
            self.connection.stream_stalled(False)
        os.close(self._fd)
        self._on_close()
