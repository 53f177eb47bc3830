"""QMP over a Unix socket in an asyncio loop: a thin shell around `kvik.qmp.protocol.Client`.

Every wait has a deadline, and a peer that is silent, stopped or talks garbage harms only its own commands. The
socket is used directly rather than through a transport, because descriptors travel with commands (SCM_RIGHTS).

    connection = await QmpConnection.open(sock, name="vm1", deadline=5.0, on_event=..., on_disconnect=...)
    status = await connection.execute("query-status")
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvik.errors import HypervisorError, OperationTimeout, ResourceBusy
from kvik.qmp.protocol import Client, Event, Failure, Greeting, Ready, Reply

__all__ = ["EventCallback", "QmpConnection", "connect_unix", "short_unix_path"]

DEFAULT_DEADLINE = 5.0
_CHUNK = 65536
_MAX_QUEUED = 16 * 1024 * 1024  # bytes waiting for a peer that does not read
_MAX_PENDING = 256

EventCallback = Callable[[Event], None]
DisconnectCallback = Callable[[HypervisorError | None], None]


async def connect_unix(path: str | Path, deadline: float = DEFAULT_DEADLINE) -> socket.socket:
    """A non-blocking connection to a listening Unix socket. Raises `HypervisorError`, `OperationTimeout`.

    A full backlog (the peer is stopped) shows as EAGAIN on a Unix socket and cannot be polled for: try again
    until the deadline. Paths over 107 bytes are reached through a descriptor of their directory.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline
    pause = 0.001
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            with short_unix_path(Path(path)) as name:
                sock.connect(name)
            return sock
        except BlockingIOError:
            sock.close()
        except OSError as error:
            sock.close()
            raise HypervisorError(f"cannot connect to {path}: {error.strerror}") from error
        if loop.time() + pause > end:
            raise OperationTimeout(f"cannot connect to {path} within {deadline:g} s: its owner does not answer")
        await asyncio.sleep(pause)
        pause = min(pause * 2, 0.1)


@contextlib.contextmanager
def short_unix_path(path: Path) -> Iterator[str]:
    """A name for `path` that fits the 108 bytes of sockaddr_un, valid inside the `with` block."""
    if len(os.fsencode(path)) < 108:
        yield str(path)
        return
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


class QmpConnection:
    """One QMP session. Made by `open`; ends by `close`, the peer's end of stream, or bad input."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        name: str,
        on_event: EventCallback | None = None,
        on_disconnect: DisconnectCallback | None = None,
    ) -> None:
        self.name = name
        self._sock = sock
        self._client = Client()
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._on_disconnect = on_disconnect
        self._waiting: dict[int, asyncio.Future[Reply | Failure]] = {}
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._out: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._queued = 0
        self._received = 0  # bytes
        self._closed = False
        self._ended = False
        self._failure: HypervisorError | None = None

    @classmethod
    async def open(
        cls,
        sock: socket.socket,
        *,
        name: str,
        deadline: float = DEFAULT_DEADLINE,
        on_event: EventCallback | None = None,
        on_disconnect: DisconnectCallback | None = None,
    ) -> QmpConnection:
        """Greeting and negotiation on a connected, non-blocking socket, which the connection then owns."""
        connection = cls(sock, name=name, on_event=on_event, on_disconnect=None)
        connection._loop.add_reader(sock.fileno(), connection._readable)
        try:
            async with asyncio.timeout(deadline):
                await connection._ready
        except TimeoutError:
            connection.close()
            raise OperationTimeout(f"{name}: the monitor said nothing useful within {deadline:g} s") from None
        except BaseException:
            connection.close()
            raise
        connection._on_disconnect = on_disconnect
        if connection._ended and on_disconnect:  # the stream ended in the same breath as the handshake
            connection._loop.call_soon(on_disconnect, connection._failure)
        return connection

    @property
    def greeting(self) -> Greeting:
        if self._client.greeting is None:
            raise HypervisorError(f"{self.name}: the monitor has not greeted")
        return self._client.greeting

    @property
    def closed(self) -> bool:
        return self._closed

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        deadline: float = DEFAULT_DEADLINE,
    ) -> Any:
        """The command's return value. `fds` are sent along and stay the caller's.

        Raises `MonitorError` (the VMM refused), `OperationTimeout` (no answer), `HypervisorError` (no monitor).
        """
        if self._closed:
            raise self._gone(command)
        if len(self._waiting) >= _MAX_PENDING:
            raise ResourceBusy(f"{self.name}: {len(self._waiting)} monitor commands already wait for an answer")
        number, data = self._client.execute(command, arguments)
        future: asyncio.Future[Reply | Failure] = self._loop.create_future()
        self._waiting[number] = future
        timer = self._loop.call_later(deadline, _expire, future)
        try:
            self._send(data, fds)
            outcome = await future
        except TimeoutError:
            raise OperationTimeout(
                f"{self.name}: the VMM did not answer {command} within {deadline:g} s",
                remedy="it may be stopped, or stuck on its storage; destroy ends it for certain",
            ) from None
        finally:
            timer.cancel()
            self._waiting.pop(number, None)
            self._client.forget(number)
        if isinstance(outcome, Failure):
            raise outcome.error(command)
        return outcome.value

    def close(self) -> None:
        """End the session at once; commands that wait fail. No disconnect callback. Idempotent."""
        self._on_disconnect = None
        self._shut(None)

    def drain(self) -> None:
        """Handle what has already arrived, now: a peer that ended may have said why."""
        while not self._closed:
            before = self._received
            self._readable()
            if self._received == before:
                return

    # -- below: called by the loop

    def _send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        if self._queued + len(data) > _MAX_QUEUED:
            raise ResourceBusy(f"{self.name}: the monitor does not read what it is sent")
        self._out.append((memoryview(data), fds))
        self._queued += len(data)
        if len(self._out) == 1:
            self._writable()

    def _writable(self) -> None:
        while self._out:
            data, fds = self._out[0]
            ancillary = []
            if fds:  # with the first byte of their own command, and only once
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            try:
                sent = self._sock.sendmsg([data], ancillary)
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._sock.fileno(), self._writable)
                return
            except OSError as error:
                self.drain()  # what it said before it went is an answer to those who wait
                self._shut(HypervisorError(f"{self.name}: the monitor cannot be written to: {error.strerror}"))
                return
            self._queued -= sent
            if sent == len(data):
                self._out.popleft()
            else:
                self._out[0] = (data[sent:], ())
        self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            if self._closed:
                return
            self._shut(HypervisorError(f"{self.name}: the monitor cannot be read: {error.strerror}"))
            return
        self._received += len(data)
        try:
            messages = self._client.receive(data)
        except HypervisorError as error:
            self._shut(HypervisorError(f"{self.name}: the monitor speaks nonsense: {error.message}"))
            return
        for message in messages:
            if isinstance(message, Reply | Failure):
                future = self._waiting.get(message.id) if message.id is not None else None
                if future is not None and not future.done():
                    future.set_result(message)
            elif isinstance(message, Event):
                if self._on_event is not None:
                    self._on_event(message)
            elif isinstance(message, Greeting):
                self._send(self._client.negotiate())
            elif isinstance(message, Ready) and not self._ready.done():
                self._ready.set_result(None)
            if self._closed:
                return
        if not data:
            self._shut(None)

    def _gone(self, command: str) -> HypervisorError:
        if self._failure is not None:
            return HypervisorError(f"{self.name}: {command} cannot be sent: {self._failure.message}")
        return HypervisorError(f"{self.name}: {command} cannot be sent: the VMM is gone")

    def _shut(self, failure: HypervisorError | None) -> None:
        if self._closed:
            return
        self._closed = self._ended = True
        self._failure = failure
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._out.clear()
        self._queued = 0
        error = failure or HypervisorError(f"{self.name}: the VMM closed its monitor")
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # retrieved here, so that an unawaited handshake is not reported at exit
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)
        if self._on_disconnect is not None:
            self._on_disconnect(failure)


def _expire(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())
