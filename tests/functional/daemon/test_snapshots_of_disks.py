"""Snapshots of disks that are not plain files of their own: volumes of pools, encrypted images."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from .conftest import Kvikd, Make
from .test_block_jobs import images_of, ok, run

VOLUME = (
    "<disk type='volume' device='disk'><driver name='qemu' type='{}'/><source pool='{}' volume='{}'/>"
    "<target dev='vda' bus='virtio'/></disk>"
)
BLOCK = 64 << 10


@pytest.fixture
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="kvsnp"))
    yield directory
    shutil.rmtree(directory)


def guest_writes(domain: Any, pattern: int, block: int = 0) -> None:
    qdev = "/machine/peripheral/virtio-disk0/virtio-backend"
    for command in (f"write -P {pattern} {block * BLOCK} {BLOCK}", "flush"):
        said = domain.monitor_command(f'qemu-io -d {qdev} "{command}"', hmp=True)
        assert not said, said


def reads(path: Path, pattern: int, block: int = 0) -> None:
    told = run("qemu-io", "-r", "-U", "-f", "qcow2", "-c", f"read -P {pattern} {block * BLOCK} {BLOCK}", str(path))
    assert "verification failed" not in told, told


def types_of(kvikd: Kvikd, name: str, *options: str) -> list[str | None]:
    return [disk.get("type") for disk in ElementTree.fromstring(ok(kvikd, "dumpxml", name, *options)).iter("disk")]


def test_a_volume_has_snapshots_and_moves_between_pools(kvikd: Kvikd, make: Make, place: Path) -> None:
    for pool in ("one", "two"):
        (place / pool).mkdir()
        ok(kvikd, "pool-create-as", pool, "dir", "--target", str(place / pool))
    ok(kvikd, "vol-create-as", "one", "disk.qcow2", "1M", "--format", "qcow2")
    domain = make("voluble", VOLUME.format("qcow2", "one", "disk.qcow2"), kernel=False)
    # Off: the new image is a file beside the volume, and a volume itself.
    ok(kvikd, "snapshot-create-as", "voluble", "off")
    assert images_of(kvikd, "voluble") == ["disk.off"] and types_of(kvikd, "voluble") == ["file"]
    assert "disk.off" in ok(kvikd, "vol-list", "one")
    ok(kvikd, "snapshot-delete", "voluble", "off")
    assert images_of(kvikd, "voluble") == ["disk.qcow2"]
    assert "disk.off" not in ok(kvikd, "vol-list", "one")
    # Running: both documents, and nothing goes on being written to what the snapshot is kept in.
    domain.undefine()
    domain = make("voluble", VOLUME.format("qcow2", "one", "disk.qcow2"), kernel=False)
    domain.start()
    guest_writes(domain, 1)
    ok(kvikd, "snapshot-create-as", "voluble", "on", "--disk-only")
    assert images_of(kvikd, "voluble") == ["disk.on", "disk.qcow2"]
    assert images_of(kvikd, "voluble", "--inactive") == ["disk.on"]
    guest_writes(domain, 2)
    domain.destroy()
    domain.start()
    reads(place / "one" / "disk.qcow2", 1)
    reads(place / "one" / "disk.on", 2)
    assert "volume 'disk.on' of pool 'one' is based on it" in kvikd.kvik("vol-delete", "disk.qcow2", "one").stderr
    ok(kvikd, "snapshot-delete", "voluble", "on")
    assert images_of(kvikd, "voluble") == images_of(kvikd, "voluble", "--inactive") == ["disk.qcow2"]
    # To a volume of the other pool, while it runs
    ok(kvikd, "vol-create-as", "two", "moved.qcow2", "1M", "--format", "qcow2")
    (place / "to.xml").write_text(VOLUME.format("qcow2", "two", "moved.qcow2"))
    copy = ("blockcopy", "voluble", "vda", "--xml", str(place / "to.xml"), "--reuse-external", "--pivot", "--verbose")
    assert ok(kvikd, *copy).strip() == "Successfully pivoted"
    for options in ((), ("--inactive",)):
        assert types_of(kvikd, "voluble", *options) == ["volume"]
        assert "pool='two' volume='moved.qcow2'" in ok(kvikd, "dumpxml", "voluble", *options)
    guest_writes(domain, 3, block=1)
    domain.destroy()
    domain.start()
    reads(place / "two" / "moved.qcow2", 2)
    reads(place / "two" / "moved.qcow2", 3, block=1)
    domain.destroy()
    # A stopped pool cannot say where its volumes are.
    ok(kvikd, "pool-destroy", "two")
    assert "kvik pool-start two" in kvikd.kvik("snapshot-create-as", "voluble", "s").stderr
    ok(kvikd, "pool-destroy", "one")
