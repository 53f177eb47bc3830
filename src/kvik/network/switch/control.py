"""The daemon's side of a switch: start its process or find it again, open ports, ask for leases.

Blocking, and quick: the switch answers at once or `DEADLINE` ends the call; a new one has `START` for its first answer.
One that is stopped, or hangs, costs that once: until it answers what it was asked, further calls fail at once. The
process outlives the daemon; it ends by itself when it has neither ports nor a daemon (`server.IDLE`).
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvik.errors import HostError, OperationFailed, OperationTimeout
from kvik.host import process
from kvik.host.process import ProcessHandle

__all__ = ["DEADLINE", "Switch", "short_path"]

DEADLINE = 5.0  # seconds for an answer
START = 30.0  # seconds for the first answer of a new process: an interpreter's start, on a host that is busy
_MESSAGE = 200_000
_PROGRAM = Path(__file__).parent / "__main__.py"


class Switch:
    """A running switch. `process` is its process: readable, as a descriptor, when that has ended."""

    def __init__(self, path: Path, sock: socket.socket, handle: ProcessHandle, *, deadline: float = DEADLINE) -> None:
        self.path = path
        self.process = handle
        self.deadline = deadline
        self._socket = sock
        self._lock = threading.Lock()
        self._asked = 0  # number of the last question
        self._answered = True  # it has started
        self._silent_since: float | None = None  # monotonic seconds; it has not answered that question
        self._gone = False  # the connection has ended, which is a moment before its process has

    @classmethod
    def start(
        cls, path: Path, settings: Mapping[str, Any], log_fd: int | None = None, *, deadline: float = DEADLINE
    ) -> Switch:
        """A new process with its control socket at `path`, in place of a stale one. Raises `HostError`."""
        listener = _listen(path)
        with contextlib.ExitStack() as close:
            close.callback(listener.close)
            config = os.memfd_create("kvik-switch", os.MFD_CLOEXEC)
            close.callback(os.close, config)
            os.write(config, json.dumps(settings).encode())
            os.lseek(config, 0, os.SEEK_SET)
            cached = ["-X", f"pycache_prefix={sys.pycache_prefix}"] if sys.pycache_prefix else []
            words = [sys.executable, "-I", "-S", *cached, str(_PROGRAM), str(listener.fileno()), str(config)]
            handle = process.spawn(words, stderr=log_fd, pass_fds=(listener.fileno(), config), cwd="/")
        try:
            switch = cls(path, _connect(path), handle, deadline=deadline)
            switch._answered = False
            return switch
        except BaseException:
            handle.kill()
            handle.close()
            raise

    @classmethod
    def attach(cls, path: Path, *, deadline: float = DEADLINE) -> Switch | None:
        """The switch that listens at `path`, if one does; `silence` says of one that hangs. Raises `HostError` for what
        is another user's."""
        try:
            sock = _connect(path)
        except HostError:
            return None
        pid, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if os.getuid() not in (0, user):
            sock.close()
            raise HostError(f"{path} belongs to user {user}", errno=errno.EPERM)
        # The pid is that of whoever called listen(2) last: the switch's, once it is more than an interpreter. One that
        # hangs is found by that; one that has only just been started says who it is.
        handle = _find(pid) or _greet(sock)
        if handle is None:
            sock.close()
            return None
        switch = cls(path, sock, handle, deadline=deadline)
        try:
            switch.call("hello")
        except OperationTimeout:
            pass  # it hangs, and is to be found all the same
        except (OperationFailed, HostError):
            switch.close()
            return None
        return switch

    @property
    def alive(self) -> bool:
        return not self._gone and self.process.alive

    @property
    def silence(self) -> float:
        """Seconds for which it has owed an answer; 0.0: none. Looks whether that has come by now."""
        with self._lock:
            self._hear()
            return time.monotonic() - self._silent_since if self._silent_since is not None else 0.0

    @property
    def stopped(self) -> bool:
        """Whether somebody has stopped its process, by SIGSTOP or a debugger."""
        stat = process.read_stat(self.process.pid)
        return stat is not None and stat.start_time == self.process.start_time and stat.state in "Tt"

    def call(self, what: str, fds: Sequence[int] = (), **given: Any) -> Any:
        """Raises `OperationFailed` with the switch's words, `OperationTimeout`, `HostError` when it is gone.

        What it did not answer in time it may still do when it goes on."""
        with self._lock:
            self._hear()
            if self._silent_since is not None:
                raise OperationTimeout(
                    f"the network switch, process {self.process.pid}, has not answered for "
                    f"{time.monotonic() - self._silent_since:.0f} s",
                    remedy=self._remedy(),
                )
            self._asked += 1
            self._send({"do": what, "id": self._asked, **given}, fds)
            patience = self.deadline if self._answered else max(START, self.deadline)
            end = time.monotonic() + patience
            while (answer := self._receive(end - time.monotonic())) is not None:
                if answer.get("id") == self._asked:
                    break
            if answer is None:
                self._silent_since = time.monotonic() - patience
                raise OperationTimeout(
                    f"the network switch, process {self.process.pid}, did not answer {what!r} within {patience:g} s",
                    remedy=self._remedy(),
                )
            self._answered = True
        if "error" in answer:
            raise OperationFailed(f"the network switch refused {what!r}: {answer['error']}")
        return answer["return"]

    def _remedy(self) -> str:
        if self.stopped:
            return f"it is stopped: let it go on (kill -CONT {self.process.pid})"
        return "stop the network and start it again: its machines stay (kvik net-destroy, kvik net-start)"

    def _hear(self) -> None:
        """Take answers that came too late."""
        while self._silent_since is not None:
            try:
                answer = self._receive(0.0)
            except HostError:
                return  # whoever sends next is told
            if answer is None:
                return
            if answer.get("id") == self._asked:
                self._silent_since = None

    def _send(self, command: Mapping[str, Any], fds: Sequence[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:  # one question is under way at most, so there is room
            self._socket.sendmsg([json.dumps(command).encode()], ancillary)
        except OSError as error:
            self._gone = True
            raise HostError(f"the network switch is gone: {error.strerror}", errno=error.errno or 0) from error

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """The next answer; None if none comes in time."""
        try:
            self._socket.settimeout(max(0.0, seconds))
            data = self._socket.recv(_MESSAGE)
        except (TimeoutError, BlockingIOError):
            return None
        except OSError as error:
            self._gone = True
            raise HostError(f"the network switch is gone: {error.strerror}", errno=error.errno or 0) from error
        if not data:
            self._gone = True
            raise HostError("the network switch is gone", errno=errno.EPIPE)
        answer: dict[str, Any] = json.loads(data)
        return answer

    def add_port(
        self, name: str, mac: str, fd: int, *, alias: str = "", isolated: bool = False, mtu: int = 0
    ) -> tuple[int, str]:
        """Give it the socket of a card (the descriptor stays the caller's): the port's number, and the address that
        the card will be given ("": none). `mtu`: a longer one than usual, that the card can have; 0: no."""
        answer = self.call("add", (fd,), name=name, mac=mac, alias=alias, isolated=isolated, mtu=mtu)
        return answer["port"], answer["ip"]

    def remove_port(self, number: int) -> None:
        self.call("remove", port=number)

    def ports(self) -> list[dict[str, Any]]:
        return self._pages("ports", lambda item, count: int(item["port"]))

    def leases(self) -> list[dict[str, Any]]:
        return self._pages("leases", lambda item, count: count)

    def _pages(self, what: str, after: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while page := self.call(what, after=after(found[-1], len(found)) if found else 0):
            found += page
        return found

    def configure(self, settings: Mapping[str, Any]) -> None:
        self.call("configure", settings=settings)

    def stop(self) -> None:
        """End it; its machines lose their network."""
        with contextlib.suppress(HostError, OperationTimeout):
            self.call("stop")
        self.process.terminate(0.0 if self.silence else 1.0)
        self.close()
        with contextlib.suppress(OSError):
            self.path.unlink()

    def close(self) -> None:
        """Let go of it: it goes on."""
        self._socket.close()
        self.process.close()


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for a socket that fits into sockaddr_un's 108 bytes, however deep its directory lies."""
    if len(os.fsencode(path)) < 108:
        yield os.fspath(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _find(pid: int) -> ProcessHandle | None:
    """The process, if it is a switch."""
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    if not any(word.endswith(b"/network/switch/__main__.py") for word in argv):
        return None
    stat = process.read_stat(pid)
    return process.find(pid, stat.start_time) if stat is not None else None


def _greet(sock: socket.socket) -> ProcessHandle | None:
    """The process at the other end, which starts, by its own word."""
    try:
        sock.settimeout(START)
        sock.send(b'{"do": "hello"}')
        return _find(int(json.loads(sock.recv(_MESSAGE))["return"]["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _listen(path: Path) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        if path.is_socket():
            path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(sock.fileno(), 0o600)  # the file takes the socket's mode: it is never open to others
        with short_path(path) as name:
            sock.bind(name)
        sock.listen(8)
    except OSError as error:
        sock.close()
        raise HostError(f"cannot listen on {path}: {error.strerror or error}", errno=error.errno or 0) from error
    return sock


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.setblocking(False)  # one that hangs takes no connections once its backlog is full
    try:
        with short_path(path) as name:
            sock.connect(name)
    except OSError as error:
        sock.close()
        raise HostError(
            f"cannot reach the switch at {path}: {error.strerror or error}", errno=error.errno or 0
        ) from error
    return sock
