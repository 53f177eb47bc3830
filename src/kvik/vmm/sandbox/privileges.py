"""What a process gives up: new privileges, capabilities, stray descriptors, core dumps (prctl(2), capset(2))."""

from __future__ import annotations

import ctypes
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SYS_CAPSET = 126
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_LAST = 63  # the bounding set ends at the first that the kernel does not know (EINVAL)

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int = 0) -> None:
    zero = ctypes.c_ulong(0)
    if _libc.prctl(ctypes.c_int(option), ctypes.c_ulong(argument), zero, zero, zero) < 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def no_new_privileges() -> None:
    """No execve gains anything any more; Landlock and seccomp ask for it. This thread and those it starts."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def bound_capabilities(keep: Iterable[int] = ()) -> None:
    """Take all capabilities but `keep` (linux/capability.h) from every program that this process will execute."""
    for capability in sorted(set(range(_CAP_LAST + 1)) - set(keep)):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            break  # without CAP_SETPCAP there is nothing to take


def drop_capabilities() -> None:
    """Empty all five capability sets of this thread; those it starts inherit that. Raises OSError."""
    for capability in range(_CAP_LAST + 1):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            break  # EPERM: without CAP_SETPCAP; with no_new_privs the bounding set gives nothing anyway
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    if _libc.syscall(ctypes.c_long(_SYS_CAPSET), header, bytes(24)) < 0:
        raise OSError(ctypes.get_errno(), f"capset: {os.strerror(ctypes.get_errno())}")


def close_stray(keep: Iterable[int]) -> None:
    """Close every descriptor above 2 that is not in `keep`: whatever the caller leaked. Before anything is opened."""
    start = 3
    for fd in sorted(keep):
        if fd >= start:
            os.closerange(start, fd)
            start = fd + 1
    os.closerange(start, 1 << 20)  # one close_range(2)


def limit(descriptors: int = 4096) -> None:
    """No core file (it would hold the guest's memory), no ptrace by the same user, a bound on descriptors."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        descriptors = min(descriptors, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    _prctl(_PR_SET_DUMPABLE, 0)
