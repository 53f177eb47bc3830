"""How fast this host's time stamp counter runs, measured against the monotonic clock.

A guest under software emulation reads the host's counter. Where its machine has no timer to measure it with (microvm),
its kernel must be told (`tsc_early_khz=`). /proc/cpuinfo does not say: its MHz are the clock of the moment.
"""

from __future__ import annotations

import platform
import time

READ = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
SPAN = 0.02  # seconds; good to about 0.01 %


def tsc_khz() -> int | None:
    """The frequency in kHz; None where the counter cannot be read (another architecture, no executable memory)."""
    if platform.machine() != "x86_64":
        return None
    import ctypes
    import mmap

    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    page.write(READ)
    anchor = ctypes.c_char.from_buffer(page)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
    before, start = read(), time.monotonic_ns()
    time.sleep(SPAN)
    after, end = read(), time.monotonic_ns()
    del read, anchor
    page.close()
    return int((after - before) * 1_000_000 // (end - start))
