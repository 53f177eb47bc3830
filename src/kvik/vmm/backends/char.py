"""Where the bytes of a serial line, a console or a channel go on the host.

| backend | |
|---|---|
| null | nowhere |
| stdio | this process's standard input and output; a terminal is set raw, Ctrl-] ends the machine |
| pty | a new pseudo terminal; its name is in `filename` |
| file:PATH | output appended to a file |
| unix:PATH | a listening Unix socket; one client at a time, the next may come when it has gone |
| fd=N | a connected socket, pipe or terminal that the caller opened; a listening socket is accepted from |

Output that nobody takes is kept up to a bound, then refused: the device decides whether to wait or to drop. On a pty,
where nobody may ever look, it is dropped. With a log, all that the guest writes goes there as well.
"""

from __future__ import annotations

import os
import select
import stat
from _thread import allocate_lock

from kvik.errors import HostError, InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from kvik.vmm.loop import EventLoop

__all__ = ["Chardev"]

MAX_PENDING = 64 << 10  # bytes of output that wait for a slow reader
CHUNK = 4096
QUIT = b"\x1d"  # Ctrl-]


class Chardev:
    """One backend. All methods belong to the loop's thread, but for `write`, which any thread may call under its
    device's lock."""

    def __init__(self, backend: str, name: str = "", log: str = "") -> None:
        """`log`: file:PATH or fd=N, or empty."""
        self.backend, self.name = backend, name
        self.filename = backend
        self.on_quit: Callable[[], None] | None = None  # Ctrl-] on a terminal
        self.on_open: Callable[[bool], None] | None = None  # the other side came (True) or went
        self.on_writable: Callable[[], None] | None = None  # after a `write` that took less than all
        self.connected = False
        self.dropped = 0
        self._loop: EventLoop | None = None
        self._input: Callable[[bytes], None] = lambda data: None
        self._in = self._out = -1
        self._listener: socket.socket | None = None
        self._owned: list[int] = []
        self._pending = bytearray()
        self._lock = allocate_lock()  # over `_pending` and `_writing`: vCPUs write while the loop sends
        self._writing = False
        self._reading = True
        self._terminal: list[Any] | None = None
        self._is_stdio = False
        self._path = ""
        self._log = -1
        self._open()
        if log:
            self._open_log(log)

    # Opening, before the sandbox ----------------------------------------------------------------------------------

    def _open(self) -> None:
        kind, _, rest = self.backend.partition(":")
        if self.backend.startswith("fd="):
            self._open_fd(self.backend[3:])
        elif kind == "null" and not rest:
            pass
        elif kind == "stdio" and not rest:
            self._in, self._out, self._is_stdio = 0, self._own_stdout(), True
        elif kind == "pty" and not rest:
            self._open_pty()
        elif kind == "file" and rest:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            try:
                self._out = os.open(rest, flags, 0o600)
            except OSError as error:
                raise self._cannot(f"open {rest}", error) from error
            self._owned.append(self._out)
        elif kind == "unix" and rest:
            self._listen(rest.removesuffix(",server").removesuffix(",nowait"))
        else:
            raise InvalidArgument(
                f"{self.name or 'a character device'} cannot be connected to {self.backend!r}",
                remedy="use stdio, null, pty, file:PATH, unix:PATH or fd=N",
            )
        self.connected = self._in >= 0 or self._out >= 0

    def _own_stdout(self) -> int:
        """Standard output, through a descriptor of our own that never waits. The one we were given is shared with
        others (a shell), who would not expect it to become so; a socket or a closed one is taken as it is."""
        try:
            fd = os.open("/proc/self/fd/1", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            return 1
        self._owned.append(fd)
        return fd

    def _open_log(self, log: str) -> None:
        kind, _, rest = log.replace("=", ":", 1).partition(":")
        try:
            if kind == "fd" and rest.isdecimal():
                self._log = int(rest)
                os.set_inheritable(self._log, False)
                if not stat.S_ISREG(os.fstat(self._log).st_mode):
                    os.set_blocking(self._log, False)  # a reader that is stopped must not stop the guest
            elif kind == "file" and rest:
                self._log = os.open(rest, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            else:
                raise InvalidArgument(f"{self.name}: a log is file:PATH or fd=N, not {log!r}")
        except OSError as error:
            raise self._cannot(f"log to {rest}", error) from error
        self._owned.append(self._log)

    def _cannot(self, what: str, error: OSError) -> HostError:
        return HostError(f"{self.name}: cannot {what}: {error.strerror}", errno=error.errno or 0)

    def _open_fd(self, text: str) -> None:
        try:
            fd = int(text)
            mode = os.fstat(fd).st_mode
        except (ValueError, OverflowError):
            raise InvalidArgument(f"{self.name}: {text!r} is no descriptor's number") from None
        except OSError as error:
            raise self._cannot(f"use descriptor {text}", error) from error
        os.set_inheritable(fd, False)
        if stat.S_ISSOCK(mode):
            import socket  # 3 ms that a machine without one does not pay

            end = socket.socket(fileno=fd)
            if end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                end.setblocking(False)
                self._listener = end
                name = end.getsockname()
                self.filename = f"unix:{name},server=on" if isinstance(name, str) else self.backend
                return
            fd = end.detach()
        os.set_blocking(fd, False)
        self._in = self._out = fd
        self._owned.append(fd)

    def _open_pty(self) -> None:
        try:
            main, other = os.openpty()
            self.filename = f"pty:{os.ttyname(other)}"
        except OSError as error:
            raise self._cannot("make a pseudo terminal", error) from error
        _set_raw(other)
        os.set_blocking(main, False)
        # Our end of the other side stays open: without a reader the terminal would hang up all the time.
        self._owned += [main, other]
        self._in = self._out = main

    def _listen(self, path: str) -> None:
        import socket

        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            try:
                listener.bind(path)
            except OSError as error:
                if not _is_stale(path):
                    raise self._cannot(f"listen on {path}", error) from error
                os.unlink(path)  # noqa: PTH108 - pathlib is not imported by a machine
                listener.bind(path)
            os.chmod(path, 0o600)  # noqa: PTH101
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise self._cannot(f"listen on {path}", error) from error
        except BaseException:
            listener.close()
            raise
        self._listener, self._path = listener, path
        self.filename = f"unix:{path},server=on"

    # Running -----------------------------------------------------------------------------------------------------

    def open(
        self, loop: EventLoop, on_input: Callable[[bytes], None], on_open: Callable[[bool], None] | None = None
    ) -> None:
        """Begin to read; `on_input` is called with each piece."""
        self._loop, self._input = loop, on_input
        if on_open is not None:
            self.on_open = on_open
        if self._is_stdio:
            self._open_stdio()
        if self._listener is not None:
            loop.add_reader(self._listener.fileno(), self._accept)
        elif self._in >= 0:
            self._watch()
        if self.connected and self.on_open is not None:
            self.on_open(True)
        if self._pending:
            self._wait_writable()

    def _open_stdio(self) -> None:
        if os.isatty(0):
            self._terminal = _set_raw(0)
        if not _pollable(0):
            self._in = -1  # a file or /dev/null: there is no waiting for it, and no input worth it

    def _watch(self) -> None:
        if self._loop is not None and self._reading and self._in >= 0:
            try:
                self._loop.add_reader(self._in, self._readable)
            except PermissionError:
                self._in = -1  # epoll takes no regular files

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:
            if self._loop is not None:
                self._loop.hold_reader(self._listener.fileno())
            return
        if self._in >= 0:
            client.close()  # one at a time, as the field does it
            return
        client.setblocking(False)
        self._in = self._out = client.detach()
        self.connected = True
        self._watch()
        if self.on_open is not None:
            self.on_open(True)
        if self._pending:
            self._wait_writable()

    def _readable(self) -> None:
        try:
            data = os.read(self._in, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone()
            return
        if self._terminal is not None and QUIT in data and self.on_quit is not None:
            self.on_quit()
            return
        self._input(data)

    def _gone(self) -> None:
        """The other side closed."""
        with self._lock:
            if not self._ended():
                return  # standard input ended; output goes on
        self.connected = False
        if self.on_open is not None:
            self.on_open(False)

    def _ended(self) -> bool:
        """Let go of what was connected; whether output is over as well."""
        if self._loop is not None:
            if self._in >= 0:
                self._loop.remove_reader(self._in)
            if self._writing:
                self._loop.remove_writer(self._out)
                self._writing = False
        if self._listener is not None:
            os.close(self._in)
            self._pending.clear()
            self._in = self._out = -1
        elif self._in == self._out and not self._is_stdio:
            self._in = self._out = -1
            self._pending.clear()
        else:
            self._in = -1
            return self._out < 0
        return True

    def pause_input(self) -> None:
        """The device has no room: leave input where it is."""
        if self._reading:
            self._reading = False
            if self._loop is not None and self._in >= 0:
                self._loop.remove_reader(self._in)

    def resume_input(self) -> None:
        if not self._reading:
            self._reading = True
            if self._loop is not None:
                self._watch()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Bytes taken. Less than all: `on_writable` tells when to go on. Where nobody is connected all are taken, and
        lost."""
        taken = self._put(data)
        if self._log >= 0 and taken:
            try:
                os.write(self._log, memoryview(data)[:taken])
            except BlockingIOError:
                pass  # what its reader has no time for is lost there
            except OSError:
                self._log = -1  # the reader went away, or the disk is full: the guest goes on without
        return taken

    def _put(self, data: bytes | bytearray | memoryview) -> int:
        with self._lock:
            return self._send(data)

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        if self._out < 0:
            if self._listener is None or not self.backend.startswith("unix:"):
                self.dropped += len(data)
            return len(data)
        view = memoryview(data)
        sent = 0
        if not self._pending:
            try:
                sent = os.write(self._out, view)
            except BlockingIOError:
                pass
            except OSError:
                self.dropped += len(view)
                return len(view)
        rest = view[sent : sent + MAX_PENDING - len(self._pending)]
        if rest:
            self._pending += rest
            self._wait_writable()
        taken = sent + len(rest)
        if taken < len(view) and self.backend == "pty":
            self.dropped += len(view) - taken
            return len(view)
        return taken

    def _wait_writable(self) -> None:
        if self._writing or self._loop is None:
            return
        loop = self._loop

        def register() -> None:
            with self._lock:
                if self._pending and self._out >= 0 and not self._writing:
                    self._writing = True
                    loop.add_writer(self._out, self._flush)

        loop.call_soon(register)

    def _flush(self) -> None:
        with self._lock:
            try:
                sent = os.write(self._out, self._pending)
            except BlockingIOError:
                return
            except OSError:
                sent = len(self._pending)
                self.dropped += sent
            del self._pending[:sent]
            if not self._pending:
                assert self._loop is not None
                self._loop.remove_writer(self._out)
                self._writing = False
        if self.on_writable is not None:
            self.on_writable()

    def close(self) -> None:
        if self._terminal is not None:
            import termios

            termios.tcsetattr(0, termios.TCSADRAIN, self._terminal)
            self._terminal = None
        if self._loop is not None:
            if self._in >= 0:
                self._loop.remove_reader(self._in)
            if self._writing:
                self._loop.remove_writer(self._out)
                self._writing = False
            if self._listener is not None:
                self._loop.remove_reader(self._listener.fileno())
        if self._pending and self._out >= 0:
            try:
                os.write(self._out, self._pending)  # the last words
            except OSError:
                pass
        if self._listener is not None:
            if self._in >= 0:
                os.close(self._in)
            self._listener.close()
            self._listener = None
            if self._path:
                try:
                    os.unlink(self._path)  # noqa: PTH108
                except OSError:
                    pass  # in a sandbox, or gone: whoever made the directory removes it
        for fd in self._owned:
            try:
                os.close(fd)
            except OSError:
                pass
        self._owned.clear()
        self._in = self._out = -1


def _pollable(fd: int) -> bool:
    poll = select.epoll()
    try:
        poll.register(fd, select.EPOLLIN)
    except OSError:
        return False
    finally:
        poll.close()
    return True


def _set_raw(fd: int) -> list[Any]:
    """Raw mode, but with output processing as it was; what to set back."""
    import termios

    before = termios.tcgetattr(fd)
    after = termios.tcgetattr(fd)
    after[0] &= ~(termios.ICRNL | termios.IXON | termios.BRKINT | termios.INPCK | termios.ISTRIP)
    after[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN)
    if fd != 0:
        after[1] &= ~termios.OPOST
    termios.tcsetattr(fd, termios.TCSADRAIN, after)
    return before


def _is_stale(path: str) -> bool:
    """Whether it is a socket that nobody listens on any more."""
    import socket

    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False
