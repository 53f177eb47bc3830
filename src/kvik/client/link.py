"""Calls over one socket, blocking: sends, waits for the right answer, keeps what arrives meanwhile.

One thread at a time. While it waits for a reply, events queue up (`events`), packets of streams go to their stream's
queue, pings are answered.
"""

from __future__ import annotations

import _socket as socket  # the part of `socket` in C: the rest, with selectors and enum, costs a command 5 ms
import os
import time
from array import array
from collections import deque
from contextlib import suppress

from kvik.client.transport import Transport
from kvik.errors import ConnectError, OperationTimeout, RpcError
from kvik.rpc import message as m
from kvik.rpc.connection import Connection as Wire
from kvik.rpc.connection import Role
from kvik.rpc.message import Key, Message
from kvik.rpc.program import Procedure, program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Final

    from kvik.rpc.xdr_types import Record

RECEIVE_SIZE: Final = 262144
EVENTS_MAX: Final = 65536  # kept for a caller that does not look; the oldest go first


class Link:
    """A connected socket that speaks the protocol."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.socket = transport.socket
        self.wire = Wire(Role.CLIENT)
        self.events: deque[Message] = deque(maxlen=EVENTS_MAX)
        self.streams: dict[Key, deque[Message]] = {}
        self._replies: dict[int, Message] = {}  # by serial: answers that came while another was waited for
        self._abandoned: set[int] = set()  # calls whose caller gave up: their answers are dropped
        self.closed = False

    # --- calls ---

    def call(
        self,
        procedure: Procedure,
        values: Sequence[Any] = (),
        *,
        timeout: float | None = None,
        fds: Sequence[int] = (),
    ) -> Record:
        """Call and wait; the daemon's error is raised. `timeout` in seconds (None: for ever) -> OperationTimeout."""
        record: Record = self.wait(self.send(procedure, values, fds), timeout).decode()
        return record

    def send(self, procedure: Procedure, values: Sequence[Any] = (), fds: Sequence[int] = ()) -> tuple[int, Procedure]:
        """Send a call without waiting: several may be under way. The result is for `wait()`."""
        serial, data = self.wire.call(procedure, values, len(fds))
        self.send_bytes(data)
        for fd in fds:
            # The protocol wants one byte per descriptor, after the message, each with its own control message.
            self.socket.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))])
        return serial, procedure

    def wait(self, token: tuple[int, Procedure], timeout: float | None = None) -> m.Reply:
        serial, procedure = token
        deadline = None if timeout is None else time.monotonic() + timeout
        while (reply := self._replies.pop(serial, None)) is None:
            try:
                self.receive(deadline)
            except OperationTimeout:
                self._abandoned.add(serial)
                raise OperationTimeout(f"{procedure.name}: the daemon has not answered within {timeout:g} s") from None
        if reply.program != procedure.program.number or reply.procedure != procedure.number:
            raise RpcError(f"{reply!r} answers {procedure!r}")
        if isinstance(reply, m.ErrorReply):
            raise reply.error()
        assert isinstance(reply, m.Reply)
        return reply

    def open_stream(
        self, procedure: Procedure, values: Sequence[Any], timeout: float | None = None
    ) -> tuple[Key, Record]:
        """A call whose answer opens a stream: (the stream's key, the result)."""
        serial, _ = token = self.send(procedure, values)
        # Known before the answer is read: the first packets may come in the same segment.
        key = (procedure.program.number, procedure.number, serial)
        self.wire.open_stream(key)
        self.streams[key] = deque()
        try:
            return key, self.wait(token, timeout).decode()
        except BaseException:
            self.drop_stream(key)
            raise

    def drop_stream(self, key: Key) -> None:
        self.streams.pop(key, None)
        self.wire.forget_stream(key)

    # --- bytes ---

    def send_bytes(self, data: bytes) -> None:
        if self.closed:
            raise ConnectError("the connection is closed")
        try:
            self.socket.settimeout(None)
            self.socket.sendall(data)
        except OSError as error:
            raise self._lost(f"the daemon closed the connection ({error.strerror or error})") from error

    def receive(self, deadline: float | None = None) -> None:
        """Wait for bytes once and sort what they hold. OperationTimeout at `deadline` (time.monotonic())."""
        if self.closed:
            raise ConnectError("the connection is closed")
        try:
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                remaining = 0.0
            self.socket.settimeout(remaining)
            data, ancillary, flags, _ = self.socket.recvmsg(RECEIVE_SIZE, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except (TimeoutError, BlockingIOError):
            raise OperationTimeout("no answer in time") from None
        except OSError as error:
            raise self._lost(f"the connection to the daemon broke ({error.strerror or error})") from error
        if not data:
            raise self._lost("the daemon closed the connection")
        fds: list[int] = []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                fds.extend(received)
        try:
            if flags & socket.MSG_CTRUNC:
                raise RpcError("descriptors were lost: too many in one message")
            for message in self.wire.feed(data, fds):
                self._sort(message)
        except RpcError:
            self.close()
            raise

    def _sort(self, message: Message) -> None:
        match message:
            case m.Reply() | m.ErrorReply():
                if message.serial in self._abandoned:
                    self._abandoned.discard(message.serial)
                    for fd in message.fds:
                        os.close(fd)
                else:
                    self._replies[message.serial] = message
            case m.Event():
                self.events.append(message)
            case m.Ping():
                self.send_bytes(m.PONG_BYTES)
            case m.Pong():
                pass
            case _:
                queue = self.streams.get(message.key)
                if queue is not None:
                    queue.append(message)

    def next_event(self, timeout: float | None = None) -> Message | None:
        """The oldest event that nobody has seen, waiting for one if needed; None when `timeout` s have passed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.events:
            try:
                self.receive(deadline)
            except OperationTimeout:
                return None
        return self.events.popleft()

    def _lost(self, message: str) -> ConnectError:
        complaint = self.transport.complaint()
        self.close()
        return ConnectError(f"{message}: {complaint}" if complaint else message)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            for fd in self.wire.take_fds():
                os.close(fd)
            with suppress(OSError):
                self.transport.close()


_ANCILLARY: Final = socket.CMSG_SPACE(m.FDS_MAX * array("i").itemsize)

__all__ = ["Link", "program"]
