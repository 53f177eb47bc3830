"""Telling the kernel of single partitions: BLKPG of <linux/blkpg.h>. What is in use elsewhere on the disk stays."""

from __future__ import annotations

import ctypes
import fcntl
import os
from pathlib import Path

from kvik.errors import HostError
from kvik.host.files import host_error

__all__ = ["add", "partition_path", "remove", "resize"]

BLKPG = 0x1269
ADD, DELETE, RESIZE = 1, 2, 3  # BLKPG_ADD_PARTITION, ...


class _Partition(ctypes.Structure):
    """struct blkpg_partition; sizes in bytes."""

    _fields_ = [
        ("start", ctypes.c_longlong),
        ("length", ctypes.c_longlong),
        ("pno", ctypes.c_int),
        ("devname", ctypes.c_char * 64),
        ("volname", ctypes.c_char * 64),
    ]


class _Argument(ctypes.Structure):
    """struct blkpg_ioctl_arg."""

    _fields_ = [
        ("op", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("datalen", ctypes.c_int),
        ("data", ctypes.POINTER(_Partition)),
    ]


def add(disk: str, number: int, start: int, length: int) -> None:
    """EBUSY: there is one of this number already."""
    _tell(disk, ADD, number, start, length)


def remove(disk: str, number: int) -> None:
    """EBUSY: it is in use; ENXIO: there is none."""
    _tell(disk, DELETE, number, 0, 0)


def resize(disk: str, number: int, start: int, length: int) -> None:
    _tell(disk, RESIZE, number, start, length)


def _tell(disk: str, what: int, number: int, start: int, length: int) -> None:
    partition = _Partition(start=start, length=length, pno=number)
    argument = _Argument(op=what, datalen=ctypes.sizeof(partition), data=ctypes.pointer(partition))
    try:
        fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.ioctl(fd, BLKPG, argument)
        finally:
            os.close(fd)
    except OSError as error:
        raise host_error(f"change partition {number} of", disk, error) from error


def partition_path(disk: str, number: int) -> str:
    """The device of a partition by the kernel's rule: a "p" behind a digit. A link to the disk is followed."""
    real = str(Path(disk).resolve())
    if not real.startswith("/dev/"):
        raise HostError(f"{disk} is no device")
    return f"{real}{'p' if real[-1].isdigit() else ''}{number}"
