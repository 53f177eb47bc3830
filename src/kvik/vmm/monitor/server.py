"""QMP's sockets on the machine's event loop: a thin shell around `kvik.qmp.server.Server`.

A client is not trusted to be polite. Its lines are bounded; while it does not read its replies, none of its commands is
run; a client that lets a megabyte of events pile up is cut off (it would otherwise miss some without knowing: a new
connection starts with what the queries say). Descriptors it sends are few and closed with it.

Everything here runs on the main loop. A command that lasts is a generator; it is driven a step at a time.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import stat
from collections import deque
from collections.abc import Callable, Mapping
from types import GeneratorType

from kvik.errors import HostError, HypervisorError, KvikError
from kvik.qmp.server import Command as Request
from kvik.qmp.server import Server
from kvik.qmp.state import State
from kvik.vmm.faults import GuestFault
from kvik.vmm.log import Log, LogLimit
from kvik.vmm.monitor.errors import QmpError
from kvik.vmm.monitor.events import RateLimiter
from kvik.vmm.monitor.fds import FdSets
from kvik.vmm.monitor.table import Command, Context, check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.vmm.machine import Machine
    from kvik.vmm.monitor.table import Hotplug

__all__ = ["MonitorServer", "Session"]

# The version clients see. It is QEMU's that is asked for, and decides what they try: 7.2 is what the commands follow.
VERSION = (7, 2, 0)
MAX_LINE = 1024 * 1024
MAX_SESSIONS = 16
MAX_WAITING = 8  # commands read but not yet run; QEMU's QMP_REQ_QUEUE_LEN_MAX
MAX_FDS = 16  # sent and not yet taken
HIGH_WATER = 64 * 1024  # bytes of replies that wait: no more commands are read
MAX_OUTPUT = 1024 * 1024  # bytes that wait: the client is cut off
_CHUNK = 16384


class Session:
    """One client."""

    def __init__(self, server: MonitorServer, sock: socket.socket) -> None:
        self.server = server
        self.protocol = Server(VERSION, server.package, capabilities=("oob",), max_line=MAX_LINE)
        self.closed = False
        self._sock = sock
        self._fd = sock.fileno()
        self._output = bytearray()
        self._waiting: deque[Request] = deque()
        self._fds: deque[int] = deque()
        self._busy = False  # a command that lasts is on its way
        self._reading = False
        self._ended = False  # no more input
        sock.setblocking(False)
        self._send(self.protocol.greeting())
        self._flow()

    # Input

    def _readable(self) -> None:
        try:
            data, ancillary, _, _ = self._sock.recvmsg(
                _CHUNK, socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._keep_fds(payload)
        try:
            requests, answer = self.protocol.receive(data)
        except HypervisorError as error:
            self._send(self.protocol.failure(None, "GenericError", error.message))
            self.close()
            return
        self._send(answer)
        for request in requests:
            if request.out_of_band:
                self._execute(request)
            else:
                self._waiting.append(request)
        if not data:
            self._ended = True
        self._next()

    def _keep_fds(self, payload: bytes) -> None:
        numbers = array.array("i")
        numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
        self._fds.extend(numbers)
        while len(self._fds) > MAX_FDS:
            os.close(self._fds.popleft())

    def take_fd(self) -> int | None:
        """The next descriptor that came along; the caller owns it then."""
        return self._fds.popleft() if self._fds else None

    # Commands

    def _next(self) -> None:
        """Run what waits, as long as the client reads its replies."""
        while self._waiting and not self._busy and not self.closed and len(self._output) < HIGH_WATER:
            self._execute(self._waiting.popleft())
        if self._ended and not self._waiting and not self._busy:
            self.close()
        self._flow()

    def _execute(self, request: Request) -> None:
        commands = self.server.commands
        try:
            command, arguments = check(commands, request.name, request.arguments, out_of_band=request.out_of_band)
            result = command.handler(Context(self.server.machine, self, self.server), arguments)
        except Exception as error:
            self._fail(request, error)
            return
        if isinstance(result, GeneratorType):
            self._busy = True
            self._step(request, result)
        else:
            self._succeed(request, result)

    def _step(self, request: Request, steps: GeneratorType[None, None, Any]) -> None:
        try:
            next(steps)
        except StopIteration as end:
            self._busy = False
            self._succeed(request, end.value)
        except Exception as error:
            self._busy = False
            self._fail(request, error)
        else:
            # The client may have gone meanwhile: what it began is still brought to its end.
            self.server.later(lambda: self._step(request, steps))
            return
        self._next()

    def _succeed(self, request: Request, value: Any) -> None:
        try:
            self._send(self.protocol.reply(request.id, {} if value is None else value))
        except (TypeError, ValueError) as error:
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        kind, text = describe(error)
        if kind == "bug":
            self.server.log("monitor command failed unexpectedly", command=request.name[:80], error=repr(error)[:300])
            kind = "GenericError"
        self._send(self.protocol.failure(request.id, kind, text))

    # Output

    def event(self, name: str, data: Mapping[str, Any], when: float) -> None:
        self._send(self.protocol.event(name, data, timestamp=when))

    def _send(self, data: bytes) -> None:
        if self.closed or not data:
            return
        if not self._output:
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.close()
                return
            data = data[sent:]
            if not data:
                return
        self._output += data
        if len(self._output) > MAX_OUTPUT and self.protocol.state is State.READY and not self._busy_reply(len(data)):
            self.server.log("monitor client does not read: closed", waiting=len(self._output))
            self.close()
            return
        self.server.machine.loop.add_writer(self._fd, self._writable)

    def _busy_reply(self, size: int) -> bool:
        """One long reply (the schema) may pass the limit; it is what has piled up that may not."""
        return len(self._output) - size < HIGH_WATER

    def _writable(self) -> None:
        try:
            sent = self._sock.send(self._output)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        del self._output[:sent]
        if not self._output:
            self.server.machine.loop.remove_writer(self._fd)
        self._next()

    def _flow(self) -> None:
        """Read only what can be dealt with."""
        if self.closed:
            return
        wanted = not self._ended and len(self._waiting) < MAX_WAITING and len(self._output) < HIGH_WATER
        if wanted and not self._reading:
            self.server.machine.loop.add_reader(self._fd, self._readable)
        elif self._reading and not wanted:
            self.server.machine.loop.remove_reader(self._fd)
        self._reading = wanted

    def flush(self, seconds: float = 1.0) -> None:
        """Wait for the client to take what is left: the last words before the process ends."""
        if self.closed or not self._output:
            return
        with contextlib.suppress(OSError):
            self._sock.settimeout(seconds)
            self._sock.sendall(self._output)
        self._output.clear()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        loop = self.server.machine.loop
        loop.remove_reader(self._fd)
        loop.remove_writer(self._fd)
        if self._output:
            with contextlib.suppress(OSError):
                self._sock.send(self._output)
        self._sock.close()
        self._waiting.clear()
        while self._fds:
            os.close(self._fds.popleft())
        self.server.forget(self)


def describe(error: Exception) -> tuple[str, str]:
    """An error's class and text for a client; the class "bug" is for what nobody expected."""
    if isinstance(error, QmpError):
        return error.kind, error.description
    if isinstance(error, KvikError):
        return "GenericError", str(error)
    if isinstance(error, GuestFault):
        return "GenericError", f"the guest's doing: {error}"
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return "GenericError", f"{name}{error.strerror or error}"
    return "bug", f"internal error: {type(error).__name__}: {str(error)[:200]}"


class MonitorServer:
    """All monitors of a machine: the sockets they listen on, the sessions, the descriptors they were given."""

    def __init__(
        self,
        machine: Machine,
        *,
        package: str = "kvik-vmm",
        commands: Mapping[str, Command] | None = None,
        hotplug: Hotplug | None = None,
    ) -> None:
        if commands is None:
            from kvik.vmm.monitor.commands import COMMANDS

            commands = COMMANDS
        self.machine = machine
        self.package: str = package
        self.commands = commands
        self._hotplug = hotplug
        self.sessions: list[Session] = []
        self.fdsets = FdSets()
        self.named_fds: dict[str, int] = {}
        self.values: dict[str, Any] = {}  # what groups of commands remember between commands
        self._listeners: dict[socket.socket, str] = {}  # socket -> path to unlink, "" for none
        self._limit = LogLimit(Log())
        self._events = RateLimiter(machine.loop, self._send_event)
        machine.listeners.append(self._events.event)

    def listen(self, path: str) -> None:
        """A Unix socket at `path`, mode 0600; one that nobody listens on any more is replaced. Raises `HostError`."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.lstat(path).st_mode) and not _answers(path):
                    os.unlink(path)  # noqa: PTH108  # pathlib is not needed for a string
            before = os.umask(0o177)
            try:
                sock.bind(path)
            finally:
                os.umask(before)
            sock.listen(8)
        except OSError as error:
            sock.close()
            raise HostError(
                f"the monitor cannot listen on {path}: {error.strerror or error}",
                errno=error.errno or 0,
                remedy="choose another path, of at most 107 bytes, in a directory that you may write to",
            ) from error
        self._serve(sock, path)

    def adopt(self, fd: int) -> None:
        """A socket that the parent left open: one that listens, or a connection. Raises `HostError`."""
        try:
            sock = socket.socket(fileno=fd)
            os.set_inheritable(fd, False)
            listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise HostError(f"descriptor {fd} is no socket for a monitor: {error.strerror}") from error
        if listening:
            self._serve(sock, "")
        else:
            self.sessions.append(Session(self, sock))

    def _serve(self, sock: socket.socket, path: str) -> None:
        sock.setblocking(False)
        self._listeners[sock] = path
        self.machine.loop.add_reader(sock.fileno(), lambda: self._accept(sock))

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:  # it went again, or no descriptor is left
            self.machine.loop.hold_reader(listener.fileno())
            return
        if len(self.sessions) >= MAX_SESSIONS:
            sock.close()
            return
        self.sessions.append(Session(self, sock))

    def forget(self, session: Session) -> None:
        if session in self.sessions:
            self.sessions.remove(session)

    def hotplug(self) -> Hotplug:
        if self._hotplug is None:
            from kvik.vmm.monitor.hotplug import MachineHotplug

            self._hotplug = MachineHotplug(self.machine)
        return self._hotplug

    def later(self, callback: Callable[[], None]) -> None:
        """Run on the loop's next round."""
        self.machine.loop.call_soon(callback)

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        """An event of the monitor's own."""
        self._events.event(name, data or {})

    def _send_event(self, name: str, data: dict[str, Any], when: float) -> None:
        for session in list(self.sessions):
            session.event(name, data, when)

    def log(self, text: str, **fields: object) -> None:
        self._limit.write("warning", text, **fields)

    def close(self) -> None:
        """Say the last words, close everything, unlink what was bound."""
        for session in list(self.sessions):
            session.flush()
            session.close()
        for sock, path in self._listeners.items():
            self.machine.loop.remove_reader(sock.fileno())
            sock.close()
            if path:
                with contextlib.suppress(OSError):
                    os.unlink(path)  # noqa: PTH108
        self._listeners.clear()
        self.fdsets.close()
        for fd in self.named_fds.values():
            os.close(fd)
        self.named_fds.clear()


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.2)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True
