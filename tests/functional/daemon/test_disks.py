"""Disks of every kind on a real QEMU: each bus, volumes of pools, servers on the network; and what breaks."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from .conftest import Kvikd, Make, until
from .test_block_jobs import disk, image, images_of, nodes, ok, run

pytestmark = pytest.mark.root


@pytest.fixture
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="kvdisk"))
    yield directory
    shutil.rmtree(directory)


def drive(path: Path | str, target: str, bus: str, device: str = "disk", more: str = "") -> str:
    source = f"<source file='{path}'/>" if path else ""
    return (
        f"<disk type='file' device='{device}'><driver name='qemu' type='raw'/>{source}"
        f"<target dev='{target}' bus='{bus}'/>{more}</disk>"
    )


@pytest.fixture
def served(place: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A qemu-nbd on a Unix socket, with one export."""
    (place / "export.raw").write_bytes(bytes(1 << 20))
    socket = place / "nbd.sock"
    words = ["qemu-nbd", "-f", "raw", "-t", "-e", "4", "-x", "data", "-k", str(socket), str(place / "export.raw")]
    process = subprocess.Popen(words)
    until(socket.exists)
    try:
        yield socket, process
    finally:
        process.kill()
        process.wait()


def test_one_machine_with_every_bus(
    kvikd: Kvikd, make: Make, place: Path, served: tuple[Path, subprocess.Popen[bytes]]
) -> None:
    for number, name in enumerate(("virtio", "scsi", "sata", "usb", "ro", "shared", "cd", "cd2", "fd")):
        (place / name).write_bytes(bytes([number]) * (1440 * 1024))
    driver = "<driver name='qemu' type='raw' cache='none' io='native' discard='unmap' detect_zeroes='unmap' queues='2' "
    nbd = (
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/>"
        f"<source protocol='nbd' name='data'><host transport='unix' socket='{served[0]}'/></source>"
        "<target dev='vdd' bus='virtio'/></disk>"
    )
    devices = (
        drive(place / "virtio", "vda", "virtio", more="<boot order='1'/><serial>serial-1</serial>").replace(
            "<driver name='qemu' type='raw'/>", driver + "iothread='1'/>"
        )
        + drive(place / "ro", "vdb", "virtio", more="<readonly/>")
        + drive(place / "shared", "vdc", "virtio", more="<shareable/>")
        + nbd
        + drive(place / "scsi", "sda", "scsi", more="<wwn>5000c50015ea71ac</wwn><vendor>KVIK</vendor>")
        + drive(place / "sata", "sdb", "sata", more="<serial>s2</serial><wwn>5000c50015ea71ad</wwn>")
        + drive(place / "usb", "sdc", "usb")
        + drive(place / "cd", "sdd", "sata", "cdrom", "<readonly/>")
        + drive(place / "fd", "fda", "fdc", "floppy")
        + "<controller type='scsi' model='virtio-scsi'/><controller type='usb' model='qemu-xhci'/>"
    )
    domain = make("buses", devices, kernel=False, extra="<iothreads>1</iothreads>")
    domain.start()
    told = json.loads(ok(kvikd, "qemu-monitor-command", "buses", '{"execute": "query-block"}'))["return"]
    by_alias = {item["qdev"].split("/")[3] if "/peripheral/" in item["qdev"] else item["qdev"]: item for item in told}
    aliases = {
        "virtio-disk0",
        "virtio-disk1",
        "virtio-disk2",
        "virtio-disk3",
        "scsi0-0-0-0",
        "sata0-0-1",
        "sata0-0-3",
        "usb-disk2",
    }
    assert aliases <= {name.split("/")[0] for name in by_alias}, sorted(by_alias)
    assert by_alias["virtio-disk1"]["inserted"]["ro"] and not by_alias["virtio-disk0"]["inserted"]["ro"]
    assert by_alias["virtio-disk0"]["inserted"]["cache"]["direct"]
    assert by_alias["virtio-disk0"]["inserted"]["detect_zeroes"] == "unmap"
    rows = [line.split() for line in ok(kvikd, "domblklist", "buses", "--details").splitlines()[2:] if line.strip()]
    assert [(row[0], row[1], row[2], Path(row[3]).name) for row in rows] == [
        ("file", "disk", "vda", "virtio"), ("file", "disk", "vdb", "ro"), ("file", "disk", "vdc", "shared"),
        ("network", "disk", "vdd", "data"), ("file", "disk", "sda", "scsi"), ("file", "disk", "sdb", "sata"),
        ("file", "disk", "sdc", "usb"), ("file", "cdrom", "sdd", "cd"), ("file", "floppy", "fda", "fd"),
    ]  # fmt: skip
    # Words and figures are virsh's own.
    for words in (
        ("domblklist", "buses", "--details"), ("domblkinfo", "buses", "sda"), ("domblkinfo", "buses", "--all"),
        ("domblkinfo", "buses", "vdb", "--human"), ("domblkerror", "buses"), ("domblkstat", "buses", "vdb"),
        ("domblkstat", "buses", "vdb", "--human"), ("blockjob", "buses", "vda"),
    ):  # fmt: skip
        assert ok(kvikd, *words) == kvikd.virsh(*words).stdout, words
    # Media change, empty, and full again; the definition apart.
    ok(kvikd, "change-media", "buses", "sdd", "--eject", "--live")
    assert "cd\n" in ok(kvikd, "domblklist", "buses", "--inactive")
    assert ["sdd", "-"] in [line.split() for line in ok(kvikd, "domblklist", "buses").splitlines()]
    ok(kvikd, "change-media", "buses", "sdd", str(place / "cd2"), "--insert", "--live", "--config")
    ok(kvikd, "change-media", "buses", "sdd", str(place / "cd"), "--update", "--live")
    live, kept = ok(kvikd, "domblklist", "buses"), ok(kvikd, "domblklist", "buses", "--inactive")
    assert f"{place}/cd\n" in live and f"{place}/cd2\n" in kept
    done = kvikd.kvik("detach-disk", "buses", "sdb", "--live")
    assert done.returncode and "disks on bus sata cannot be unplugged from a running machine" in done.stderr
    # A shared disk is shared, another is not.
    other = make("second", disk(place / "scsi", "vda", "raw"), kernel=False)
    refused = kvikd.kvik("start", "second")
    assert refused.returncode and f"{place}/scsi is in use by machine 'buses'" in refused.stderr
    other.undefine()
    make("third", drive(place / "shared", "vda", "virtio", more="<shareable/>"), kernel=False).start()
    # The server goes: what the guest reads then fails, and nothing else does.
    served[1].kill()
    served[1].wait()
    done = kvikd.kvik("blockcopy", "buses", "vdd", "--dest", str(place / "copy"), "--wait")
    assert done.returncode and "Copy failed" in done.stderr and not (place / "copy").exists()
    assert "Input/output error" in (kvikd.root / "var/log/kvik/qemu/buses.log").read_text()
    assert ok(kvikd, "domstate", "buses").strip() == "running"


def test_volumes_of_pools(kvikd: Kvikd, make: Make, place: Path) -> None:
    ok(kvikd, "pool-create-as", "p1", "dir", "--target", str(place))
    ok(kvikd, "vol-create-as", "p1", "v.qcow2", "4M", "--format", "qcow2")
    (place / "hot.raw").write_bytes(bytes(1 << 20))
    ok(kvikd, "pool-refresh", "p1")
    volume = (
        "<disk type='volume' device='disk'><driver name='qemu' type='{}'/><source pool='p1' volume='{}'/>"
        "<target dev='{}' bus='virtio'/></disk>"
    )
    domain = make("volumes", volume.format("qcow2", "v.qcow2", "vda"), kernel=False)
    domain.start()
    (place / "d.xml").write_text(volume.format("raw", "hot.raw", "vdb"))
    ok(kvikd, "attach-device", "volumes", str(place / "d.xml"), "--live")
    for _ in ("before", "after the daemon's death"):
        live = ElementTree.fromstring(ok(kvikd, "dumpxml", "volumes")).findall("./devices/disk")
        assert [item.get("type") for item in live] == ["volume", "volume"]
        sources = [item.find("source") for item in live]
        assert [item.attrib for item in sources if item is not None] == [
            {"pool": "p1", "volume": "v.qcow2", "index": "1"},
            {"pool": "p1", "volume": "hot.raw", "index": "2"},
        ]
        kvikd.end(9)
        kvikd.start()
    assert "running from it" in kvikd.kvik("vol-delete", "v.qcow2", "p1").stderr
    # It moves out of the pool, and the definition says so.
    ok(kvikd, "blockcopy", "volumes", "vda", str(place / "out.qcow2"), "--pivot")
    assert images_of(kvikd, "volumes", "--inactive") == ["out.qcow2"]
    ok(kvikd, "destroy", domain.name)
    ok(kvikd, "pool-destroy", "p1")
    make("none", volume.format("raw", "hot.raw", "vda"), kernel=False)
    assert "no storage pool" in kvikd.kvik("start", "none").stderr.lower()


def test_a_copy_without_room_leaves_the_machine_as_it_was(kvikd: Kvikd, make: Make, place: Path) -> None:
    source = image(place / "full.qcow2", "77")
    small = place / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small))
    try:
        domain = make("roomless", disk(source), kernel=False)
        domain.start()
        done = kvikd.kvik("blockcopy", "roomless", "vda", str(small / "copy.qcow2"), "--wait")
        assert done.returncode and "Copy failed" in done.stderr, (done.stdout, done.stderr)
        assert images_of(kvikd, "roomless") == ["full.qcow2"] and not list(small.iterdir())
        assert len(nodes(domain, kvikd)) == 2 and ok(kvikd, "domstate", "roomless").strip() == "running"
        assert "mirror" not in ok(kvikd, "dumpxml", "roomless")
        log = (kvikd.root / "var/log/kvik/qemu/roomless.log").read_text()
        assert "failed: No space left on device" in log
    finally:
        domain.destroy()
        run("umount", str(small))


def test_a_chain_with_a_hole_names_it(kvikd: Kvikd, make: Make, place: Path) -> None:
    base = image(place / "base.qcow2")
    top = image(place / "top.qcow2", below=base)
    domain = make("holed", disk(top), kernel=False)
    base.unlink()
    refused = kvikd.kvik("start", "holed")
    assert refused.returncode and f"disk vda: {top} sits on {base}" in refused.stderr
    assert "No such file" in refused.stderr
    image(base)
    domain.start()
    # Nobody else writes to what lies below, and none of it is written to while others read it.
    make("writer", disk(base), kernel=False)
    assert "is in use by machine 'holed'" in kvikd.kvik("start", "writer").stderr
    make("reader", disk(image(place / "other.qcow2", below=base)), kernel=False).start()
    refused = kvikd.kvik("blockcommit", "holed", "vda", "--active", "--pivot")
    assert f"{base} is in use by machine 'reader'" in refused.stderr
    domain.destroy()
    top.unlink()
    assert f"{top}: No such file" in kvikd.kvik("start", "holed").stderr
