"""A stream of bytes through the daemon: a guest's console, a screenshot, a volume's contents.

with domain.console() as stream, raw_terminal(0):
    why = stream.pump(0, 1)          # "escape", "end" or "eof"
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager, suppress

from kvik.errors import KvikError, OperationTimeout
from kvik.rpc import message as m
from kvik.rpc.message import Key

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Final, Literal

    from kvik.client.link import Link

    PumpEnd = Literal["escape", "end", "eof"]

ESCAPE: Final = b"\x1d"  # Ctrl-]
HOLE_CHUNK: Final = 1 << 20


class Stream:
    """One open stream. Received data is bytes; `b""` is its end. A context manager: leaving it finishes the stream."""

    def __init__(self, link: Link, key: Key) -> None:
        self._link = link
        self._key = key
        self._ended = False  # the peer sends no more
        self._closed = False
        self._hole = 0  # zero bytes still to be handed out

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._closed:
            return
        if error is None and self._ended:
            self.finish()
        else:
            # A console never ends by itself: giving it up is how everybody leaves one.
            self.abort()

    def send(self, data: bytes) -> None:
        """Send all of `data`, in as many packets as needed."""
        for start in range(0, len(data), m.STREAM_DATA_MAX):
            self._link.send_bytes(m.stream_data(self._key, data[start : start + m.STREAM_DATA_MAX]))

    def send_hole(self, length: int) -> None:
        """So many zero bytes, told instead of sent: to a stream that was opened as sparse."""
        self._link.send_bytes(m.stream_hole(self._key, length))

    def check(self) -> None:
        """Raise if the peer has given the stream up meanwhile: what is sent from then on is lost."""
        with suppress(OperationTimeout):
            self._link.receive(0.0)
        for message in self._link.streams.get(self._key, ()):
            if isinstance(message, m.StreamAbort):
                self._forget()
                raise message.error()

    def recv_piece(self, timeout: float | None = None) -> bytes | int:
        """As `recv`, but a hole comes as its length."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            queue = self._link.streams.get(self._key)
            if queue and isinstance(first := queue[0], m.StreamHole):
                queue.popleft()
                return first.length
            data = self._take()
            if data is not None:
                return data
            self._link.receive(deadline)

    def recv(self, timeout: float | None = None) -> bytes:
        """The next piece, b"" at the end. The peer's abort is raised; OperationTimeout after `timeout` s."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (data := self._take()) is None:
            self._link.receive(deadline)
        return data

    def _take(self) -> bytes | None:
        """What is there already; None if nothing is."""
        if self._hole:
            size = min(self._hole, HOLE_CHUNK)
            self._hole -= size
            return bytes(size)
        if self._ended:
            return b""
        queue = self._link.streams.get(self._key)
        if not queue:
            return None
        message = queue.popleft()
        match message:
            case m.StreamData():
                return message.payload
            case m.StreamHole():
                self._hole = message.length
                return self._take()
            case m.StreamAbort():
                self._forget()
                raise message.error()
            case m.StreamFinish():
                self._forget()
                return b""
            case _:
                self._ended = True
                return b""

    def read_all(self, limit: int, timeout: float | None = None) -> bytes:
        """Everything up to the end, then finish. KvikError if it is more than `limit` bytes."""
        parts, size = [], 0
        while data := self.recv(timeout):
            size += len(data)
            if size > limit:
                self.abort()
                raise KvikError(f"the daemon sent more than {limit} bytes on a stream")
            parts.append(data)
        self.finish()
        return b"".join(parts)

    def finish(self, timeout: float | None = 10.0) -> None:
        """End the stream properly: wait until the daemon confirms that all was taken."""
        if self._closed:
            return
        self._link.send_bytes(self._link.wire.finish_stream(self._key))
        self._confirm(timeout)

    def abort(self, timeout: float | None = 10.0) -> None:
        """Give the stream up. Never raises: there is nothing left to lose."""
        if self._closed:
            return
        with suppress(KvikError):
            self._link.send_bytes(self._link.wire.abort_stream(self._key))
            self._confirm(timeout)
        self._forget()

    def _confirm(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        queue = self._link.streams.get(self._key)
        try:
            while queue is not None:
                while queue:
                    message = queue.popleft()
                    if isinstance(message, m.StreamFinish):
                        return
                    if isinstance(message, m.StreamAbort):
                        raise message.error()
                self._link.receive(deadline)
        finally:
            self._forget()

    def _forget(self) -> None:
        self._ended = self._closed = True
        self._link.drop_stream(self._key)

    # --- a terminal at this end ---

    def pump(self, stdin_fd: int, stdout_fd: int, escape: bytes = ESCAPE) -> PumpEnd:
        """Carry bytes both ways until `escape` is typed ("escape"), the stream ends ("end") or stdin does ("eof").

        The terminal's mode is the caller's (`raw_terminal`). `escape` b"" means that nothing leaves.
        """
        import select

        poller = select.poll()
        poller.register(stdin_fd, select.POLLIN)
        poller.register(self._link.socket, select.POLLIN)
        while True:
            while (data := self._take()) is not None:
                if not data:
                    return "end"
                write_all(stdout_fd, data)
            for fd, _ in poller.poll():
                if fd != stdin_fd:
                    with suppress(OperationTimeout):
                        self._link.receive(0.0)  # what is there, without waiting
                    continue
                typed = os.read(stdin_fd, 4096)
                before, found, _ = typed.partition(escape) if escape else (typed, b"", b"")
                if before:
                    self.send(before)
                if found:
                    return "escape"
                if not typed:
                    return "eof"


def write_all(fd: int, data: bytes) -> None:
    """os.write until everything is out, also on a non-blocking descriptor."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            import select

            select.select([], [fd], [])


@contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Keys go to the guest one by one, Ctrl-C included; the old mode comes back in any case. No-op off a terminal."""
    if not os.isatty(fd):
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)  # not the default, which throws away what was typed ahead
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
