"""Files that are the truth: written whole or not at all, read bounded, locked by open file description.

Everything here works on plain paths and raises `HostError` with the errno kept, naming the path; what the
manager, storage and security packages write goes through `atomic_write`.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvik.errors import HostError, ResourceBusy

AnyPath = str | os.PathLike[str]
Identity = tuple[int, int]  # of a file or device, whatever its name

_TEMPORARY_PREFIX = ".kvik-"
_TEMPORARY_SUFFIX = ".tmp"
_counter = itertools.count()

# struct flock of fcntl(2) on 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (0 for OFD locks).
_FLOCK = struct.Struct("@hhqqi4x")

_REMEDIES = {
    errno.ENOSPC: "free some space on that file system",
    errno.EDQUOT: "the disk quota is used up: free some space or raise it",
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "check owner and mode of the directory and those above it",
    errno.EPERM: "check owner, mode and attributes (lsattr)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def host_error(action: str, path: AnyPath, error: OSError) -> HostError:
    """An OSError as a `HostError` that names what was tried, the path, the reason and the fix if one is known."""
    number = error.errno or 0
    reason = error.strerror or str(error)
    return HostError(f"cannot {action} {os.fspath(path)}: {reason}", errno=number, remedy=_REMEDIES.get(number, ""))


# Writing --------------------------------------------------------------------------------------------------------


def identify(path: AnyPath) -> Identity | None:
    """What a path leads to: a block device by its number, others by their inode; None if it cannot be looked at."""
    try:
        info = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return (0, info.st_rdev) if stat.S_ISBLK(info.st_mode) else (info.st_dev, info.st_ino)


def fsync_directory(path: AnyPath) -> None:
    """Make the directory's entries durable: a rename or unlink counts only after this."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: AnyPath, data: bytes, *, mode: int = 0o600, durable: bool = True, exact: bool = False) -> None:
    """Replace the file's content: after a crash at any instant it holds the old or the new content, whole.

    A temporary file in the same directory has `mode` (less the umask, unless `exact`) from its creation on. A link at
    `path` is replaced, not followed. `durable=False` leaves out both fsyncs: for what need not outlive a reboot
    (live status below /run). On an error nothing is changed and nothing is left behind.
    """
    target = os.fspath(path)
    directory, name = os.path.split(target)
    if not name or "\0" in target:
        raise HostError(f"cannot write {target!r}: not a file name", errno=errno.EINVAL)
    temporary = os.path.join(  # noqa: PTH118
        directory, f"{_TEMPORARY_PREFIX}{os.getpid()}-{next(_counter)}-{os.urandom(4).hex()}{_TEMPORARY_SUFFIX}"
    )
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except OSError as error:
        raise host_error("write", target, error) from error
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if exact:
                os.fchmod(fd, mode)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, target)  # noqa: PTH104
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
        if isinstance(error, OSError):
            raise host_error("write", target, error) from error
        raise
    if durable:
        try:
            fsync_directory(directory or ".")
        except OSError as error:
            raise host_error("make durable", target, error) from error


def remove_file(path: AnyPath, *, missing_ok: bool = True, durable: bool = True) -> bool:
    """Remove a file or symbolic link. False if there was none."""
    try:
        os.unlink(path)  # noqa: PTH108
    except OSError as error:
        # A file system that is read-only says so before it looks.
        missing = error.errno == errno.ENOENT or (error.errno == errno.EROFS and not os.path.lexists(path))
        if missing and missing_ok:
            return False
        raise host_error("remove", path, error) from error
    if durable:
        try:
            fsync_directory(os.path.dirname(os.fspath(path)) or ".")  # noqa: PTH120
        except OSError as error:
            raise host_error("make durable the removal of", path, error) from error
    return True


def atomic_symlink(target: AnyPath, path: AnyPath, *, durable: bool = True) -> None:
    """Make `path` a symbolic link to `target`, replacing what was there in one step."""
    directory = os.path.dirname(os.fspath(path))  # noqa: PTH120
    temporary = os.path.join(  # noqa: PTH118
        directory, f"{_TEMPORARY_PREFIX}{os.getpid()}-{next(_counter)}-{os.urandom(4).hex()}{_TEMPORARY_SUFFIX}"
    )
    try:
        os.symlink(target, temporary)  # noqa: PTH211
        try:
            os.rename(temporary, path)  # noqa: PTH104
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108
            raise
        if durable:
            fsync_directory(directory or ".")
    except OSError as error:
        raise host_error("link", path, error) from error


def remove_temporaries(directory: AnyPath, *, older_than: float = 60.0) -> int:
    """Remove what a crash between create and rename left behind, once it is `older_than` seconds old."""
    removed = 0
    limit = time.time() - older_than
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if not (entry.name.startswith(_TEMPORARY_PREFIX) and entry.name.endswith(_TEMPORARY_SUFFIX)):
                    continue
                with suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime <= limit:
                        os.unlink(entry.path)  # noqa: PTH108
                        removed += 1
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise host_error("list", directory, error) from error
    return removed


# Reading --------------------------------------------------------------------------------------------------------


def read_file(path: AnyPath, *, limit: int = 16 << 20) -> bytes:
    """A regular file's content, at most `limit` bytes (`HostError` with EFBIG beyond).

    The last component may not be a symbolic link; a fifo or device is refused without being waited for.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise HostError(f"cannot read {os.fspath(path)}: it is a symbolic link", errno=errno.ELOOP) from error
        raise host_error("read", path, error) from error
    try:
        return _read_regular(fd, path, limit)
    finally:
        os.close(fd)


def try_read_file(path: AnyPath, *, limit: int = 16 << 20) -> bytes | None:
    """`read_file`, or None if the file (or its directory) does not exist."""
    try:
        return read_file(path, limit=limit)
    except HostError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def _read_regular(fd: int, path: AnyPath, limit: int) -> bytes:
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise HostError(f"cannot read {os.fspath(path)}: not a regular file", errno=errno.EINVAL)
        if info.st_size > limit:
            raise HostError(f"cannot read {os.fspath(path)}: larger than {limit} bytes", errno=errno.EFBIG)
        # The size is a hint (it may grow, and in /proc it is 0): read until the end, never past limit + 1.
        parts: list[bytes] = []
        left = limit + 1
        while left > 0 and (part := os.read(fd, min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
    except OSError as error:
        raise host_error("read", path, error) from error
    if left <= 0:
        raise HostError(f"cannot read {os.fspath(path)}: larger than {limit} bytes", errno=errno.EFBIG)
    return b"".join(parts)


# Directories ----------------------------------------------------------------------------------------------------


def ensure_directory(path: AnyPath, mode: int = 0o700) -> Path:
    """Make the directory and its missing parents, all with `mode`; return it.

    One that exists must belong to us or root; if it is ours and others may write to it, that is taken from them.
    """
    directory = Path(path)
    try:
        for missing in reversed([part for part in (directory, *directory.parents) if not part.exists()]):
            with suppress(FileExistsError):
                missing.mkdir(mode)
        info = directory.stat()
        if not stat.S_ISDIR(info.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if info.st_uid == os.geteuid():
            if info.st_mode & 0o022 & ~mode and not info.st_mode & stat.S_ISVTX:
                directory.chmod(stat.S_IMODE(info.st_mode) & ~(0o022 & ~mode))
        elif info.st_uid != 0:
            raise HostError(
                f"will not use directory {directory}: it belongs to user {info.st_uid}",
                errno=errno.EPERM,
                remedy=f"remove it or make it yours: chown {os.geteuid()} {directory}",
            )
    except OSError as error:
        raise host_error("make directory", directory, error) from error
    return directory


# Locks ----------------------------------------------------------------------------------------------------------


class FileLock:
    """An exclusive (or shared) lock on a whole file that belongs to this object, not to the process.

    Open file description locks (fcntl(2), F_OFD_SETLK): unlike POSIX locks they hold between threads and are not
    lost when another descriptor of the file is closed; the kernel drops them when the holder dies. The file itself
    is left in place, as removing it would race with the next holder.
    """

    def __init__(self, path: AnyPath) -> None:
        self._fd = -1
        self.path = Path(path)

    @property
    def held(self) -> bool:
        return self._fd >= 0

    def acquire(self, *, timeout: float = 0.0, shared: bool = False) -> None:
        """Take the lock; `ResourceBusy` if another holds it for longer than `timeout` seconds."""
        if self.held:
            raise ResourceBusy(f"{self.path} is locked by this object already")
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise host_error("lock", self.path, error) from error
        request = _FLOCK.pack(fcntl.F_RDLCK if shared else fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        deadline = time.monotonic() + timeout
        pause = 0.001
        while True:
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
            except BlockingIOError as error:
                left = deadline - time.monotonic()
                if left > 0:
                    time.sleep(min(pause, left))
                    pause = min(pause * 2, 0.05)
                    continue
                os.close(fd)
                raise ResourceBusy(f"{self.path} is locked by another process") from error
            except OSError as error:
                os.close(fd)
                raise host_error("lock", self.path, error) from error
            self._fd = fd
            return

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)  # the last descriptor of the description: that unlocks
            self._fd = -1

    def fileno(self) -> int:
        return self._fd

    def __del__(self) -> None:
        self.release()

    def __enter__(self) -> FileLock:
        if not self.held:
            self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


@contextmanager
def locked(path: AnyPath, *, timeout: float = 0.0, shared: bool = False) -> Iterator[FileLock]:
    """Hold the lock for a `with` block."""
    lock = FileLock(path)
    lock.acquire(timeout=timeout, shared=shared)
    try:
        yield lock
    finally:
        lock.release()
