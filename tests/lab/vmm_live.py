"""A machine of kvik-vmm that goes on running in the lab, with its console in a file and a QMP socket."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.harness import REPOSITORY, SHARE, Lab
from lab.vmm_guest import BEGIN, initramfs, vmm_command

__all__ = ["Live"]

SETUP = "console=ttyS0 quiet panic=-1 pci=noearly"  # noearly: see vmm_guest
QMP = "/tmp/live.qmp"  # in the lab: a socket cannot lie on its 9p share
SAVED = "/tmp/live.saved"
SAVE = {"execute": "x-kvik-snapshot-save", "arguments": {"directory": f"{SAVED}/one"}}


class Live:
    """`with Live(lab, kernel, script, ...) as live:` ends it at the end. `console` is what the guest printed so far.
    `restored`: the script runs on a machine that was saved where it begins, and restored in another process."""

    def __init__(
        self,
        lab: Lab,
        kernel: Path | str,
        script: str,
        *options: str,
        modules: Sequence[str] = (),
        append: str = "",
        memory: str = "512M",
        files: Mapping[str, bytes] | None = None,
        restored: bool = False,
    ) -> None:
        self.lab = lab
        if restored:
            script = f"usleep 1000000\n{script}"  # saved meanwhile: the timer rings in the other process
        (lab.share / "initrd").write_bytes(initramfs(script, modules, files))
        (lab.share / "console").write_text("")
        command = vmm_command(
            *("--kernel", str(kernel), "--initrd", f"{SHARE}/initrd", "--append", f"{SETUP} {append}".strip()),
            *("--serial", f"file:{SHARE}/console", "--memory", memory, "--qmp", QMP, *options),
        )
        if restored:
            command += ["--snapshots", SAVED]
            lab.sh(f"rm -rf {SAVED}; mkdir {SAVED}")
        self._start(command)
        if restored:
            self.until(BEGIN)
            replies, _ = self.qmp({"execute": "stop"}, SAVE, {"execute": "quit"})
            assert replies == [{}, {}, {}], replies
            lab.sh("while kill -0 $(cat /tmp/live.pid) 2>/dev/null; do sleep 0.1; done")
            self._start([*command, "--restore", f"{SAVED}/one"])
            self.qmp({"execute": "cont"}, event="RESUME")

    def _start(self, command: Sequence[str]) -> None:
        self.lab.sh(f"rm -f {QMP}; {shlex.join(command)} </dev/null >/tmp/live.out 2>&1 & echo $! > /tmp/live.pid")

    def __enter__(self) -> Live:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.lab.sh(
            "p=$(cat /tmp/live.pid); kill -TERM $p || true; "
            "for n in $(seq 100); do kill -0 $p 2>/dev/null || exit 0; sleep 0.1; done; kill -KILL $p"
        )
        if kind is None:
            assert "Traceback" not in self.said, self.said

    @property
    def console(self) -> str:
        return (self.lab.share / "console").read_text(errors="replace").replace("\r", "")

    @property
    def said(self) -> str:
        """What the VMM itself said."""
        return self.lab.sh("cat /tmp/live.out")

    def until(self, pattern: str, seconds: float = 90.0) -> re.Match[str]:
        """Wait until the console has the pattern."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.console, re.DOTALL)) is None:
            alive = self.lab.run(["sh", "-c", "kill -0 $(cat /tmp/live.pid)"]).code == 0
            assert alive and time.monotonic() < end, f"no {pattern!r}:\n{self.console[-3000:]}\n{self.said}"
            time.sleep(0.3)
        return found

    def qmp(
        self, *commands: Mapping[str, Any], event: str = "", seconds: float = 30.0
    ) -> tuple[list[Any], list[dict[str, Any]]]:
        """Replies (`return`, or the whole error) and events, of one connection; waits for `event` if there is one."""
        words = [sys.executable, REPOSITORY / "tests/lab/vmm_qmp.py", QMP, json.dumps(commands)]
        done = self.lab.run([*words, event, str(seconds)], timeout=seconds + 30).check()
        seen = json.loads(done.stdout)
        replies = [item.get("return", item) for item in seen if "event" not in item]
        events = [item for item in seen if "event" in item]
        if event:
            assert any(item["event"] == event for item in events), f"no {event}: {seen}\n{self.console[-2000:]}"
        return replies, events

    def do(self, command: str, /, **arguments: Any) -> Any:
        """One command's reply. Underscores in argument names stand for hyphens."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        replies, _ = self.qmp({"execute": command, "arguments": named} if named else {"execute": command})
        assert not (isinstance(replies[0], dict) and "error" in replies[0]), replies[0]
        return replies[0]
