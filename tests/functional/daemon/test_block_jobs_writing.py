"""Block jobs while the guest writes: whatever its disk is copied to or merged into, not one write is lost or late.

A guest of one boot sector writes numbers in their order (`writing_guest`); an image is right if it holds all of them up
to some last one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvik.host.process import find_program

from .conftest import Kvikd, Make, until
from .test_block_jobs import disk, ok, run
from .writing_guest import SIZE, last_number, make_disk

needs_loop = pytest.mark.skipif(
    os.getuid() != 0 or not Path("/dev/loop-control").exists() or find_program("losetup") is None,
    reason="needs root and loop devices",
)


@pytest.fixture
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="kvblw"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def loop(place: Path) -> Iterator[str]:
    (place / "device").write_bytes(bytes(SIZE))
    device = run("losetup", "--find", "--show", str(place / "device")).strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=False, timeout=30)


@pytest.fixture
def served(place: Path) -> Iterator[Path]:
    """A place on the network: qemu-nbd on a Unix socket, with one export."""
    (place / "export").write_bytes(bytes(SIZE))
    socket = place / "nbd"
    words = ["qemu-nbd", "-f", "raw", "-t", "-e", "4", "-x", "data", "-k", str(socket), str(place / "export")]
    process = subprocess.Popen(words)
    until(socket.exists)
    try:
        yield socket
    finally:
        process.kill()
        process.wait()


class Writer:
    """The machine `w`, whose guest writes."""

    def __init__(self, kvikd: Kvikd, place: Path) -> None:
        self.kvikd, self.place = kvikd, place
        self.seen = 0

    @property
    def domain(self) -> Any:
        return self.kvikd.connection.lookup_name("w")

    def written(self) -> int:
        """Requests so far."""
        return int(self.kvikd.connection.call("DOMAIN_BLOCK_STATS", self.domain.ref, "vda")[2])

    def moves_on(self) -> None:
        """It has written since the last look, and goes on."""
        before = self.written()
        until(lambda: self.written() > before + 50)

    def holds(self, path: Path | str, kind: str = "raw", *, current: bool = True) -> int:
        """Which number is the last one on an image; of the `current` one while the guest stands still."""
        self.domain.suspend()
        out = self.place / "plain"
        run("qemu-img", "convert", "-U", "-f", kind, "-O", "raw", str(path), str(out))
        last = last_number(out.read_bytes())
        self.domain.resume()
        assert last > self.seen if current else last >= self.seen
        self.seen = max(last, self.seen)
        return last

    def source(self, *options: str) -> ElementTree.Element:
        found = ElementTree.fromstring(ok(self.kvikd, "dumpxml", "w", *options)).find("./devices/disk/source")
        assert found is not None
        return found


def test_the_numbers_are_checked() -> None:
    from .writing_guest import FIRST, SECTOR, SECTORS, STEP

    data = bytearray(SIZE)
    for number in range(1, SECTORS + 100):
        at = (FIRST + number * STEP % SECTORS) * SECTOR
        data[at : at + SECTOR] = number.to_bytes(4, "little") * 128
    assert last_number(bytes(data)) == SECTORS + 99
    lost = (FIRST + 500 * STEP % SECTORS) * SECTOR
    for wrong in ((499).to_bytes(4, "little") * 128, (500).to_bytes(4, "little") * 127 + bytes(4)):
        with pytest.raises(AssertionError):
            last_number(bytes(data[:lost]) + wrong + bytes(data[lost + SECTOR :]))


@needs_loop
def test_a_disk_moves_from_place_to_place_while_its_guest_writes(
    kvikd: Kvikd, make: Make, place: Path, loop: str, served: Path
) -> None:
    first = make_disk(place / "first")
    make("w", disk(first, kind="raw"), kernel=False).start()
    writer = Writer(kvikd, place)
    writer.moves_on()
    # To a block device, by its path and by a document; then on over the network, and back into a file.
    fine = ("--granularity", "4096", "--buf-size", "1048576", "--bytes", "--bandwidth", "64M")
    ok(kvikd, "blockcopy", "w", "vda", "--dest", loop, "--blockdev", "--format", "raw", "--pivot", "--wait", *fine)
    assert writer.source().attrib["dev"] == writer.source("--inactive").attrib["dev"] == loop
    left = writer.holds(first)
    writer.moves_on()
    assert writer.holds(loop) > left
    nbd = f"<source protocol='nbd' name='data'><host transport='unix' socket='{served}'/></source>"
    document = place / "nbd.xml"
    document.write_text(f"<disk type='network'><driver type='raw'/>{nbd}</disk>")
    ok(kvikd, "blockcopy", "w", "vda", "--xml", str(document), "--synchronous-writes", "--wait", "--pivot")
    assert writer.source().attrib["protocol"] == writer.source("--inactive").attrib["protocol"] == "nbd"
    writer.moves_on()
    writer.holds(place / "export")
    back = make_disk(place / "back.img")
    ok(kvikd, "blockcopy", "w", "vda", "--dest", str(back), "--reuse-external", "--format", "raw", "--pivot")
    writer.moves_on()
    # A copy that is told to be the one of that moment, while the guest goes on
    kept = place / "kept.qcow2"
    ok(kvikd, "blockcopy", "w", "vda", "--dest", str(kept), "--format", "qcow2", "--finish")
    writer.moves_on()
    then = writer.holds(kept, "qcow2", current=False)
    assert writer.holds(back) > then


def test_images_are_merged_while_their_guest_writes(kvikd: Kvikd, make: Make, place: Path) -> None:
    first = make_disk(place / "first.img")
    make("w", disk(first, kind="raw"), kernel=False).start()
    writer = Writer(kvikd, place)
    for name in ("s1", "s2", "s3"):
        writer.moves_on()
        ok(kvikd, "snapshot-create-as", "w", name, "--disk-only", "--no-metadata")
    writer.moves_on()
    ok(kvikd, "blockcommit", "w", "vda", "--top", str(place / "first.s2"), "--shallow", "--wait", "--delete")
    writer.holds(place / "first.s3", "qcow2")
    ok(kvikd, "blockcopy", "w", "vda", "--dest", str(place / "top.qcow2"), "--shallow", "--wait", "--pivot")
    writer.moves_on()
    writer.holds(place / "top.qcow2", "qcow2")
    ok(kvikd, "blockcommit", "w", "vda", "--active", "--shallow", "--pivot")
    writer.moves_on()
    writer.holds(place / "first.s1", "qcow2")
    ok(kvikd, "blockpull", "w", "vda", "--wait")
    writer.holds(place / "first.s1", "qcow2")
    told = run("qemu-img", "info", "-U", str(place / "first.s1"))
    assert "backing file" not in told
    assert not (place / "first.s2").exists()


@needs_loop
def test_what_goes_wrong_is_said_and_taken_back(kvikd: Kvikd, make: Make, place: Path, loop: str, served: Path) -> None:
    block = f"<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='{loop}'/>"
    domain = make("w", f"{block}<target dev='vda' bus='virtio'/></disk>", kernel=False)
    domain.start()
    # A device that has grown, and one that cannot
    os.truncate(place / "device", 2 * SIZE)
    run("losetup", "--set-capacity", loop)
    ok(kvikd, "blockresize", "w", "vda", "--capacity")
    assert str(2 * SIZE) in ok(kvikd, "domblkinfo", "w", "vda")
    assert kvikd.kvik("blockresize", "w", "vda", f"{4 * SIZE}B").stderr
    # A place that is too small
    nbd = f"<source protocol='nbd' name='data'><host transport='unix' socket='{served}'/></source>"
    (place / "nbd.xml").write_text(f"<disk type='network'><driver type='raw'/>{nbd}</disk>")
    refused = kvikd.kvik("blockcopy", "w", "vda", "--xml", str(place / "nbd.xml")).stderr
    assert f"data has {SIZE} bytes, and disk vda has {2 * SIZE}" in refused
    domain.destroy()
    # An image that cannot be read: its one cluster does not unpack.
    plain, bad = place / "plain", place / "bad.qcow2"
    plain.write_bytes(b"some words, again and again. " * 8192)
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(plain), str(bad))
    with bad.open("r+b") as file:
        file.seek(0x50000)  # behind the tables: where qemu-img puts the first cluster
        file.write(b"\xff" * 64)
    assert subprocess.run(["qemu-io", "-r", "-c", "read 0 64k", str(bad)], capture_output=True, check=False).returncode
    top = place / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(bad), "-F", "qcow2", str(top))
    make("unread", disk(top), kernel=False).start()
    before = ok(kvikd, "dumpxml", "unread")
    done = kvikd.kvik("blockcopy", "unread", "vda", "--dest", str(place / "copy"), "--wait")
    assert done.returncode and "Copy failed" in done.stderr, (done.stdout, done.stderr)
    done = kvikd.kvik("blockpull", "unread", "vda", "--wait")
    assert done.returncode and "Pull failed" in done.stderr, (done.stdout, done.stderr)
    assert "failed: Input/output error" in (kvikd.paths.domain_logs / "unread.log").read_text()
    assert ok(kvikd, "dumpxml", "unread") == before and not (place / "copy").exists()
    assert ok(kvikd, "domstate", "unread").strip() == "running"
