"""Secret values handed to programs: files in memory, which no name leads to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["lent", "memory_file"]


def memory_file(value: bytes) -> int:
    """A descriptor of a file that holds `value`, in memory only; nobody can change it through another descriptor's
    name but who holds it. The caller closes it."""
    fd = os.memfd_create("kvik-secret", os.MFD_CLOEXEC)
    try:
        os.write(fd, value)
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def lent(value: bytes) -> Iterator[int]:
    """The same, empty afterwards for whoever still holds it."""
    fd = memory_file(value)
    try:
        yield fd
    finally:
        os.ftruncate(fd, 0)
        os.close(fd)
