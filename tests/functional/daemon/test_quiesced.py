"""A real guest with a file system that has not written everything out: what its agent does for a snapshot or a
checkpoint that is to be quiesced, and what is there without."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.client import checkpoint as client
from kvik.errors import KvikError
from kvik.host.process import find_program
from kvik.image.cpio import CpioWriter
from lab.kernel import LabUnavailable, ensure_kernel

from .conftest import AGENT, CONSOLE, DEADLINE, Kvikd, Make, until
from .test_backup import disk, ok, run
from .test_changes import shell

pytestmark = pytest.mark.skipif(
    any(find_program(name) is None for name in ("mke2fs", "dumpe2fs", "debugfs", "qemu-img")),
    reason="needs mke2fs, dumpe2fs, debugfs, qemu-img (apt install e2fsprogs qemu-utils)",
)

# Of the tiny image only the programs: its kernel has no file system that can be frozen, the lab's has.
INIT = """#!/bin/sh
export PATH=/sbin:/bin:/usr/sbin:/usr/bin HOME=/root
mount -a
for module in {modules}; do insmod /modules/$module; done
/etc/rc.agent &
mkdir -p /mnt
mount -t ext4 -o commit=1000 /dev/vda /mnt
echo 0 >/proc/sys/vm/dirty_writeback_centisecs
exec /sbin/init
"""
MODULES = ("virtio_pci", "virtio_console", "virtio_blk", "ext4", "crc32c_generic")
MIB = 1 << 20


@pytest.fixture
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="kvquiet"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def guest(kvikd: Kvikd, make: Make, place: Path) -> Any:
    try:
        kernel = ensure_kernel()
    except LabUnavailable as error:
        pytest.skip(str(error))
    stream = io.BytesIO()
    with CpioWriter(stream) as archive:
        archive.directories(["modules"])
        names = []
        for path in kernel.load_order(MODULES):
            names.append(path.rpartition("/")[2])
            archive.file(f"modules/{names[-1]}", (kernel.modules / path).read_bytes())
        archive.file("init", INIT.format(modules=" ".join(names)).encode(), 0o755)
    tiny = make.image.initrd.read_bytes()
    (place / "initrd").write_bytes(tiny + bytes(-len(tiny) % 512) + stream.getvalue())
    run("mke2fs", "-q", "-t", "ext4", str(place / "raw"), "32M")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(place / "raw"), str(place / "vda.qcow2"))
    (place / "raw").unlink()
    xml = make.xml("quiet", CONSOLE + AGENT + disk(place / "vda.qcow2"))
    xml = re.sub("<kernel>.*</kernel>", f"<kernel>{kernel.image}</kernel>", xml)
    xml = re.sub("<initrd>.*</initrd>", f"<initrd>{place / 'initrd'}</initrd>", xml)
    domain = kvikd.connection.define(xml)
    make.names.append("quiet")
    domain.start()
    found = domain.wait_ready(DEADLINE)
    assert found.ready, found
    assert "/mnt ext4" in shell(domain, "cat /proc/mounts")
    return domain


def kept_in(path: Path, name: str) -> tuple[bool, int]:
    """Whether the file system of an image waits for its journal to be replayed, and the size of a file in it as it is
    without that."""
    raw = path.with_suffix(".raw")
    run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", str(path), str(raw))
    recovery = "needs_recovery" in run("dumpe2fs", "-h", str(raw))
    told = subprocess.run(["debugfs", "-R", f"stat {name}", str(raw)], capture_output=True, text=True, check=True)
    raw.unlink()
    size = re.search(r"Size: (\d+)", told.stdout)
    return recovery, int(size[1]) if size else 0


def changed(domain: Any, name: str) -> int:
    size = re.search(r"size='(\d+)'", client.lookup(domain, name).xml(4).replace('"', "'"))
    assert size is not None
    return int(size[1])


def test_what_the_guest_has_in_memory_is_written_out_before(kvikd: Kvikd, guest: Any, place: Path) -> None:
    write = "dd if=/dev/urandom of=/mnt/{} bs=64k count=32 2>/dev/null"
    # Without: what was written is not on the disk yet, and the file system is as after a loss of power.
    shell(guest, write.format("one"))
    ok(kvikd, "snapshot-create-as", "quiet", "s1", "--disk-only")
    assert kept_in(place / "vda.qcow2", "one") == (True, 0)
    ok(kvikd, "checkpoint-create-as", "quiet", "c1")
    shell(guest, "sync")
    assert changed(guest, "c1") >= 2 * MIB
    # With: all of it is there, and the file system needs nothing. The guest goes on.
    shell(guest, write.format("two"))
    ok(kvikd, "snapshot-create-as", "quiet", "s2", "--disk-only", "--quiesce")
    assert kept_in(place / "vda.s1", "two") == (False, 2 * MIB)
    shell(guest, write.format("three"))
    ok(kvikd, "checkpoint-create-as", "quiet", "c2", "--quiesce")
    shell(guest, "sync")
    assert changed(guest, "c2") < MIB
    assert "quiet" in shell(guest, "echo quiet >/mnt/four && sync && cat /mnt/four")
    # An agent that is gone is missed before anything is done.
    shell(guest, "(sleep 1; killall qemu-ga) >/dev/null 2>&1 &")
    until(lambda: "state='disconnected'" in guest.xml())
    with pytest.raises(KvikError, match="agent"):
        client.create(guest, "<domaincheckpoint><name>c3</name></domaincheckpoint>", 2)
    assert sorted(one.name for one in client.checkpoints(guest)) == ["c1", "c2"]
