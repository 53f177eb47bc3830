"""One piece of host I/O, and how it is done by a thread that may wait.

A request is made by a device, handed to an engine (`pool`, `io_uring`), and comes back with `result`: 0, or the
negative number of an error. `buffers` are views of guest memory; the kernel reads and writes them in place.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DISCARD", "FLUSH", "READ", "WRITE", "WRITE_ZEROES", "Request", "perform"]

READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES = range(5)

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 0x01, 0x02, 0x10  # fallocate(2)
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F  # linux/fs.h; the argument is two u64, start and length in bytes
IOV_MAX = 1024  # sysconf(_SC_IOV_MAX): more vectors in one call are EINVAL
ZERO_STEP = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Request:
    """`offset` and `length` in bytes. `flags` are RWF_*; `unmap` lets WRITE_ZEROES free the space. `end` is where the
    file ended when the size was last looked at: reads beyond it are zeros (the rest of a last, partial sector), while
    a file that became shorter since is an error."""

    __slots__ = (
        "buffered_fd",
        "buffers",
        "context",
        "done",
        "end",
        "fd",
        "flags",
        "is_device",
        "keep",
        "length",
        "offset",
        "op",
        "result",
        "unmap",
        "vector",
    )

    def __init__(
        self,
        op: int,
        offset: int = 0,
        length: int = 0,
        buffers: list[memoryview] | None = None,
        done: Callable[[Request], None] | None = None,
        *,
        unmap: bool = False,
    ) -> None:
        self.op = op
        self.offset = offset
        self.length = length
        self.buffers: list[memoryview] = buffers if buffers is not None else []
        self.done = done
        self.unmap = unmap
        self.flags = 0
        self.fd = -1
        self.buffered_fd = -1  # for O_DIRECT: where a request goes whose buffers turn out not to be aligned
        self.end = 0
        self.is_device = False
        self.result = 0
        self.context: object = None  # the device's
        self.vector = b""  # `buffers` as an array of struct iovec, where somebody knows it already
        self.keep: object = None  # what the kernel uses until the request is complete: I/O vectors, pinned buffers


def perform(request: Request) -> int:
    """Does the request, waiting as long as it takes. 0, or a negative errno."""
    result = _perform(request)
    if result == -errno.EINVAL and request.buffered_fd not in (-1, request.fd):
        request.fd = request.buffered_fd
        result = _perform(request)
    return result


def _perform(request: Request) -> int:
    try:
        if request.op == READ:
            return _read(request)
        if request.op == WRITE:
            return _write(request)
        if request.op == FLUSH:
            os.fdatasync(request.fd)
            return 0
        if request.op == DISCARD:
            return _discard(request)
        return _write_zeroes(request)
    except OSError as error:
        return -(error.errno or errno.EIO)


def _read(request: Request) -> int:
    offset, buffers = request.offset, request.buffers
    while buffers:
        count = os.preadv(request.fd, buffers[:IOV_MAX], offset, request.flags)
        if count == 0:
            if offset < request.end:
                return -errno.EIO  # the file was cut short under the machine
            for view in buffers:
                view[:] = bytes(len(view))
            return 0
        offset += count
        buffers = advance(buffers, count)
    return 0


def _write(request: Request) -> int:
    offset, buffers = request.offset, request.buffers
    while buffers:
        count = os.pwritev(request.fd, buffers[:IOV_MAX], offset, request.flags)
        if count == 0:
            return -errno.EIO
        offset += count
        buffers = advance(buffers, count)
    return 0


def advance(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the buffers behind the first `count` bytes."""
    for index, view in enumerate(buffers):
        if count < len(view):
            return [view[count:], *buffers[index + 1 :]]
        count -= len(view)
    return []


def _discard(request: Request) -> int:
    """Discarding is advice: where the file system or the device cannot, nothing is done and nothing is wrong."""
    try:
        if request.is_device:
            _ioctl_range(request, BLKDISCARD)
        else:
            _fallocate(request, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS):
            raise
    return 0


def _write_zeroes(request: Request) -> int:
    try:
        if request.is_device:
            _ioctl_range(request, BLKZEROOUT)
        elif request.unmap:
            _fallocate(request, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
        else:
            _fallocate(request, FALLOC_FL_ZERO_RANGE)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL):
            raise
        _write_zero_bytes(request)
    if request.flags:  # write-through: RWF_DSYNC has no counterpart in fallocate
        os.fdatasync(request.fd)
    return 0


def _write_zero_bytes(request: Request) -> None:
    zeros = memoryview(bytes(min(request.length, ZERO_STEP)))
    offset, end = request.offset, request.offset + request.length
    while offset < end:
        offset += os.pwrite(request.fd, zeros[: end - offset], offset)


def _fallocate(request: Request, mode: int) -> None:
    if _libc.fallocate(request.fd, mode, request.offset, request.length) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _ioctl_range(request: Request, command: int) -> None:
    fcntl.ioctl(request.fd, command, bytearray(struct.pack("=QQ", request.offset, request.length)))
