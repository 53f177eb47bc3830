"""Tiny guests that are spoken to by their agents, in a network namespace of their own."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from kvik.guest.tiny import cached_tiny, kernel_arguments
from kvik.image.kernel import uncompressed_kernel
from kvik.paths import Paths
from real import images

SOURCE = Path(__file__).parents[3]
SCRIPT = Path(__file__).parent / "switch_session.py"
DEADLINE = 90.0  # seconds; two to four is usual, a loaded machine may need many times that
NOBODY = 65534
PYTHON = "/usr/bin/python3"  # one that everybody may run


class Guest:
    """The agent of one machine."""

    def __init__(self, directory: Path, name: str) -> None:
        self.agent = self._connect(directory / f"{name}.agent")
        self.execute("guest-sync", id=1)

    def _connect(self, path: Path) -> Any:
        deadline = time.monotonic() + DEADLINE
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(path))
            except OSError:
                connection.close()
                assert time.monotonic() < deadline, f"{path} is not there"
                time.sleep(0.05)
            else:
                connection.settimeout(DEADLINE)
                return connection.makefile("rwb")

    def execute(self, command: str, **arguments: object) -> Any:
        self.agent.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self.agent.flush()
        while "return" not in (reply := json.loads(self.agent.readline())):
            assert "error" not in reply, reply
        return reply["return"]

    def shell(self, script: str) -> str:
        """What it printed, both streams."""
        given = {"path": "/bin/sh", "arg": ["-c", f"exec 2>&1; {script}"], "capture-output": True}
        pid = self.execute("guest-exec", **given)["pid"]
        deadline = time.monotonic() + DEADLINE
        while not (status := self.execute("guest-exec-status", pid=pid))["exited"]:
            assert time.monotonic() < deadline, script
            time.sleep(0.05)
        return base64.b64decode(status.get("out-data", "")).decode(errors="replace")

    def eventually(self, script: str, wanted: str) -> str:
        deadline = time.monotonic() + DEADLINE
        while wanted not in (text := self.shell(script)):
            assert time.monotonic() < deadline, f"{script}: {text}"
            time.sleep(0.2)
        return text


class SwitchSession:
    """`switch_session.py` in a network namespace; as nobody where this is root."""

    def __init__(
        self,
        directory: Path,
        settings: dict[str, Any],
        machines: list[dict[str, Any]],
        *,
        within: str = "",
        initrd: Path | None = None,
    ) -> None:
        """`initrd`: instead of the tiny image's own."""
        self.directory = directory
        sources = directory / "src"
        shutil.copytree(SOURCE / "src", sources)  # with its bytecode: nobody may write some
        image = cached_tiny(Paths.system(images().parents[3]))
        assert image is not None
        kernel = uncompressed_kernel(image.kernel, directory / "kernels")
        assert kernel is not None
        shutil.copy(initrd or image.initrd, directory / "initrd")
        shutil.copy(SCRIPT, directory / SCRIPT.name)
        given = {
            "settings": settings,
            "machines": machines,
            "kernel": str(kernel),
            "initrd": str(directory / "initrd"),
            "append": kernel_arguments("tcg"),
        }
        subprocess.run(["chmod", "-R", "a+rX", directory], check=True)
        run = directory / "run"
        run.mkdir()
        self.run = run
        command = [PYTHON, str(directory / SCRIPT.name), str(run), json.dumps(given)]
        if os.geteuid() == 0:
            os.chown(run, NOBODY, NOBODY)
            command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *command]
            command = ["ip", "netns", "exec", within, *command] if within else ["unshare", "--net", *command]
        else:
            command = ["unshare", "--user", "--map-current-user", "--net", *command]
        self.process = subprocess.Popen(
            command,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(sources), "HOME": "/"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the script ended"
        self.switch_pid = int(line)

    def guest(self, name: str) -> Guest:
        return Guest(self.run, name)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait()
