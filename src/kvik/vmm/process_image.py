"""What others see of a process that was forked, not executed: its name, command line and environment in /proc.

PR_SET_MM_MAP (prctl(2)) tells the kernel where those lie; the rest of the map stays as /proc/self/stat has it. It needs
no privilege, but a kernel with CONFIG_CHECKPOINT_RESTORE, as distributions have. Elsewhere only the name changes.
"""

from __future__ import annotations

import ctypes
import mmap

__all__ = ["prepare", "rename", "trim_heap"]

PR_SET_NAME, PR_SET_MM, PR_SET_MM_MAP = 15, 35, 14
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sbrk.restype = ctypes.c_void_p
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)

_FIELDS = ("start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "start_stack")
_ARGUMENTS = ("arg_start", "arg_end", "env_start", "env_end")


class MmMap(ctypes.Structure):
    """struct prctl_mm_map (linux/prctl.h)."""

    _fields_ = [
        *[(name, ctypes.c_uint64) for name in (*_FIELDS, *_ARGUMENTS, "auxv")],
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_uint32),
    ]


_map = MmMap()
_texts: list[mmap.mmap] = []  # what the kernel reads from now on


def prepare() -> None:
    """Learn what does not change by a fork."""
    with open("/proc/self/stat", "rb") as file:  # noqa: PTH123 - pathlib is not imported by a machine
        fields = file.read().rpartition(b")")[2].split()
    field = {"start_code": 26, "end_code": 27, "start_stack": 28, "start_data": 45, "end_data": 46, "start_brk": 47}
    for name, number in field.items():  # proc(5) counts from 1, and what is before ")" are two
        setattr(_map, name, int(fields[number - 3]))
    _map.exe_fd = 0xFFFF_FFFF


def trim_heap() -> None:
    """Give free memory back (malloc_trim(3)): what a fork allocates then lies in fresh pages, not in holes of shared
    ones, each of which would become one of its own."""
    _libc.malloc_trim(ctypes.c_size_t(0))


def rename(name: str, argv: list[str], environment: dict[str, str]) -> bool:
    """Be `name`, with this command line and environment; whether the latter two took effect."""
    short = ctypes.create_string_buffer(name.encode()[:15])
    _libc.prctl(PR_SET_NAME, ctypes.addressof(short), 0, 0, 0)
    words = b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in argv)
    variables = b"".join(
        f"{key}={value}".encode("utf-8", "surrogateescape") + b"\0" for key, value in environment.items()
    )
    text = mmap.mmap(-1, len(words) + len(variables) + 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    text.write(words + variables)
    at = ctypes.addressof(ctypes.c_char.from_buffer(text))
    _map.arg_start, _map.arg_end = at, at + len(words)
    _map.env_start, _map.env_end = at + len(words), at + len(words) + len(variables)
    _map.brk = _libc.sbrk(ctypes.c_long(0)) or 0
    size = ctypes.sizeof(_map)
    done = bool(_map.start_code) and not _libc.prctl(PR_SET_MM, PR_SET_MM_MAP, ctypes.addressof(_map), size, 0)
    if done:
        _texts[:] = [text]
    return done
