"""The daemon's side of a switch: start its process or find it again, open ports, ask for leases.

Blocking, and quick: the switch answers at once or `DEADLINE` ends the call. The process outlives the daemon; it ends
by itself when it has neither ports nor a daemon (`server.IDLE`).
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvik.errors import HostError, OperationFailed, OperationTimeout
from kvik.host import process
from kvik.host.process import ProcessHandle

__all__ = ["Switch", "short_path"]

DEADLINE = 5.0  # seconds for an answer
_MESSAGE = 200_000
_PROGRAM = Path(__file__).parent / "__main__.py"


class Switch:
    """A running switch. `process` is its process: readable, as a descriptor, when that has ended."""

    def __init__(self, path: Path, sock: socket.socket, handle: ProcessHandle) -> None:
        self.path = path
        self.process = handle
        self._socket = sock
        self._lock = threading.Lock()

    @classmethod
    def start(cls, path: Path, settings: Mapping[str, Any], log_fd: int | None = None) -> Switch:
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
            return cls(path, _connect(path), handle)
        except BaseException:
            handle.kill()
            handle.close()
            raise

    @classmethod
    def attach(cls, path: Path) -> Switch | None:
        """The switch that listens at `path`, if one does. Raises `HostError` for what is another user's."""
        try:
            sock = _connect(path)
        except HostError:
            return None
        _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if os.getuid() not in (0, user):
            sock.close()
            raise HostError(f"{path} belongs to user {user}", errno=1)
        # The pid is that of whoever called listen(2): the daemon that started it. The switch itself knows its own.
        try:
            pid = _exchange(sock, {"do": "hello"}, ())["pid"]
            stat = process.read_stat(pid)
            handle = process.find(pid, stat.start_time) if stat is not None else None
        except (OperationFailed, OperationTimeout, HostError):
            handle = None
        if handle is None:
            sock.close()
            return None
        return cls(path, sock, handle)

    @property
    def alive(self) -> bool:
        return self.process.alive

    def call(self, what: str, fds: Sequence[int] = (), **given: Any) -> Any:
        """Raises `OperationFailed` with the switch's words, `OperationTimeout`, `HostError` when it is gone."""
        with self._lock:
            return _exchange(self._socket, {"do": what, **given}, fds)

    def add_port(self, name: str, mac: str, fd: int, *, alias: str = "", isolated: bool = False) -> tuple[int, str]:
        """Give it the socket of a card (the descriptor stays the caller's): the port's number, and the address that
        the card will be given ("": none)."""
        answer = self.call("add", (fd,), name=name, mac=mac, alias=alias, isolated=isolated)
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
        self.process.terminate(1.0)
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


def _exchange(sock: socket.socket, command: Mapping[str, Any], fds: Sequence[int]) -> Any:
    what = command["do"]
    try:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sock.sendmsg([json.dumps(command).encode()], ancillary)
        data = sock.recv(_MESSAGE)
    except TimeoutError as error:
        raise OperationTimeout(f"the network switch did not answer {what!r} within {DEADLINE:g} s") from error
    except OSError as error:
        raise HostError(f"the network switch is gone: {error.strerror}", errno=error.errno or 0) from error
    if not data:
        raise HostError("the network switch is gone", errno=32)
    answer = json.loads(data)
    if "error" in answer:
        raise OperationFailed(f"the network switch refused {what!r}: {answer['error']}")
    return answer["return"]


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
    sock.settimeout(DEADLINE)
    try:
        with short_path(path) as name:
            sock.connect(name)
    except OSError as error:
        sock.close()
        raise HostError(
            f"cannot reach the switch at {path}: {error.strerror or error}", errno=error.errno or 0
        ) from error
    return sock
