"""Files with holes: where their data is, and copying it without filling them."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator

from kvik.errors import OperationUnsupported

__all__ = ["clone", "copy_data", "copy_range", "extents", "punch", "size_of"]

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 0x01, 0x02  # fallocate(2)
FICLONE = 0x40049409  # ioctl_ficlone(2)
CHUNK = 8 << 20
READ = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def size_of(fd: int) -> int:
    """Bytes of a file or block device."""
    return os.lseek(fd, 0, os.SEEK_END)


def extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, is data) from `start` to `end`, without gaps. Moves the descriptor's position."""
    while start < end:
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                yield start, end - start, False
                return
            if error.errno != errno.EINVAL:
                raise
            yield start, end - start, True  # a block device has no holes that anyone tells of
            return
        if data >= end:
            yield start, end - start, False
            return
        if data > start:
            yield start, data - start, False
        hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        if hole <= data:  # it was cut while we looked
            return
        yield data, hole - data, True
        start = hole


def clone(source: int, target: int) -> None:
    """Share all blocks, copied once they are written to. `OperationUnsupported` where the file system cannot."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY):
            raise
        raise OperationUnsupported(
            f"the file system cannot share a volume's blocks with its copy: {error.strerror}",
            remedy="leave --reflink away; btrfs and xfs can, within one file system",
        ) from error


def copy_data(source: int, target: int, size: int) -> None:
    """The first `size` bytes. Holes of the source are left out: the target must read as zeros there."""
    for offset, length, is_data in extents(source, 0, size):
        if is_data:
            copy_range(source, target, offset, length)


def copy_range(source: int, target: int, offset: int, length: int) -> None:
    """All of it, to the same place; in the kernel where that can. Raises OSError."""
    position, end, in_kernel = offset, offset + length, True
    while position < end:
        if in_kernel:
            try:
                done = os.copy_file_range(source, target, min(CHUNK, end - position), position, position)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                    raise
                in_kernel = False
                continue
        else:
            done = _write(target, os.pread(source, min(READ, end - position), position), position)
        if not done:  # the source was cut while we copied
            raise OSError(errno.EIO, "the source became shorter while it was copied")
        position += done


def _write(fd: int, data: bytes, offset: int) -> int:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
    return len(data)


def punch(fd: int, offset: int, length: int, growing: bool) -> None:
    """Zeros that take no space, where the file system can; else written ones. `growing`: the file may get longer."""
    if not length:
        return
    size = size_of(fd)
    if growing and offset + length > size:
        size = offset + length
        os.ftruncate(fd, size)  # first: the block that the old end lies in can then go as a whole
    inside = min(offset + length, size) - offset
    if inside <= 0:
        return
    if _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, inside) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
        raise OSError(number, os.strerror(number))
    for start in range(offset, offset + inside, READ):
        _write(fd, bytes(min(READ, offset + inside - start)), start)
