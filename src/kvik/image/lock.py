"""Locks on image files that QEMU understands, so that one image never has two writers.

QEMU takes open-file-description locks on single bytes of a raw image (its `block/file-posix.c`): byte 100 + n says
"I use permission n", byte 200 + n "I let nobody else use permission n". Both are shared locks, so that many may hold
the same; a conflict is found by asking whether an exclusive lock on the opposite byte would be refused. The bytes
need not exist in the file.

    permission     0 consistent read    1 write    2 write unchanged    3 resize
    a writer       uses 0 and 1, lets nobody else use 1 or 3
    a reader       uses 0, lets nobody else use 1 or 3

NFS, GFS2, Ceph and others carry such locks between hosts. OCFS2 on its own cluster stack does not (fs/ocfs2/file.c,
`ocfs2_fops_no_plocks`), but carries flock(2): there the whole file is locked by that, too. Not so on NFS, where the two
kinds are one (nfs(5)) and would be in each other's way.
"""

from __future__ import annotations

import fcntl
import os
import struct

from kvik.errors import HostError, ResourceBusy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["check_image", "lock_for_hosts", "lock_image", "stop_writing", "unlock_image"]

USED = 100  # RAW_LOCK_PERM_BASE
UNSHARED = 200  # RAW_LOCK_SHARED_BASE
CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)

F_OFD_GETLK, F_OFD_SETLK = 36, 37  # fcntl(2)
_MOUNTS = "/proc/self/mountinfo"
_FLOCK = struct.Struct("hhqqi4x")  # struct flock on x86-64: l_type, l_whence, l_start, l_len, l_pid


def lock_image(fd: int, name: str, *, write: bool, share_write: bool = False) -> None:
    """Holds `fd`'s image until it is closed: against every other writer, or with `share_write` only announced.

    `ResourceBusy` when another process uses the image in a way that this use excludes.
    """
    uses, refuses = _wishes(write, share_write)
    try:
        for byte in _bytes(uses, refuses):
            _set(fd, fcntl.F_RDLCK, byte)
        taken = _taken(fd, uses, refuses)
    except BlockingIOError as error:
        unlock_image(fd)
        raise ResourceBusy(f"cannot lock image {name}: another process holds it") from error
    except OSError as error:
        unlock_image(fd)
        raise HostError(
            f"cannot lock image {name}: {error.strerror}", remedy="use locking=off where the file system has no locks"
        ) from error
    if taken:
        unlock_image(fd)
        raise _in_use(name)
    try:
        lock_for_hosts(fd, name, write=write, share_write=share_write)
    except BaseException:
        unlock_image(fd)
        raise


def check_image(fd: int, name: str, *, write: bool, share_write: bool = False) -> None:
    """`ResourceBusy` if `lock_image` would be refused now by this host's or, where the file system tells, another's
    locks. Takes none. A file system without locks is silent."""
    try:
        taken = _taken(fd, *_wishes(write, share_write))
    except OSError:
        return
    if taken:
        raise _in_use(name)


def lock_for_hosts(fd: int, name: str, *, write: bool, share_write: bool = False) -> None:
    """Where other hosts see no locks on bytes but those on files: hold one on `fd`'s open file, and so for as long as
    anybody has that open. Elsewhere nothing. `ResourceBusy`, `HostError`."""
    if not _locks_files_only(fd):
        return
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if write and not share_write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _in_use(name) from error
    except OSError as error:
        raise HostError(f"cannot lock image {name}: {error.strerror}", errno=error.errno or 0) from error


def _in_use(name: str) -> ResourceBusy:
    return ResourceBusy(
        f"image {name} is in use by another process",
        remedy="stop the machine or tool that has it open (fuser -v shows which), on any host that shares it",
    )


def _wishes(write: bool, share_write: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return ((CONSISTENT_READ, WRITE) if write else (CONSISTENT_READ,), () if share_write else (WRITE, RESIZE))


def _taken(fd: int, uses: Iterable[int], refuses: Iterable[int]) -> list[int]:
    """The bytes on which others stand in the way."""
    taken = [UNSHARED + n for n in uses if _others_hold(fd, UNSHARED + n)]
    return taken + [USED + n for n in refuses if _others_hold(fd, USED + n)]


def _locks_files_only(fd: int) -> bool:
    """By the kernel's list of mounts (proc(5)): OCFS2, unless its locks were all kept to this host."""
    try:
        mounts = os.open(_MOUNTS, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # a process that sees no /proc was given its images by one that does
        return False
    try:
        data = b"".join(iter(lambda: os.read(mounts, 1 << 16), b""))
    finally:
        os.close(mounts)
    if b" - ocfs2 " not in data:
        return False
    device = os.fstat(fd).st_dev
    wanted = b"%d:%d" % (os.major(device), os.minor(device))
    lines = [line for line in data.splitlines() if line.split(b" ", 3)[2:3] == [wanted] and b" - ocfs2 " in line]
    return bool(lines) and b"localflocks" not in lines[-1]


def unlock_image(fd: int) -> None:
    """Drops every lock on bytes that `lock_image` took; one on the file ends when that is closed."""
    for byte in _bytes(range(4), range(4)):
        try:
            _set(fd, fcntl.F_UNLCK, byte)
        except OSError:
            return


def stop_writing(fd: int) -> None:
    """A writer becomes a reader: another descriptor may be locked for reading then, and still none for writing."""
    _set(fd, fcntl.F_UNLCK, USED + WRITE)


def _bytes(uses: Iterable[int], refuses: Iterable[int]) -> list[int]:
    return [USED + n for n in uses] + [UNSHARED + n for n in refuses]


def _set(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _others_hold(fd: int, byte: int) -> bool:
    """Whether an exclusive lock on the byte would be refused: our own locks never are in the way of ourselves."""
    answer = fcntl.fcntl(fd, F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
