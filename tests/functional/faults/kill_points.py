"""Kills the daemon at one system call of one operation, by strace.

Which calls there are is found by a run without harm. strace counts for each thread of its own, and a call that is the
N-th of its kind in one thread may be so in another: a point is the first thread's to come there. At a kill the call
itself has not been made.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# What changes anything outside the daemon, or starts what does.
CALLS = (
    *("rename", "renameat2", "link", "symlink", "unlink", "unlinkat", "rmdir", "mkdir", "openat", "write", "pwrite64"),
    *("ftruncate", "fsync", "fdatasync", "fchmod", "fchmodat", "vfork", "clone", "clone3", "execve"),
    *("bind", "listen", "connect", "sendmsg", "sendto", "pidfd_send_signal", "kill", "setsid"),
)
# Of which each one is tried even by CI's share of the sweep: a state on disk or a process comes or goes.
WEIGHTY = {"rename", "symlink", "unlink", "unlinkat", "rmdir", "mkdir", "vfork", "execve", "pidfd_send_signal", "bind"}
KILL = "signal=KILL"
THIN = 2  # of the others, every so many-th


class Point(NamedTuple):
    call: str
    number: int  # from 1
    detail: str  # as it was in the harmless run

    def __str__(self) -> str:
        return f"{self.call} {self.number} ({self.detail})"


class Tracer:
    """strace on a process that runs."""

    def __init__(self, pid: int, point: Point | None = None, fault: str = KILL) -> None:
        self.output = Path(tempfile.mkstemp(prefix="kf-strace", dir="/tmp")[1])
        command = ["strace", "-f", "-s", "100", "-o", str(self.output), "-p", str(pid)]
        if point:
            command += ["-e", f"trace={point.call}", "-e", f"inject={point.call}:{fault}:when={point.number}"]
        else:
            command += ["-e", f"trace={','.join(f'?{call}' for call in CALLS)}"]  # not every kernel has every call
        if not point or point.call != "execve":  # machines are let go at their exec: the daemon is to be hit
            command += ["-b", "execve"]
        self._killing = point is not None
        self._strace = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._strace.stderr
        said = self._strace.stderr.readline()
        assert "attached" in said, said

    def end(self) -> str:
        """What was traced."""
        # Told to end while a tracee dies, strace waits for it for ever. Killed, it lets go of everything at once.
        self._strace.send_signal(signal.SIGKILL if self._killing else signal.SIGINT)
        try:
            self._strace.wait(10)
        except subprocess.TimeoutExpired:
            self._strace.kill()
            self._strace.wait()
        assert self._strace.stderr
        self._strace.stderr.close()
        text = self.output.read_text(errors="replace")
        self.output.unlink()
        return text


@contextlib.contextmanager
def traced(pid: int, point: Point | None = None, fault: str = KILL) -> Iterator[list[str]]:
    """The list gets what was traced, as one string, at the end of the block."""
    tracer = Tracer(pid, point, fault)
    result: list[str] = []
    try:
        yield result
    finally:
        result.append(tracer.end())


def points_of(trace: str) -> list[Point]:
    """Every point of a harmless run, in its order."""
    counts: Counter[tuple[str, str]] = Counter()
    found: dict[tuple[str, int], Point] = {}
    for line in trace.splitlines():
        match = re.match(r"(\d+) +(\w+)\((.*)", line)
        if match is None or match[2] not in CALLS:
            continue
        counts[match[1], match[2]] += 1
        key = match[2], counts[match[1], match[2]]
        detail = re.sub(r"/tmp/kf\w+|\.kvik-[-\w]+|0x[0-9a-f]+", "", match[3])[:70]
        found.setdefault(key, Point(*key, os.fsdecode(detail.encode("ascii", "replace"))))
    return list(found.values())


def share(points: list[Point], whole: bool) -> list[Point]:
    if whole:
        return points
    others = [point for point in points if point.call not in WEIGHTY]
    kept = {*(point for point in points if point.call in WEIGHTY), *others[::THIN]}
    return [point for point in points if point in kept]
