"""One daemon per scope: the lock, and the socket that replaces a dead daemon's.

The lock is an open file description lock (fcntl(2), F_OFD_SETLK) on the pid file: the kernel drops it with the
daemon, however that ends, so a left-over file never needs judging. Whoever holds the lock owns the socket's name, so
a socket found there is a dead daemon's and is replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
from pathlib import Path

from kvik.errors import ConnectError, ResourceBusy

__all__ = ["InstanceLock", "bind_socket", "private_directory"]

FLOCK = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid
MAX_SOCKET_PATH = 107  # sizeof(sun_path) - 1, unix(7)


def private_directory(path: Path) -> None:
    """Make `path` (mode 0700 from the start) if it is missing; refuse one that another user could write to."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.stat()
    if info.st_uid not in (os.geteuid(), 0):
        raise ResourceBusy(f"{path} belongs to user {info.st_uid}, not to this daemon's user {os.geteuid()}")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ResourceBusy(f"{path} can be written to by others", remedy=f"chmod go-w {path}")


class InstanceLock:
    """Held from `acquire` to `release` or the end of the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def acquire(self) -> None:
        """Take the lock or raise `ResourceBusy` naming the daemon that holds it."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise ResourceBusy(
                f"another kvikd (pid {holder or 'unknown'}) serves {self.path.parent}",
                remedy="end it first, or use --root",
            ) from None
        except OSError:
            os.close(fd)
            raise
        with contextlib.suppress(OSError):  # a full disk must not keep the daemon from starting: the lock counts
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    def release(self) -> None:
        if self._fd < 0:
            return
        # The file stays: removing it would let a third daemon lock a new file while a second holds the old one.
        os.close(self._fd)
        self._fd = -1


def bind_socket(path: Path, backlog: int) -> socket.socket:
    """A listening socket at `path`, mode 0600, that appears there ready or not at all.

    Call it while holding the instance lock. Raises `ConnectError` for a path the kernel cannot take.
    """
    staging = path.with_name(f"{path.name}.new")
    if len(os.fsencode(staging)) > MAX_SOCKET_PATH:
        raise ConnectError(
            f"the socket's path is too long for the kernel ({len(os.fsencode(path))} bytes): {path}",
            remedy="use a shorter --root or --socket",
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        staging.unlink(missing_ok=True)
        previous = os.umask(0o177)  # the mode must be right before the name exists
        try:
            listener.bind(str(staging))
        finally:
            os.umask(previous)
        listener.listen(backlog)
        staging.rename(path)
    except BaseException:
        listener.close()
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)
        raise
    return listener
