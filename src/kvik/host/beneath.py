"""Files of a directory that others may write to, reached without ever following a link or leaving the directory.

Every access goes through a descriptor of the directory and openat2(2) with RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS,
RESOLVE_NO_MAGICLINKS and RESOLVE_NO_XDEV; what was opened is looked at before it is used, and opened without waiting,
so that neither a FIFO nor a device can hold or harm whoever looks.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from pathlib import Path
from types import TracebackType

from kvik.errors import HostError
from kvik.host.files import host_error

__all__ = ["Beneath", "kind_of"]

SYS_OPENAT2 = 437  # the same on every architecture: added after numbers were unified
SYS_RENAMEAT2 = {"x86_64": 316, "aarch64": 276}.get(os.uname().machine, -1)
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 0x01, 0x02, 0x04, 0x08
RESOLVE = RESOLVE_NO_XDEV | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH
RENAME_NOREPLACE = 1
_OPEN_HOW = struct.Struct("=QQQ")  # struct open_how: flags, mode, resolve

_libc = ctypes.CDLL(None, use_errno=True)
_KINDS = {
    stat.S_IFREG: "a file", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a block device", stat.S_IFCHR: "a character device",
}  # fmt: skip


def kind_of(mode: int) -> str:
    """What a file is, in words."""
    return _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")


def _check(name: str) -> bytes:
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise HostError(f"{name!r} is not the name of a file in a directory", errno=errno.EINVAL)
    return os.fsencode(name)


class Beneath:
    """One directory, held open. Names are single components. Raises HostError, errno kept."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """The way to the directory itself is the administrator's: links on it are followed."""
        self.path = os.fspath(path)
        self.fd = -1
        try:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise host_error("open directory", self.path, error) from error

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Beneath:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def join(self, name: str) -> str:
        """The whole path of a name, for messages and documents."""
        return str(Path(self.path, name))

    def error(self, action: str, name: str, error: OSError) -> HostError:
        return host_error(action, self.join(name), error)

    def stat(self, name: str) -> os.stat_result:
        """Of the name itself, links not followed."""
        _check(name)
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except OSError as error:
            raise self.error("look at", name, error) from error

    def open(self, name: str, flags: int = os.O_RDONLY, mode: int = 0) -> int:
        """A descriptor of what has that name now; never waits. ELOOP for a link, EXDEV for another file system."""
        how = _OPEN_HOW.pack(flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, mode, RESOLVE)
        fd: int = _libc.syscall(SYS_OPENAT2, self.fd, _check(name), how, ctypes.c_size_t(len(how)))
        if fd < 0:
            number = ctypes.get_errno()
            raise self.error("open", name, OSError(number, os.strerror(number)))
        return fd

    def open_file(self, name: str, flags: int = os.O_RDONLY) -> int:
        """The same for a regular file only; anything else is refused before it is opened, and once it is."""
        self._regular(name, self.stat(name))
        fd = self.open(name, flags)
        try:
            self._regular(name, os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _regular(self, name: str, info: os.stat_result) -> None:
        if not stat.S_ISREG(info.st_mode):
            raise HostError(f"{self.join(name)} is {kind_of(info.st_mode)}, not a file", errno=errno.EINVAL)

    def create(self, name: str, mode: int = 0o600) -> int:
        """A new file, open for reading and writing. EEXIST if the name is taken by anything."""
        return self.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def publish(self, temporary: str, name: str) -> None:
        """Give a file its name in one step, unless the name is taken (EEXIST)."""
        source, target = _check(temporary), _check(name)
        number = errno.ENOSYS
        if SYS_RENAMEAT2 > 0:
            if _libc.syscall(SYS_RENAMEAT2, self.fd, source, self.fd, target, RENAME_NOREPLACE) == 0:
                return
            number = ctypes.get_errno()
        try:
            if number not in (errno.ENOSYS, errno.EINVAL):
                raise OSError(number, os.strerror(number))
            # A file system without RENAME_NOREPLACE (NFS): a second name fails if it is taken, then the first goes.
            os.link(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
            os.unlink(temporary, dir_fd=self.fd)
        except OSError as error:
            raise self.error("make", name, error) from error

    def unlink(self, name: str) -> None:
        _check(name)
        try:
            os.unlink(name, dir_fd=self.fd)
        except OSError as error:
            raise self.error("remove", name, error) from error

    def sync(self) -> None:
        """Make names durable."""
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise host_error("make durable", self.path, error) from error
