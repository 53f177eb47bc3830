"""Transient disks of a real QEMU: plugged, taken up by the next daemon, shared, killed."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .conftest import Kvikd, until
from .processes import qemu_of
from .test_block_jobs import image, ok

DISK = (
    "<disk type='file' device='disk'><driver name='qemu' type='{}'/><source file='{}'/>"
    "<target dev='{}' bus='virtio'/><transient{}/></disk>"
)
SHARED = " shareBacking='yes'"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "raw.img"
    path.write_bytes(b"\x11" * (1 << 20))
    return path


def io(kvikd: Kvikd, name: str, alias: str, command: str) -> str:
    """A request as the guest's would be."""
    line = f'qemu-io -d /machine/peripheral/{alias}/virtio-backend "{command}"'
    return ok(kvikd, "qemu-monitor-command", name, "--hmp", line)


def test_what_is_written_is_gone_and_the_image_as_it_was(make: Any, kvikd: Kvikd, raw: Path, tmp_path: Path) -> None:
    base = image(tmp_path / "base.qcow2", "22")
    before = base.read_bytes()
    domain = make("passing", DISK.format("qcow2", base, "vda", ""), kernel=False)
    domain.start()
    domain.attach_device(DISK.format("raw", raw, "vdb", ""), 1)
    for alias, old, size in (("virtio-disk0", "22", "4M"), ("virtio-disk1", "11", "1M")):
        assert "verification failed" not in io(kvikd, "passing", alias, f"read -P 0x{old} 0 {size}")
        io(kvikd, "passing", alias, "write -P 0x77 0 64k")
    # No copy of it is made in any way.
    plan = tmp_path / "backup.xml"
    plan.write_text("<domainbackup><disks><disk name='vda' type='file'/></disks></domainbackup>")
    for words, why in (
        (("checkpoint-create-as", "passing", "c", "--diskspec", "vda"), "transient"),
        (("backup-begin", "passing", str(plan)), "transient"),
        (("save", "passing", str(tmp_path / "saved")), "has a transient disk, vda"),
        (("blockpull", "passing", "vda"), "transient disk 'vda' cannot be copied"),
    ):
        done = kvikd.kvik(*words)
        assert done.returncode and why in done.stderr, (words, done.stderr)
    plan.unlink()
    # Nothing is to be found, and the next daemon knows the disks as they are.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.qcow2", "raw.img"]
    kvikd.end(signal.SIGKILL)
    kvikd.start()
    assert "verification failed" not in io(kvikd, "passing", "virtio-disk1", "read -P 0x77 0 64k")
    assert "<transient/>" in kvikd.virsh("dumpxml", "passing").stdout
    pid = qemu_of(domain)
    held = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    assert sum("(deleted)" in name and str(tmp_path) in name for name in held) == 2, held
    os.kill(pid, signal.SIGKILL)
    until(lambda: "shut off" in kvikd.virsh("domstate", "passing").stdout)
    assert base.read_bytes() == before and raw.read_bytes() == b"\x11" * (1 << 20)
    kvikd.connection.lookup_name("passing").start()
    assert "verification failed" not in io(kvikd, "passing", "virtio-disk0", "read -P 0x22 0 4M")


def test_who_may_use_the_image_beside_it(make: Any, kvikd: Kvikd, raw: Path) -> None:
    make("one", DISK.format("raw", raw, "vda", SHARED), kernel=False).start()
    make("two", DISK.format("raw", raw, "vda", SHARED), kernel=False).start()
    io(kvikd, "one", "virtio-disk0", "write -P 0x33 0 64k")
    assert "verification failed" not in io(kvikd, "two", "virtio-disk0", "read -P 0x11 0 64k")
    make("alone", DISK.format("raw", raw, "vda", ""), kernel=False)
    assert "is in use by machine" in kvikd.kvik("start", "alone").stderr
    # Nobody else writes to it either.
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 512", str(raw)], capture_output=True, text=True, check=False
    )
    assert "lock" in done.stderr + done.stdout
