"""Run a command, and tell and kill what it leaves behind: python tests/reaper.py COMMAND [ARGUMENT ...]

Processes that are orphaned below it become its children. A signal to it is passed on to the command. The exit code is
the command's, or 128 and the number of the signal that killed it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
PATIENCE = 10.0  # seconds for what was killed to be gone


def main(command: list[str]) -> int:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # A shell starts what it does not wait for with SIGINT ignored.
    child = os.posix_spawnp(command[0], command, os.environ, setsigdef=[signal.SIGINT])
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to everybody
    while (ended := os.waitpid(-1, 0))[0] != child:
        pass
    kill_the_rest()
    code = os.waitstatus_to_exitcode(ended[1])
    return code if code >= 0 else 128 - code


def kill_the_rest() -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and (pids := children()):
        for pid in pids:
            with contextlib.suppress(OSError):
                process = Path(f"/proc/{pid}")
                _, name, state = re.split(r" \((.*)\) ", (process / "stat").read_text(), maxsplit=1, flags=re.DOTALL)
                if not state.startswith("Z"):
                    words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    words = words.strip() or name  # one that just becomes another program has none
                    print(f"left behind, killed: {pid} {words[:200]}", flush=True)
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
