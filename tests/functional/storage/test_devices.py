"""Pools of types fs and disk on real devices: formatted, mounted, partitioned; and never by chance over other data."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import kvik
from kvik.conf.storage_state import PoolOrigin, PoolState
from kvik.errors import (
    ConfigUnsupported,
    HostError,
    InvalidArgument,
    OperationFailed,
    OperationInvalid,
    ResourceBusy,
    StoragePoolBuilt,
    StorageProbeFailed,
)
from kvik.host.process import find_program
from kvik.paths import Paths
from kvik.storage import mounts, volumes
from kvik.storage.backend import Backend
from kvik.storage.mounts import mounted_at
from kvik.storage.pools import Pools

MIB = 1 << 20
VOLUME = "<volume><name>{}</name><capacity>{}</capacity>{}</volume>"


def fs_pool(device: str, path: Path, kind: str = "ext4", more: str = "") -> str:
    return f"""<pool type='fs' xmlns:fs='http://libvirt.org/schemas/storagepool/fs/1.0'><name>f</name>
    <source><device path='{device}'/><format type='{kind}'/></source><target><path>{path}</path></target>
    {more}</pool>"""


def disk_pool(device: str, label: str) -> str:
    return f"""<pool type='disk'><name>d</name><source><device path='{device}'/><format type='{label}'/></source>
    <target><path>/dev</path></target></pool>"""


def building(**flags: bool) -> Callable[[Backend], None]:
    def build(backend: Backend) -> None:
        backend.build(**flags)

    return build


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
async def test_a_formatted_device_is_mounted_while_its_pool_is_active(
    pools: Pools, loop: Callable[[int], str], tmp_path: Path, kind: str
) -> None:
    if find_program(f"mkfs.{kind}") is None or f"\t{kind}\n" not in Path("/proc/filesystems").read_text():
        pytest.skip(f"mkfs.{kind} is not on this host, or its kernel has no {kind}")
    device, path = loop(320 * MIB if kind == "xfs" else 128 * MIB), tmp_path / "with a space"
    pool = await pools.define(fs_pool(device, path, kind))
    await pool.build(building())  # the directory only
    with pytest.raises(HostError, match=r"mount.* failed"):
        await pool.start()
    await pool.build(building(no_overwrite=True))
    with pytest.raises(StoragePoolBuilt, match=f"already contains {kind}.*forced overwrite is necessary"):
        await pool.build(building(no_overwrite=True))
    await pool.start()
    found = mounted_at(str(path))
    assert found is not None and found.type == kind
    made = await volumes.create(pools, pool, VOLUME.format("v", MIB, ""))
    assert made.path == f"{path}/v"
    with pytest.raises(OperationInvalid, match="still active"):
        await pool.build(building(overwrite=True))
    with (path / "held").open("wb"), pytest.raises(ResourceBusy, match="cannot be unmounted: it is in use"):
        await pool.destroy()
    assert pool.is_active
    await pool.destroy()
    assert mounted_at(str(path)) is None
    await pool.build(building(overwrite=True))
    await pool.start()
    assert [volume.name for volume in pool.volumes() if volume.name == "v"] == []
    await pool.destroy()
    await pool.delete()
    assert not path.exists()


async def test_a_mounted_pool_is_found_again_and_a_device_in_use_is_refused(
    pools: Pools, loop: Callable[[int], str], tmp_path: Path
) -> None:
    device, path = loop(64 * MIB), tmp_path / "m"
    options = "<fs:mount_opts><fs:option name='noatime'/></fs:mount_opts>"
    pool = await pools.create_xml(fs_pool(device, path, "ext4", options), building(overwrite=True))
    assert "noatime" in Path("/proc/self/mountinfo").read_text().split(str(path), 1)[1].split("\n", 1)[0]
    other = Pools(Paths.system(tmp_path / "root"))
    await other.open()  # as the next daemon
    assert not other.warnings and other.lookup_name("f").is_active
    other.close()
    third = Pools(Paths.system(tmp_path / "elsewhere"))
    await third.open()
    again = await third.define(fs_pool(device, tmp_path / "n").replace("<name>f<", "<name>g<"))
    with pytest.raises(ResourceBusy, match="is in use"):
        await again.build(building(overwrite=True))
    await again.build(building())
    with pytest.raises(ResourceBusy, match="is in use"):
        await again.start()
    third.close()
    (tmp_path / "plain").write_bytes(b"")
    wrong = await pools.define(fs_pool(str(tmp_path / "plain"), tmp_path / "n").replace("<name>f<", "<name>h<"))
    with pytest.raises(HostError, match="is not a block device"):
        await wrong.build(building(overwrite=True))
    await pool.destroy()


async def test_a_mount_that_outlives_its_daemon_is_taken_away(
    pools: Pools, loop: Callable[[int], str], tmp_path: Path
) -> None:
    device, path = loop(64 * MIB), tmp_path / "m"
    pool = await pools.define(fs_pool(device, path))
    await pool.build(building(overwrite=True))
    document = pool.definition.copy()
    # As a kill amid the start leaves it: said in the state, the program on its way, and nobody who waits for it.
    origin = PoolOrigin(state="starting", boot=pools.store.boot, persistent=True)
    pools.store.save_state(PoolState(pool=document, origin=origin))
    go = tmp_path / "go"
    script = f"while [ ! -e {go} ]; do sleep 0.05; done; exec mount {device} {path}"
    with mounts._marked(str(path)) as mark:
        late = subprocess.Popen(["sh", "-c", script], pass_fds=mark)
    other = Pools(Paths.system(tmp_path / "root"))
    coming = asyncio.ensure_future(other.open())
    await asyncio.sleep(0.3)
    assert not coming.done()
    go.touch()
    await coming
    assert late.wait(10) == 0
    assert mounted_at(str(path)) is None and not other.lookup_name("f").is_active
    assert other.warnings == ["storage pool 'f' was starting when the daemon was stopped: it is inactive"]
    other.close()


async def test_a_device_that_vanishes_is_said(pools: Pools, loop: Callable[[int], str], tmp_path: Path) -> None:
    device = loop(64 * MIB)
    pool = await pools.create_xml(disk_pool(device, "gpt"), building())
    subprocess.run(["losetup", "--detach", device], check=True, timeout=30)
    with pytest.raises(HostError, match=r"failed|No such device|partition table"):
        await pool.refresh()
    assert any("cannot be refreshed" in line for line in pool.warnings)
    assert pool.is_active  # what was there is still shown, and it can be stopped
    await pool.destroy()


@pytest.mark.parametrize("label", ["gpt", "dos"])
async def test_partitions_are_volumes(pools: Pools, loop: Callable[[int], str], tmp_path: Path, label: str) -> None:
    device = loop(64 * MIB)
    name = device.rpartition("/")[2]
    pool = await pools.define(disk_pool(device, label))
    with pytest.raises(StorageProbeFailed, match=f"Device '{device}' is unrecognized, requires build"):
        await pool.start()
    await pool.build(building())
    with pytest.raises(StoragePoolBuilt, match="forced overwrite is necessary"):
        await pool.build(building())
    await pool.build(building(overwrite=True))
    await pool.start()
    assert pool.contents.available > 60 * MIB and pool.contents.allocation == 0
    create = partial(volumes.create, pools, pool)
    with pytest.raises(InvalidArgument, match=f"invalid partition name 'foo', expected '{name}p1'"):
        await create(VOLUME.format("foo", MIB, ""))
    with pytest.raises(OperationFailed, match="no large enough free extent"):
        await create(VOLUME.format(f"{name}p1", 100 * MIB, ""))
    one = await create(VOLUME.format(f"{name}p1", 10 * MIB, ""))
    swap = "<target><format type='linux-swap'/></target>"
    two = await create(VOLUME.format(f"{name}p2", 10 * MIB + 100, swap))
    assert (one.path, one.size, one.format) == (f"{device}p1", 10 * MIB, "linux")
    assert (two.size, two.format) == (10 * MIB + 512, "linux-swap")
    assert one.source is not None
    assert [(each.start, each.end) for each in one.source.devices[0].extents] == [(MIB, 11 * MIB)]
    assert Path(one.path).is_block_device()
    # its bytes: written, read, wiped; not while the host itself uses it
    async with volumes.open_bytes(pools, pool, one.name, 0, 0, writable=True) as opened:
        os.pwrite(opened.fd, b"x" * MIB, 9 * MIB)
    copy = await volumes.copy(pools, pool, VOLUME.format(f"{name}p3", 10 * MIB, ""), pool, one.name)
    assert (copy.size, read(copy.path, 9 * MIB)) == (10 * MIB, b"xxxx")
    await volumes.wipe(pools, pool, one.name, 0)
    assert read(one.path, 9 * MIB) == bytes(4)
    subprocess.run(["mkfs.ext4", "-q", one.path], check=True, timeout=30)
    (tmp_path / "m").mkdir()
    subprocess.run(["mount", one.path, tmp_path / "m"], check=True, timeout=30)
    for forbidden in (volumes.wipe(pools, pool, one.name, 0), volumes.delete(pools, pool, one.name)):
        with pytest.raises(ResourceBusy, match="in use"):
            await forbidden
    subprocess.run(["umount", tmp_path / "m"], check=True, timeout=30)
    await volumes.delete(pools, pool, two.name)
    assert not Path(two.path).exists()
    # what another partition held is not what a new one shows
    again = await create(VOLUME.format(f"{name}p2", 10 * MIB, ""))
    assert again.source is not None
    await pool.refresh()
    assert sorted(volume.name for volume in pool.volumes()) == [f"{name}p{number}" for number in (1, 2, 3)]
    assert pool.contents.allocation == 30 * MIB
    await pool.destroy()
    with pytest.raises(OperationInvalid, match="has 3 partitions"):
        await pool.delete()
    await pool.build(building(overwrite=True))
    assert not Path(one.path).exists()
    await pool.delete()


async def test_an_extended_partition_holds_logical_ones(pools: Pools, loop: Callable[[int], str]) -> None:
    device = loop(64 * MIB)
    name = device.rpartition("/")[2]
    pool = await pools.create_xml(disk_pool(device, "dos"), building())
    extended = "<target><format type='extended'/></target>"
    for number in (1, 2, 3):
        await volumes.create(pools, pool, VOLUME.format(f"{name}p{number}", 4 * MIB, ""))
    await volumes.create(pools, pool, VOLUME.format(f"{name}p4", 30 * MIB, extended))
    five = await volumes.create(pools, pool, VOLUME.format(f"{name}p5", 8 * MIB, ""))
    six = await volumes.create(pools, pool, VOLUME.format(f"{name}p6", 8 * MIB, ""))
    assert (five.size, six.size) == (8 * MIB, 8 * MIB)
    shown = pool.volume(f"{name}p4")
    await pool.refresh()
    shown = pool.volume(f"{name}p4")
    assert (shown.format, shown.size, shown.allocated) == ("extended", 30 * MIB, 16 * MIB)
    with pytest.raises(OperationInvalid, match="holds others"):
        await volumes.delete(pools, pool, f"{name}p4")
    with pytest.raises(OperationInvalid, match="not the last of the logical ones"):
        await volumes.delete(pools, pool, five.name)
    for number in (6, 5, 4):
        await volumes.delete(pools, pool, f"{name}p{number}")
    assert pool.contents.allocation == 12 * MIB


async def test_a_table_that_cannot_be_made_is_refused(pools: Pools, loop: Callable[[int], str]) -> None:
    pool = await pools.define(disk_pool(loop(16 * MIB), "mac"))
    with pytest.raises(ConfigUnsupported, match="format mac cannot be made here"):
        await pool.build(building())


def read(path: str, offset: int) -> bytes:
    with Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(4)


async def test_a_quota_leaves_no_half_volume(pools: Pools, loop: Callable[[int], str], tmp_path: Path) -> None:
    """A real one: what is made within it is there, what is not leaves nothing, and the pool goes on."""
    if find_program("mkfs.btrfs") is None or "\tbtrfs\n" not in Path("/proc/filesystems").read_text():
        pytest.skip("mkfs.btrfs is not on this host, or its kernel has no btrfs")
    device, mount = loop(128 * MIB), tmp_path / "b"
    mount.mkdir()
    place = mount / "v"
    for words in (
        ["mkfs.btrfs", "-q", device],
        ["mount", device, str(mount)],
        ["btrfs", "quota", "enable", str(mount)],
        ["btrfs", "-q", "subvolume", "create", str(place)],
        ["btrfs", "qgroup", "limit", "4M", str(place)],
    ):
        subprocess.run(words, check=True, capture_output=True, timeout=60)
    pool = await pools.create_xml(f"<pool type='dir'><name>q</name><target><path>{place}</path></target></pool>")
    data = os.urandom(MIB)
    (place / "small").write_bytes(data)
    (tmp_path / "big").write_bytes(os.urandom(8 * MIB))
    await pool.refresh()
    before = sorted(item.name for item in place.iterdir())
    with pytest.raises(HostError, match=r"big.*(Disk quota exceeded|No space left)"):
        await volumes.create(pools, pool, VOLUME.format("big", 16 * MIB, ""))
    assert sorted(item.name for item in place.iterdir()) == before
    copy = await volumes.copy(pools, pool, VOLUME.format("copy", MIB, ""), pool, "small")
    assert copy.size == MIB and (place / "copy").read_bytes() == data
    other = await pools.create_xml(f"<pool type='dir'><name>o</name><target><path>{tmp_path}</path></target></pool>")
    for kind in ("raw", "qcow2"):
        xml = VOLUME.format("fat", 8 * MIB, f"<allocation>0</allocation><target><format type='{kind}'/></target>")
        with pytest.raises((HostError, OSError), match=r"Disk quota exceeded|No space left"):
            await volumes.copy(pools, pool, xml, other, "big")
        assert not (place / "fat").exists() and (place / "small").read_bytes() == data
    words = ["convert", "-f", "raw", "-O", "qcow2", str(tmp_path / "big"), str(place / "image")]
    done = subprocess.run(
        [sys.executable, "-S", "-c", "from kvik.cli.img import main; main()", *words],
        env={**os.environ, "PYTHONPATH": str(Path(kvik.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and "make room within the quota" in done.stderr, done.stderr
    assert not (place / "image").exists()
    await other.destroy()
    await pool.destroy()
