"""The tiny image, made from real packages and booted by a real QEMU under software emulation."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.guest.tiny import TinyImage, build_tiny, cached_tiny, kernel_arguments
from kvik.image.kernel import uncompressed_kernel
from kvik.paths import Paths

pytestmark = [
    pytest.mark.functional,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt: the image is made from Debian packages"),
]
DEADLINE = 60.0  # seconds; two to three is usual, a loaded machine may need many times that


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return Paths.system(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def image(paths: Paths) -> TinyImage:
    stages: list[tuple[str, int, int]] = []
    image = build_tiny(paths, lambda stage, done, total: stages.append((stage, done, total)))
    assert stages[-1] == ("image", 3, 3)
    assert any(stage == "packages" and done == total > 10_000_000 for stage, done, total in stages)
    assert cached_tiny(paths) is not None
    return image


class Guest:
    """A running QEMU with the agent's channel and the serial console, spoken to directly."""

    def __init__(
        self,
        image: TinyImage,
        paths: Paths,
        directory: Path,
        netdev: str = "user,id=net",
        pass_fds: tuple[int, ...] = (),
        *,
        mac: str = "52:54:00:12:34:56",
    ) -> None:
        kernel = uncompressed_kernel(image.kernel, paths.cache / "kernels")
        assert kernel is not None, "Debian's cloud kernel has a PVH entry"
        self.console = directory / "console"
        agent, qmp = directory / "agent", directory / "qmp"
        self.process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256", "-display", "none"),
                *("-nodefaults", "-no-user-config", "-bios", "qboot.rom", "-kernel", str(kernel)),
                *("-initrd", str(image.initrd), "-append", kernel_arguments("tcg", hostname="tested")),
                *("-chardev", f"socket,id=agent,path={agent},server=on,wait=off", "-device", "virtio-serial-pci"),
                *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
                *("-netdev", netdev, "-device", f"virtio-net-pci,netdev=net,romfile=,mac={mac}"),
                *("-device", "virtio-rng-pci", "-serial", f"file:{self.console}"),
                *("-qmp", f"unix:{qmp},server=on,wait=off"),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=pass_fds,
        )
        try:
            self.agent, self.qmp = self._connect(agent), self._connect(qmp)
            self.qmp.readline()
            self.execute(self.qmp, "qmp_capabilities")
            self.execute(self.agent, "guest-sync", id=1)
        except BaseException:
            self.close()
            raise

    def _connect(self, path: Path) -> Any:
        deadline = time.monotonic() + DEADLINE
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(path))
            except OSError:
                connection.close()
                assert time.monotonic() < deadline and self.process.poll() is None
                time.sleep(0.02)
            else:
                connection.settimeout(DEADLINE)
                return connection.makefile("rwb")

    def execute(self, channel: Any, command: str, **arguments: object) -> Any:
        channel.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        channel.flush()
        while "return" not in (reply := json.loads(channel.readline())):
            assert "error" not in reply, reply
        return reply["return"]

    def shell(self, script: str) -> str:
        pid = self.execute(self.agent, "guest-exec", path="/bin/sh", arg=["-c", script], **{"capture-output": True})[
            "pid"
        ]
        while not (status := self.execute(self.agent, "guest-exec-status", pid=pid))["exited"]:
            time.sleep(0.05)
        return base64.b64decode(status.get("out-data", "")).decode()

    def eventually(self, script: str, wanted: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while wanted not in (text := self.shell(script)):
            assert time.monotonic() < deadline, text
            time.sleep(0.1)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def guest(image: TinyImage, paths: Paths, tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(image, paths, tmp_path)
    yield guest
    guest.close()


def test_it_gets_an_address_a_name_and_a_login(guest: Guest) -> None:
    guest.eventually("ip -4 addr show eth0", "10.0.2.15/24")
    guest.eventually("cat /etc/resolv.conf", "nameserver 10.0.2.3")
    assert "default via 10.0.2.2" in guest.shell("ip route")
    assert guest.shell("hostname").strip() == "tested"
    guest.eventually("ps", "/bin/sh -l")
    deadline = time.monotonic() + DEADLINE
    while b"root" not in guest.console.read_bytes() and b"# " not in guest.console.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # Drivers for the devices nobody waits for come too.
    guest.eventually("lsmod", "virtio_rng")
    assert "no such" not in guest.shell("ls /dev/pts /dev/shm 2>&1").lower()


def test_the_power_button_switches_it_off(guest: Guest) -> None:
    guest.eventually("ps", "acpid")
    guest.execute(guest.qmp, "system_powerdown")
    assert guest.process.wait(DEADLINE) == 0


def test_the_agent_switches_it_off(guest: Guest) -> None:
    guest.agent.write(b'{"execute": "guest-shutdown"}\n')  # has no reply when it works
    guest.agent.flush()
    assert guest.process.wait(DEADLINE) == 0


def test_the_agent_reboots_it(guest: Guest) -> None:
    guest.shell("touch /root/before")
    guest.agent.write(b'{"execute": "guest-shutdown", "arguments": {"mode": "reboot"}}\n')
    guest.agent.flush()
    while json.loads(guest.qmp.readline()).get("event") != "RESET":
        pass
    guest.execute(guest.agent, "guest-sync", id=2)
    assert guest.shell("ls /root") == ""  # a new system, all in memory
