"""The documents that virt-install writes for our own daemon's capabilities become machines that a real QEMU takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvikd_process import Kvikd

from kvik.conf.domain import Domain, parse_domain
from kvik.conf.machine import MachineDefaults
from kvik.conf.postparse import postparse
from kvik.conf.validate import validate
from kvik.hypervisor.driver import HostVerdict, StartRequest
from kvik.hypervisor.qemu.driver import QemuDriver
from kvik.paths import Paths

pytestmark = [
    pytest.mark.functional,
    pytest.mark.skipif(shutil.which("virt-install") is None, reason="needs virt-install (apt install virtinst)"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64"),
]
# What a person adds; each OS brings its own buses, controllers, clock and features.
VARIANTS = {
    "cd": ["--cdrom", "{iso}"],
    "i440fx": ["--import", "--machine", "pc", "--graphics", "vnc"],
    "uefi": ["--import", "--boot", "uefi", "--graphics", "spice", "--sound", "default"],
    "devices": [
        *("--import", "--memorybacking", "source.type=memfd,access.mode=shared", "--watchdog", "default"),
        *("--rng", "/dev/urandom", "--video", "virtio", "--channel", "spicevmc", "--redirdev", "usb,type=spicevmc"),
    ],
}
SYSTEMS = ["debian11", "win10", "fedora36", "generic"]
NEEDS = {"uefi": Path("/usr/share/OVMF")}


@pytest.fixture(scope="module")
def installer() -> Iterator[Kvikd]:
    daemon = Kvikd("--driver", "qemu")
    yield daemon
    daemon.end()


@pytest.fixture
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="kv"))
    yield directory
    shutil.rmtree(directory)


def documents(installer: Kvikd, place: Path, system: str, options: list[str]) -> list[str]:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(place / "d.qcow2"), "1G"], check=True)
    (place / "cd.iso").write_bytes(bytes(1 << 20))
    done = subprocess.run(
        [
            *("virt-install", "--connect", installer.uri, "--name", "made", "--memory", "512", "--vcpus", "2"),
            *("--network", "user", "--osinfo", system, "--disk", str(place / "d.qcow2"), "--print-xml"),
            *(word.format(iso=place / "cd.iso") for word in options),
        ],
        env={**os.environ, "HOME": str(place)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # From a CD it prints two: for the installation and for afterwards.
    return [text + "</domain>" for text in done.stdout.split("</domain>")[:-1]]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("system", SYSTEMS)
async def test_qemu_takes_what_virt_install_writes(installer: Kvikd, place: Path, system: str, variant: str) -> None:
    if variant in NEEDS and not NEEDS[variant].exists():
        pytest.skip(f"needs {NEEDS[variant]} (apt install ovmf)")
    driver = QemuDriver(Paths.system(place / "root"), lambda: HostVerdict(False, "the tests use software emulation"))
    made = documents(installer, place, system, VARIANTS[variant])
    assert len(made) == (2 if variant == "cd" else 1)
    for xml in made:
        await start_and_quit(driver, parse_domain(xml), place)


async def start_and_quit(driver: QemuDriver, domain: Domain, place: Path) -> None:
    assert domain.warnings() == []
    domain.type = "qemu"
    await driver.complete(domain)
    postparse(domain, MachineDefaults())
    validate(domain)
    assert await driver.native(domain)
    directory = place / "run"
    directory.mkdir(mode=0o700, exist_ok=True)
    log = os.open(place / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        machine = await driver.start(StartRequest(domain, directory, log, paused=True))
        await machine.quit()
    finally:
        os.close(log)
