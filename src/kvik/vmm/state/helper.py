"""A helper process of a migration: a fork of the VMM that runs one function and ends with the VMM at the latest.

It runs no program, so it has the sandbox of its parent. Only the forking thread exists in it: nothing of the machine
may be used there, and nothing of it is kept open. docs/adr/0012-migration-helper.md.
"""

from __future__ import annotations

import ctypes
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable, Iterable

    from kvik.vmm.memory import Region
else:
    import _signal  # what is behind `signal`, which is slow to import

__all__ = ["end_helper", "fork_helper", "not_inherited"]

_PR_SET_PDEATHSIG = 1
_MADV_DONTFORK, _MADV_DOFORK = 10, 11
_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def fork_helper(run: Callable[[], None], keep: Iterable[int]) -> tuple[int, int]:
    """Start one; (pid, a pidfd). It has the descriptors `keep` and the standard ones, and ends when `run` returns."""
    every = _signal.pthread_sigmask(_signal.SIG_BLOCK, _signal.valid_signals())
    try:
        pid = os.fork()
        if not pid:
            _child(run, sorted(keep))
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, every)
    return pid, os.pidfd_open(pid)


def _child(run: Callable[[], None], keep: list[int]) -> None:
    """Never returns."""
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, _signal.SIGKILL)
        for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP):
            _signal.signal(number, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, _signal.valid_signals())
        last = 2
        for fd in keep:
            if fd > last:
                os.closerange(last + 1, fd)
                last = fd
        os.closerange(last + 1, os.sysconf("SC_OPEN_MAX"))
        run()
    finally:
        os._exit(0)


def end_helper(pid: int, pidfd: int) -> None:
    """End it at once and wait for that."""
    _signal.pidfd_send_signal(pidfd, _signal.SIGKILL)
    os.close(pidfd)
    os.waitpid(pid, 0)


class not_inherited:
    """While RAM of these regions is not passed on to forks, which would make every page of it copy-on-write."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self._regions = list(regions)

    def __enter__(self) -> None:
        for region in self._regions:
            _libc.madvise(region.address, region.size, _MADV_DONTFORK)

    def __exit__(self, *_: object) -> None:
        for region in self._regions:
            _libc.madvise(region.address, region.size, _MADV_DOFORK)
