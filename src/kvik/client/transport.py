"""How bytes get to the daemon: a Unix socket, or ssh; and the daemon's start on first use.

Either way the result is a connected `socket.socket`: ssh is a child process at the other end of a socket pair.
"""

from __future__ import annotations

import _socket as socket  # the part of `socket` in C: the rest, with selectors and enum, costs a command 5 ms
import errno
import os
import sys
import time
from contextlib import suppress

from kvik.client.uri import Address
from kvik.errors import ConnectError
from kvik.paths import Paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping
    from typing import Final

START_TIMEOUT: Final = 30.0  # seconds until a started daemon must answer; one that fails says so at once
POLL: Final = 0.005
_NOBODY_LISTENS: Final = (errno.ENOENT, errno.ECONNREFUSED)
_STDERR_SHOWN: Final = 4096


class Transport:
    """A connected socket and, for ssh, the process behind it."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes] | None = None, stderr: int = -1) -> None:
        self.socket = sock
        self._process = process
        self._stderr = stderr

    def close(self) -> None:
        self.socket.close()
        if self._process is not None:
            try:
                self._process.wait(1.0)
            except Exception:  # subprocess.TimeoutExpired, without importing subprocess for it
                self._process.terminate()
                self._process.wait()
            self._process = None
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1

    def complaint(self) -> str:
        """What the process behind the socket wrote on its stderr: why the connection ended."""
        return _read_stderr(self._stderr) if self._stderr >= 0 else ""


def paths_of(scope: str, environ: Mapping[str, str] = os.environ) -> Paths:
    return Paths.system(environ=environ) if scope == "system" else Paths.session(environ)


def open_transport(address: Address, *, autostart: bool = True) -> Transport:
    """Connect. Starts this host's daemon if nobody listens on the scope's own socket. ConnectError otherwise."""
    if address.transport == "ssh":
        return _ssh(address)
    if address.socket:
        return Transport(_connect(address.socket, started=False))
    paths = paths_of(address.scope)
    try:
        return Transport(_connect(paths.socket_name, started=False))
    except ConnectError as error:
        cause = error.__cause__
        if not autostart or not isinstance(cause, OSError) or cause.errno not in _NOBODY_LISTENS:
            raise
    if address.scope == "system" and os.geteuid() != 0 and not os.environ.get("KVIK_ROOT"):
        raise ConnectError(
            f"no system daemon listens on {paths.socket}",
            remedy="start it as root (kvikd --system --detach), or use your own: kvik:///session",
        )
    return Transport(start_daemon(paths))


def _connect(path: str, *, started: bool) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        if len(os.fsencode(path)) >= 108:
            remedy = "a Unix socket's path has at most 107 bytes: set XDG_RUNTIME_DIR to a shorter directory of yours"
        elif error.errno == errno.EACCES:
            remedy = "the socket belongs to another user; kvik:///session is your own daemon"
        elif error.errno in _NOBODY_LISTENS and not started:
            remedy = "is kvikd running?"
        else:
            remedy = ""
        reason = error.strerror or str(error)
        raise ConnectError(f"cannot connect to {path}: {reason}", remedy=remedy) from error
    return sock


def daemon_command(paths: Paths, environ: Mapping[str, str] = os.environ) -> list[str]:
    """-P: a directory called kvik below the current one must not be taken for the program."""
    command = [sys.executable, "-P", "-m", "kvik.daemon.main", f"--{paths.scope}", "--detach"]
    if paths.scope == "system" and (root := environ.get("KVIK_ROOT")):
        command += ["--root", root]
    return command


def _in_foreground(command: list[str]) -> str:
    import shlex

    return shlex.join(word for word in command if word != "--detach")


def start_daemon(paths: Paths, timeout: float = START_TIMEOUT) -> socket.socket:
    """Start the scope's daemon and connect to it. Clients that do so at the same time start only one."""
    import fcntl

    deadline = time.monotonic() + timeout
    try:
        paths.run.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(paths.run / "kvikd.start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConnectError(f"cannot start the daemon: {error}", remedy=f"make {paths.run} writable") from error
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConnectError(
                        f"another client has been starting the daemon for {timeout:g} s; {paths.socket} does not answer"
                    ) from None
                time.sleep(POLL)
        with suppress(ConnectError):  # somebody else was faster
            return _connect(paths.socket_name, started=True)
        return _spawn_daemon(paths, deadline)
    finally:
        os.close(lock)


def _spawn_daemon(paths: Paths, deadline: float) -> socket.socket:
    import subprocess

    command = daemon_command(paths)
    stderr = os.memfd_create("kvikd-stderr")  # not a pipe: the daemon that stays would keep it open
    try:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
            )
        except OSError as error:
            raise ConnectError(f"cannot start the daemon: {error}") from error
        while True:
            try:
                sock = _connect(paths.socket_name, started=True)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)  # it has nothing left to do but exit
                return sock
            except ConnectError as error:
                status = process.poll()  # --detach: 0 as soon as the daemon has left for the background
                said = _read_stderr(stderr)
                if status:
                    raise ConnectError(
                        f"the daemon ended with status {status} instead of starting" + (f": {said}" if said else ""),
                        remedy=f"to see more, run {_in_foreground(command)}",
                    ) from error
                if time.monotonic() > deadline:
                    if status is None:
                        process.kill()
                        process.wait()
                    raise ConnectError(
                        f"the daemon does not listen on {paths.socket} in time" + (f": {said}" if said else ""),
                        remedy=f"to see more, run {_in_foreground(command)}",
                    ) from error
            time.sleep(POLL)
    finally:
        os.close(stderr)


def _read_stderr(fd: int) -> str:
    size = os.fstat(fd).st_size
    data = os.pread(fd, _STDERR_SHOWN, max(0, size - _STDERR_SHOWN))
    return data.decode(errors="replace").strip()


def ssh_command(address: Address) -> list[str]:
    """-T: no terminal, bytes pass as they are; the remote kvik finds or starts its own daemon."""
    command = ["ssh", "-T", "-e", "none"]
    if address.user:
        command += ["-l", address.user]
    if address.port:
        command += ["-p", str(address.port)]
    import shlex

    remote = ["kvik", "proxy", f"--{address.scope}"]
    if address.socket:
        remote += ["--socket", shlex.quote(address.socket)]  # the remote end is a shell
    return [*command, "--", address.host, *remote]


def _ssh(address: Address) -> Transport:
    import subprocess
    from socket import socketpair

    ours, theirs = socketpair()
    stderr = os.memfd_create("ssh-stderr")
    try:
        process = subprocess.Popen(ssh_command(address), stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=stderr)
    except OSError as error:
        ours.close()
        os.close(stderr)
        raise ConnectError(f"cannot run ssh: {error}", remedy="install openssh-client") from error
    finally:
        theirs.close()
    return Transport(ours, process, stderr)
