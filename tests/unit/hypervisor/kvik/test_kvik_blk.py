"""Which disks kvik-blk serves, and its command line."""

from __future__ import annotations

import sys

import pytest

from kvik.conf.aliases import assign_aliases
from kvik.conf.devices.disk import Disk, IoTune
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.sidecars import kvik_blk, storage_daemon
from kvik.vmm.blk.main import Options
from unit.hypervisor.kvik.test_argv import DATA, complete

FDS = {"disk:virtio-disk0:0": 20, "disk:virtio-disk0:1": 21}


@pytest.fixture
async def disk() -> Disk:
    """qcow2 on raw, with everything said that kvik-blk takes."""
    text = (DATA / "other-formats.xml").read_text().replace("type='vmdk'", "type='raw'")
    domain = await complete(text.replace(" detect_zeroes='unmap'", ""))
    assign_aliases(domain)
    return domain.devices.disks[0]


def options(disk: Disk) -> Options:
    command = kvik_blk.blk_command(disk, FDS, life=30, monitor=31, export=32, redo=33, queues=3)
    assert set(command.fds) == {20, 21, 30, 31, 32, 33}
    assert list(command.argv[:3]) == [sys.executable, "-I", "-S"]
    start = next(number for number, word in enumerate(command.argv) if word.endswith("/vmm/blk/__main__.py"))
    return Options(list(command.argv[start + 1 :]))


async def test_the_whole_chain_and_nothing_by_name(disk: Disk) -> None:
    assert storage_daemon.kind_of(disk) == kvik_blk.KIND
    found = options(disk)
    assert found.images == [(20, "qcow2"), (21, "raw")]
    assert found.numbers == {
        **{"socket": 32, "monitor": 31, "life": 30, "redo": 33, "queues": 3},
        **{"queue-size": 256, "block-size": 0},
    }
    assert (found.texts["id"], found.texts["cache"]) == ("virtio-disk0", "none")
    assert not found.flags


async def test_what_a_document_says_of_the_device(disk: Disk) -> None:
    assert disk.driver is not None
    disk.serial, disk.readonly = "one", True
    disk.driver.queue_size, disk.driver.discard, disk.driver.cache = 128, "ignore", "default"
    found = options(disk)
    assert (found.texts["serial"], found.numbers["queue-size"], found.texts["cache"]) == ("one", 128, "writeback")
    assert found.flags == {"read-only", "no-discard"}
    disk.shareable = True
    assert "no-lock" not in options(disk).flags  # qcow2 has one writer, whoever says that it is shared
    disk.driver.type = "raw"
    assert "no-lock" in options(disk).flags


async def test_what_it_has_not_is_the_other_programs(disk: Disk) -> None:
    assert disk.driver is not None and disk.backing_store is not None and disk.backing_store.format is not None
    assert kvik_blk.serves(disk)
    disk.backing_store.format.type = "vmdk"
    assert storage_daemon.kind_of(disk) == storage_daemon.KIND
    disk.backing_store.format.type = "qcow2"
    disk.driver.detect_zeroes = "unmap"
    assert storage_daemon.kind_of(disk) == storage_daemon.KIND
    disk.driver.detect_zeroes = "off"
    disk.iotune = IoTune(size_iops_sec=4096)
    assert storage_daemon.kind_of(disk) == storage_daemon.KIND
    disk.driver.name = kvik_blk.KIND
    with pytest.raises(ConfigUnsupported, match="kvik-blk reads raw and qcow2"):
        storage_daemon.kind_of(disk)
    disk.iotune = None
    assert storage_daemon.kind_of(disk) == kvik_blk.KIND
    disk.driver.name = storage_daemon.KIND  # on request
    assert storage_daemon.kind_of(disk) == storage_daemon.KIND


async def test_limits_of_reads_and_writes_apart(disk: Disk) -> None:
    found = kvik_blk.throttle(disk, IoTune(read_bytes_sec=5, read_bytes_sec_max=9, write_iops_sec=7))
    assert found == {
        **{"id": "virtio-disk0", "bps": 0, "bps_rd": 5, "bps_rd_max": 9, "bps_wr": 0},
        **{"iops": 0, "iops_rd": 0, "iops_wr": 7},
    }
    assert set(kvik_blk.throttle(disk, None).values()) == {"virtio-disk0", 0}
