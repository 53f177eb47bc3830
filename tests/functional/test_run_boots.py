"""`kvik run` with what the user has: a disk, a CD, UEFI firmware. The whole way: command, daemon, QEMU, guest."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvik
from kvik.hypervisor.firmware import installed_firmware

sys.path.insert(0, str(Path(__file__).parent / "qemu"))
from test_boot import boot_code

pytestmark = [
    pytest.mark.functional,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
]
DEADLINE = 60.0
TINY = ("--network", "none", "--detach")


class Host:
    """A daemon of its own, started by the first command, under a root of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        source = str(Path(kvik.__file__).parent.parent)
        self.environ = {**os.environ, "KVIK_ROOT": str(root), "PYTHONPATH": source}
        self.environ.pop("KVIK_URI", None)

    def kvik(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "kvik.cli.main", "-c", "kvik:///system", *words],
            env=self.environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr + done.stdout
        return done

    def serial(self, name: str, *words: str) -> str:
        """The first of `words` on the machine's serial line."""
        log = self.root / f"var/log/kvik/qemu/{name}-serial.log"
        end = time.monotonic() + DEADLINE
        text = ""
        while time.monotonic() < end:
            text = log.read_text("latin-1") if log.exists() else ""
            found = [word for word in words if word in text]
            if found:
                return found[0]
            time.sleep(0.05)
        raise AssertionError(f"none of {words} in {text!r}")

    def end(self) -> None:
        for name in self.kvik("list", "--name", check=False).stdout.split():
            self.kvik("destroy", name, check=False)
        pid = self.root / "run/kvik/kvikd.pid"
        if pid.exists():
            number = int(pid.read_text())
            os.kill(number, signal.SIGTERM)
            end = time.monotonic() + 10
            while pid.exists() and time.monotonic() < end:
                time.sleep(0.02)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    root = Path(tempfile.mkdtemp(prefix="kr"))
    host = Host(root)
    yield host
    host.end()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(boot_code("BOOTED FROM DISK").ljust(1 << 20, b"\0"))
    return path


def test_run_boots_a_disk(host: Host, disk: Path) -> None:
    host.kvik("run", "--disk", str(disk), "--name", "d", "--memory", "64M", *TINY)
    host.serial("d", "BOOTED FROM DISK")
    host.kvik("destroy", "d")
    host.kvik("undefine", "d")


@pytest.mark.skipif(shutil.which("xorriso") is None, reason="needs xorriso (apt install xorriso)")
def test_run_boots_a_cd_before_the_disk(host: Host, disk: Path, tmp_path: Path) -> None:
    tree, iso = tmp_path / "tree", tmp_path / "cd.iso"
    tree.mkdir()
    (tree / "boot.bin").write_bytes(boot_code("BOOTED FROM CD").ljust(2048, b"\0"))
    options = ["-o", str(iso), "-b", "boot.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", str(tree)]
    subprocess.run(["xorriso", "-as", "mkisofs", *options], check=True, capture_output=True)
    host.kvik("run", "--disk", str(disk), "--cdrom", str(iso), "--name", "c", "--memory", "64M", *TINY)
    assert host.serial("c", "BOOTED FROM CD", "BOOTED FROM DISK") == "BOOTED FROM CD"
    host.kvik("destroy", "c")
    host.kvik("undefine", "c")


@pytest.mark.skipif(
    not any(item.fits("x86_64", "pc-q35-7.2", False) for item in installed_firmware()),
    reason="needs UEFI firmware (apt install ovmf)",
)
def test_run_with_uefi_firmware_and_what_becomes_of_its_variables(host: Host, disk: Path) -> None:
    variables = host.root / "var/lib/kvik/qemu/nvram/u_VARS.fd"
    run = ("run", "--firmware", "uefi", "--disk", str(disk), "--name", "u", "--memory", "256M", *TINY)
    host.kvik(*run)
    host.serial("u", "BdsDxe", "UEFI Interactive Shell")
    assert stat.S_IMODE(variables.stat().st_mode) == 0o600
    host.kvik("destroy", "u")
    refused = host.kvik("undefine", "u", check=False)
    assert refused.returncode != 0 and "--nvram" in refused.stderr
    host.kvik("undefine", "u", "--keep-nvram")
    inode = variables.stat().st_ino
    host.kvik(*run)
    assert variables.stat().st_ino == inode
    host.kvik("destroy", "u")
    host.kvik("undefine", "u", "--nvram")
    assert not variables.exists()
