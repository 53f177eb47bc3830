"""fallocate(2), which Python's `os` has only without its modes."""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache

__all__ = ["fallocate"]

_NOT_HERE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.ENOTTY)


@cache
def _function() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None, use_errno=True).fallocate64
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    function.restype = ctypes.c_int
    return function


def fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """False where the file system or device knows no such mode; `OSError` for all else, such as no room."""
    while _function()(fd, mode, offset, length) < 0:
        number = ctypes.get_errno()
        if number in _NOT_HERE:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True
