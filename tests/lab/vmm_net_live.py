"""A stock kernel on kvik-vmm that does as it is told while it runs. Used inside the lab, by the scenarios.

with Guest("--net", "tap,ifname=kt0") as guest:
    guest.run("ping -c 1 10.77.0.1")      # in the guest's shell, on its serial line
    guest.qmp("set_link", name="net0", up=False)
    guest.event("NETDEV_GONE")
"""

from __future__ import annotations

import itertools
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

__all__ = ["SHELL", "Guest", "wait_for"]

PATIENCE = 60.0  # seconds for anything: the lab is slow, and never waits for nothing
# Reads a command a line, and says with what it ended.
SHELL = 'stty -echo; echo at your service\nwhile read -r line; do eval "$line"; echo "--- ended $?"; done'
_numbers = itertools.count()


def wait_for(what: str, condition: Any) -> Any:
    """Until `condition()` is true; its value."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {PATIENCE:g} s: {what}"
        time.sleep(0.1)
    return value


class Guest:
    """One machine, whose initramfs (the lab's share has it) runs SHELL."""

    def __init__(
        self, *options: str, kernel: str, initrd: str = "/run/lab/initrd", pass_fds: Sequence[int] = ()
    ) -> None:
        self.socket = f"/tmp/qmp-{os.getpid()}-{next(_numbers)}"
        words = [sys.executable, "-m", "kvik.vmm.main", "--kernel", kernel, "--initrd", initrd, "--memory", "256M"]
        words += ["--append", "console=ttyS0 quiet panic=-1 pci=noearly", "--serial", "stdio"]
        words += ["--qmp", self.socket, *options]
        pipe = subprocess.PIPE
        with open(f"{self.socket}.log", "wb") as log:
            self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=log, pass_fds=pass_fds)
        self.said = ""
        self.patience = PATIENCE
        self.events: list[dict[str, Any]] = []
        self._qmp: socket.socket | None = None
        self._rest = b""
        try:
            self._until("at your service")
        except BaseException:
            self.end()
            raise

    def log(self) -> str:
        with open(f"{self.socket}.log", encoding="utf-8", errors="replace") as file:
            return file.read()

    def _until(self, text: str) -> str:
        assert self.process.stdout is not None
        fd, start, end = self.process.stdout.fileno(), len(self.said), time.monotonic() + self.patience
        while text not in self.said[start:]:
            ready = select.select([fd], [], [], max(end - time.monotonic(), 0))[0]
            data = os.read(fd, 65536) if ready else b""
            assert data, f"the guest never said {text!r}\n{self.said[-3000:]}\n{self.log()[-3000:]}"
            self.said += data.decode(errors="replace").replace("\r", "")
        return self.said[start:]

    def run(self, command: str, check: bool = True) -> str:
        """What a command of one line prints in the guest."""
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()
        out, _, code = self._until("--- ended ").rpartition("--- ended ")
        while not code.endswith("\n"):
            code += self._until("\n")
        assert not check or int(code) == 0, f"{command!r} ended with {code.strip()}\n{out}\n{self.log()[-2000:]}"
        return out.strip()

    # --- QMP

    def _line(self) -> dict[str, Any]:
        assert self._qmp is not None
        while b"\n" not in self._rest:
            data = self._qmp.recv(65536)
            assert data, f"the monitor closed the connection\n{self.log()[-3000:]}"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.events.append(message)
        return message

    def _command(self, name: str, arguments: dict[str, Any], fd: int = -1) -> dict[str, Any]:
        assert self._qmp is not None
        words = json.dumps({"execute": name, "arguments": arguments}).encode()
        if fd >= 0:
            socket.send_fds(self._qmp, [words], [fd])
        else:
            self._qmp.sendall(words)
        while True:
            message = self._line()
            if "return" in message or "error" in message:
                return message

    def qmp(self, command: str, *, fd: int = -1, **arguments: Any) -> Any:
        """A command's answer; AssertionError if it was refused. `fd` goes along."""
        if self._qmp is None:
            self._qmp = socket.socket(socket.AF_UNIX)
            self._qmp.settimeout(PATIENCE)
            wait_for("the monitor's socket", lambda: os.path.exists(self.socket))
            self._qmp.connect(self.socket)
            self._line()
            assert "return" in self._command("qmp_capabilities", {})
        answer = self._command(command, {key.replace("_", "-"): value for key, value in arguments.items()}, fd)
        assert "return" in answer, f"{command}: {answer}"
        return answer["return"]

    def event(self, name: str) -> dict[str, Any]:
        """The next event of that name; it may have come already."""
        while True:
            for place, event in enumerate(self.events):
                if event["event"] == name:
                    data: dict[str, Any] = self.events.pop(place).get("data", {})
                    return data
            self._line()

    # --- its end

    def end(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        if error is not None:
            print(f"--- the guest said\n{self.said[-3000:]}\n--- kvik-vmm said\n{self.log()[-3000:]}", flush=True)
