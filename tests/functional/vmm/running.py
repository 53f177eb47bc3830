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

import restored
from tiny_kernel import elf

import kvik

ROOT = Path(kvik.__file__).parents[1]
SECONDS = 60
COUNT, OPEN = 0x1F0_0000, 0x1F0_0004
# 1: incl COUNT; cmpl $0, OPEN; je 1b
GATE = b"\xff\x05" + COUNT.to_bytes(4, "little") + b"\x83\x3d" + OPEN.to_bytes(4, "little") + b"\0\x74\xf1"


class Running:
    """kvik-vmm as a process of its own. Where machines shall be restored ones (`restored`), a first process with the
    same options saves itself while its guest waits at a gate, and ends; the test has a second one, with --restore."""

    def __init__(
        self, directory: Path, code: bytes, *options: str, program: str = "", fds: tuple[int, ...] = ()
    ) -> None:
        kernel = directory / "kernel"
        self.qmp_path = directory / "qmp"
        words = ["--kernel", str(kernel), "--memory", "32M", "--qmp", str(self.qmp_path), *options]
        start = ["-c", textwrap.dedent(program)] if program else ["-m", "kvik.vmm.main"]
        self.text = b""
        self.buffer = b""
        self.sock: socket.socket | None = None
        self.events: list[str] = []
        if restored.directory is not None and "--incoming" not in options:
            kernel.write_bytes(elf(GATE + code))
            try:
                words += ["--restore", str(self._saved(restored.directory, [*start, *words], fds))]
            except BaseException:
                self.close()  # nobody has this object yet
                raise
        kernel.write_bytes(elf(code))
        self._spawn([*start, *words], fds)

    def _spawn(self, words: list[str], fds: tuple[int, ...]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=fds,
            env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        )  # fmt: skip
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def _saved(self, directory: Path, words: list[str], fds: tuple[int, ...]) -> Path:
        """Start, save at the gate, end; the snapshot, in which the gate is open."""
        self._spawn([*words, "--snapshots", str(directory)], fds)
        self.connect()
        look = f"xp /1xw {COUNT:#x}"
        self.until(lambda: int(self.ask("human-monitor-command", command_line=look).split()[1], 16), "the gate")
        place = directory / str(len(list(directory.iterdir())))
        self.ask("x-kvik-snapshot-save", directory=str(place))
        self.ask("quit")
        assert self.wait() == 0
        self.close()
        self.text, self.buffer, self.sock, self.events = b"", b"", None, []
        with (place / "memory").open("r+b") as memory:  # all of it is below 3 GiB: an address is an offset
            memory.seek(OPEN)
            memory.write(b"\1")
        return place

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
