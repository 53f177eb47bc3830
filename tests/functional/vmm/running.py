"""kvik-vmm as a process of its own, with a kernel of a few instructions, and a client of its monitor."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_kernel import elf

import kvik

ROOT = Path(kvik.__file__).parents[1]
SECONDS = 60


class Running:
    """kvik-vmm as a process of its own."""

    def __init__(
        self, directory: Path, code: bytes, *options: str, program: str = "", fds: tuple[int, ...] = ()
    ) -> None:
        (directory / "kernel").write_bytes(elf(code))
        self.qmp_path = directory / "qmp"
        words = ["--kernel", str(directory / "kernel"), "--memory", "32M", "--qmp", str(self.qmp_path), *options]
        start = ["-c", textwrap.dedent(program)] if program else ["-m", "kvik.vmm.main"]
        self.process = subprocess.Popen(
            [sys.executable, *start, *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=fds,
            env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        )  # fmt: skip
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.text = b""
        self.buffer = b""
        self.sock: socket.socket | None = None
        self.events: list[str] = []

    def until(self, condition: Callable[[], object], what: str = "it") -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, f"{what} did not come about: {self.text!r}"
            assert self.process.poll() is None or condition(), (self.text, self.errors())
            time.sleep(0.01)

    def said(self, pattern: bytes, count: int = 1) -> bool:
        assert self.process.stdout is not None
        self.text += self.process.stdout.read() or b""
        return len(re.findall(pattern, self.text)) >= count

    def errors(self) -> str:
        assert self.process.stderr is not None
        self.process.kill()
        return self.process.stderr.read().decode()

    def connect(self) -> None:
        self.until(self.qmp_path.exists, "the monitor")
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS)
        self.until(lambda: self.sock.connect_ex(str(self.qmp_path)) == 0, "the monitor")
        self._line()
        self.ask("qmp_capabilities")

    def _line(self) -> dict[str, Any]:
        assert self.sock is not None
        while b"\n" not in self.buffer:
            data = self.sock.recv(65536)
            assert data, "the monitor closed"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def ask(self, command: str, *, fds: tuple[int, ...] = (), **arguments: Any) -> Any:
        assert self.sock is not None
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = json.dumps({"execute": command, "arguments": names}).encode() + b"\n"
        socket.send_fds(self.sock, [message], list(fds))
        while True:
            answer = self._line()
            if "event" in answer:
                self.events.append(answer["event"])
                continue
            assert "return" in answer, (command, answer)
            return answer["return"]

    def wait(self) -> int:
        code = self.process.wait(SECONDS)
        self.said(b"")
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        if self.sock is not None:
            self.sock.close()
