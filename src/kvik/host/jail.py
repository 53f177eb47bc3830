"""Programs of others that read what strangers made, each with two or three open files and nothing else.

`vmm/sandbox/launch.py` runs them: Landlock (no path but the system's programs and libraries), no network, no sockets,
no new privileges, no capabilities but to open the files it was given, seccomp, and limits of time, memory and disk.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from kvik.errors import OperationUnsupported
from kvik.host.process import BASE_ENVIRONMENT, find_program
from kvik.host.tools import Completed, run

__all__ = ["run_jailed", "run_qemu_img"]

_LAUNCHER = f"{os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}/vmm/sandbox/launch.py"  # noqa: PTH100, PTH120
TRIES = 20
MEMORY = 2 << 30  # bytes of address space: qemu-img maps 400 MiB, and 8 MiB for each of up to 64 threads
# The C library reserves 64 MiB for each of eight arenas a processor: on many of them that alone would be too much.
_ENVIRONMENT = {**BASE_ENVIRONMENT, "MALLOC_ARENA_MAX": "2"}


def run_jailed(
    program: str,
    words: Sequence[str],
    *,
    readable: Sequence[int] = (),
    writable: Sequence[int] = (),
    private: Sequence[int] = (),
    package: str = "",
    seconds: int = 30,
    size: int = 0,
    limit: int = 1 << 20,
    listen: Callable[[bytes], None] | None = None,
) -> Completed:
    """Run `program` to its end; it finds its files as /proc/self/fd/NUMBER, by the numbers that they have here, or by
    their own names.

    `private` are files in memory (memfd_create(2)), which Landlock neither bounds nor needs to be told of.
    `seconds` bound its processor time (ten times as much the wall's), `size` each file it writes, `limit` what it
    prints, in bytes. It ends when this process does. Raises `OperationUnsupported` where it is not installed,
    `HostError`, `OperationTimeout`.
    """
    path = find_program(program)
    if path is None:
        raise OperationUnsupported(
            f"'{program}' is not installed", remedy=f"install the package {package}" if package else ""
        )
    if not os.path.isdir("/proc/self/fd"):  # noqa: PTH112
        raise OperationUnsupported("/proc is not mounted, through which a confined program is given its files")
    here, there = socket.socketpair()
    with here, there:
        files = [f"--read={fd}" for fd in readable] + [f"--write={fd}" for fd in writable]
        limits = [f"--cpu={seconds}", f"--memory={MEMORY}", f"--size={size}"]
        return run(
            [
                *(sys.executable, "-I", "-S", _LAUNCHER, f"--life={there.fileno()}", *files, "--alone", *limits),
                *("--", path, *words),
            ],
            env=_ENVIRONMENT,
            timeout=seconds * 10.0,
            limit=limit,
            pass_fds=[there.fileno(), *readable, *writable, *private],
            check=False,
            listen=listen,
        )


def run_qemu_img(words: Sequence[str], **options: Any) -> Completed:
    """qemu-img, with the options of `run_jailed`, again where nothing was wrong: on a busy host QEMU 7.2 may be unable
    to tell how fast it derives a key."""
    for attempt in range(TRIES):
        done = run_jailed("qemu-img", words, package="qemu-utils", **options)
        if not done.code or b"accurate CPU usage" not in done.err or attempt == TRIES - 1:
            break
    return done
