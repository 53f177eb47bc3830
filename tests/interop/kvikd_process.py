"""A daemon of its own process, with machines in memory, for other people's clients."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kvik

SOURCE = Path(kvik.__file__).parent.parent


class Kvikd:
    """`kvikd --system --root DIR --driver test`, from start to end of a test module."""

    def __init__(self, *options: str) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="kvikd-"))
        self.socket = self.root / "s"
        self.uri = f"qemu+unix:///system?socket={self.socket}"
        self.log = (self.root / "log").open("w+")
        self.environ = {**os.environ, "PYTHONPATH": str(SOURCE)}
        command = [sys.executable, "-m", "kvik.daemon", "--system", "--root", str(self.root), "--socket"]
        self.process = subprocess.Popen(
            [*command, str(self.socket), "--driver", "test", "--log-level", "debug", *options],
            env=self.environ,
            stderr=self.log,
        )
        deadline = time.monotonic() + 15
        while not self.socket.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"kvikd did not start: {(self.root / 'log').read_text()}")
            time.sleep(0.01)

    def messages(self) -> str:
        return (self.root / "log").read_text()

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(15)
        self.log.close()
        shutil.rmtree(self.root, ignore_errors=True)
        return code


def domain_xml(name: str, disk: Path, *, vcpus: int = 4) -> str:
    return f"""<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>256</memory>
  <vcpu current='1'>{vcpus}</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>
    <interface type='user'><mac address='52:54:00:11:22:33'/><model type='virtio'/></interface>
    <serial type='pty'/>
    <console type='pty'/>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <memballoon model='virtio'/>
    <graphics type='vnc'/>
    <video><model type='virtio'/></video>
  </devices>
</domain>
"""
