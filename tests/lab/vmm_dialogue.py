"""Runs in the lab: a machine of kvik-vmm whose guest and whose host take turns.

The guest's script says `turn WORD` on its console and waits for a line; meanwhile the host's side looks at files, asks
QMP, breaks things. A test's host side is a module of its own with a function for each word; what it asserts fails the
test with the console's text.

    python -c '...' '["kvik-vmm's arguments", ...]'
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["SAY", "Dialogue", "eventually"]

QMP = "/tmp/qmp"
SAY = """
turn() { echo "turn $*"; read answer; }
"""


def eventually(look: Callable[[], Any], seconds: float = 60.0) -> None:
    """Until `look` says yes. The lab is slow: the limit is only there so that a failure ends."""
    end = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


class Dialogue:
    """The machine, its console and its QMP. `run` plays it to the guest's end."""

    def __init__(self, command: list[str]) -> None:
        self.console = ""
        self.events: list[dict[str, Any]] = []
        self.process = subprocess.Popen([*command, "--qmp", QMP], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._stream: Any = None

    def run(self, turns: Mapping[str, Callable[[Dialogue, list[str]], None]]) -> None:
        assert self.process.stdout is not None and self.process.stdin is not None
        try:
            for line in self.process.stdout:
                text = line.decode(errors="replace").rstrip()
                self.console += text + "\n"
                if text.startswith("turn "):
                    word, *rest = text.split()[1:]
                    turns[word](self, rest)
                    self.process.stdin.write(b"\n")
                    self.process.stdin.flush()
            assert self.process.wait(30) == 0
        finally:
            print(self.console, file=sys.stderr)
            self.process.kill()

    def qmp(self, command: str, **arguments: Any) -> Any:
        if self._stream is None:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(QMP)
            connection.settimeout(60)
            self._stream = connection.makefile("rw")
            self._stream.readline()
            self.qmp("qmp_capabilities")
        self._stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._stream.flush()
        while True:
            answer = json.loads(self._stream.readline())
            if "event" in answer:
                self.events.append(answer)
            else:
                assert "return" in answer, (command, answer)
                return answer["return"]

    def stats(self, disk: str) -> dict[str, Any]:
        rows = self.qmp("query-blockstats")
        return next(row["stats"] for row in rows if disk in row["qdev"].split("/"))

    def resident(self) -> int:
        """Bytes of RAM that the machine's process has."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))
