"""Keeps every process of one test: whatever is orphaned below it becomes its child, so nothing can leak unseen.

    python nursery.py        one JSON request a line on stdin, one JSON answer a line on stdout
    {"spawn": [argv], "env": {...}, "output": PATH}   -> {"pid": N}
    {"codes": true}                                   -> {"PID": exit status as waitpid gives it, ...}

Ends, without killing anything, when stdin is closed.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from typing import Any

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    codes: dict[str, int] = {}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pending = b""
    while True:
        ready, _, _ = select.select([0, reader], [], [])
        if reader in ready:
            os.read(reader, 4096)
        while True:  # as init does: nothing stays a zombie
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            codes[str(pid)] = status
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                print(json.dumps(answer(json.loads(line), codes)), flush=True)


def answer(request: dict[str, Any], codes: dict[str, int]) -> dict[str, Any]:
    if "spawn" not in request:
        return codes
    with open(request["output"], "ab") as output:
        child = subprocess.Popen(
            request["spawn"], env=request["env"], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    child.returncode = 0  # the loop above reaps it, not subprocess
    return {"pid": child.pid}


if __name__ == "__main__":
    sys.exit(main())
