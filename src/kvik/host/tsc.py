"""The rate of the host's time stamp counter, measured.

Under software emulation a guest's RDTSC is the host's own. A machine without a timer to calibrate it by (QEMU's
microvm has no port 0x61, so Linux's calibration against the PIT is a matter of luck) has to be told its rate.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import time
from collections.abc import Callable

__all__ = ["tsc_khz"]

# rdtsc; shl rdx, 32; or rax, rdx; ret
_CODE = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_INTERVAL = 0.05  # seconds; the clocks are read within a microsecond of each other, so 20 ppm
_TRIES = 3


@functools.cache
def tsc_khz() -> int | None:
    """kHz; None where it cannot be measured (not x86-64, no executable memory allowed). Blocks for 50 ms, once."""
    if os.uname().machine != "x86_64":
        return None
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None  # a policy forbids memory that is both written and run
    page.write(_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    ticks, nanoseconds = _both(read)
    time.sleep(_INTERVAL)
    later, then = _both(read)
    return round((later - ticks) * 1_000_000 / (then - nanoseconds))


def _both(read: Callable[[], int]) -> tuple[int, int]:
    """The counter and the clock at the same time: of a few readings the one that was interrupted least."""
    best = (0, 0, 1 << 62)
    for _ in range(_TRIES):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        ticks = read()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        if after - before < best[2]:
            best = (ticks, (before + after) // 2, after - before)
    return best[:2]
