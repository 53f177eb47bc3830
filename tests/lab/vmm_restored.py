"""Runs in the lab: a machine of kvik-vmm that is saved where its guest's script begins, ended, and restored by another
process, which goes on to the guest's end.

    python vmm_restored.py BEGIN '["kvik-vmm", "argument", ...]'

Standard output is the guest's console, of both processes one behind the other; standard error is theirs.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

PLACE = Path("/tmp/restored")


class Process:
    """kvik-vmm and its monitor; the console line by line."""

    def __init__(self, command: list[str], *more: str) -> None:
        self.qmp = PLACE / "qmp"
        self.qmp.unlink(missing_ok=True)
        words = [*command, "--qmp", str(self.qmp), "--snapshots", str(PLACE), *more]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.stream: Any = None

    def lines(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            yield line

    def ask(self, command: str, **arguments: str) -> None:
        if self.stream is None:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(60)
            while connection.connect_ex(str(self.qmp)):
                assert self.process.poll() is None
            self.stream = connection.makefile("rw")
            self.stream.readline()
            self.ask("qmp_capabilities")
        self.stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.stream.flush()
        while "event" in (answer := json.loads(self.stream.readline())):
            pass
        assert "return" in answer, (command, answer)


def main() -> int:
    begin, command = sys.argv[1].encode(), json.loads(sys.argv[2])
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
    first = Process(command)
    first.ask("query-status")
    console = first.lines()
    if not any(begin in line for line in console):
        return first.process.wait() or 3
    first.ask("stop")  # what it says is in the pipe now, and it will not say more
    first.ask("x-kvik-snapshot-save", directory=str(PLACE / "saved"))
    first.ask("quit")
    for _ in console:
        pass
    assert first.process.wait() == 0
    second = Process(command, "--restore", str(PLACE / "saved"))
    second.ask("cont")
    for _ in second.lines():
        pass
    code = second.process.wait()
    shutil.rmtree(PLACE)
    return code


sys.exit(main())
