"""Locks on image files that QEMU understands, so that one image never has two writers.

QEMU takes open-file-description locks on single bytes of a raw image (its `block/file-posix.c`): byte 100 + n says
"I use permission n", byte 200 + n "I let nobody else use permission n". Both are shared locks, so that many may hold
the same; a conflict is found by asking whether an exclusive lock on the opposite byte would be refused. The bytes
need not exist in the file.

    permission     0 consistent read    1 write    2 write unchanged    3 resize
    a writer       uses 0 and 1, lets nobody else use 1 or 3
    a reader       uses 0, lets nobody else use 1 or 3
"""

from __future__ import annotations

import fcntl
import os
import struct

from kvik.errors import HostError, ResourceBusy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["lock_image", "unlock_image"]

USED = 100  # RAW_LOCK_PERM_BASE
UNSHARED = 200  # RAW_LOCK_SHARED_BASE
CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)

F_OFD_GETLK, F_OFD_SETLK = 36, 37  # fcntl(2)
_FLOCK = struct.Struct("hhqqi4x")  # struct flock on x86-64: l_type, l_whence, l_start, l_len, l_pid


def lock_image(fd: int, name: str, *, write: bool, share_write: bool = False) -> None:
    """Holds `fd`'s image until it is closed: against every other writer, or with `share_write` only announced.

    `ResourceBusy` when another process uses the image in a way that this use excludes.
    """
    uses = (CONSISTENT_READ, WRITE) if write else (CONSISTENT_READ,)
    refuses = () if share_write else (WRITE, RESIZE)
    try:
        for byte in _bytes(uses, refuses):
            _set(fd, fcntl.F_RDLCK, byte)
        taken = [UNSHARED + n for n in uses if _others_hold(fd, UNSHARED + n)]
        taken += [USED + n for n in refuses if _others_hold(fd, USED + n)]
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
        raise ResourceBusy(
            f"image {name} is in use by another process",
            remedy="stop the machine or tool that has it open (fuser -v shows which)",
        )


def unlock_image(fd: int) -> None:
    """Drops every lock that `lock_image` took."""
    for byte in _bytes(range(4), range(4)):
        try:
            _set(fd, fcntl.F_UNLCK, byte)
        except OSError:
            return


def _bytes(uses: Iterable[int], refuses: Iterable[int]) -> list[int]:
    return [USED + n for n in uses] + [UNSHARED + n for n in refuses]


def _set(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _others_hold(fd: int, byte: int) -> bool:
    """Whether an exclusive lock on the byte would be refused: our own locks never are in the way of ourselves."""
    answer = fcntl.fcntl(fd, F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
