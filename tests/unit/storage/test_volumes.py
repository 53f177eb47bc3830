"""Volumes of a directory: made whole or not at all, changed, copied, wiped; and what else may lie in a pool."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import itertools
import os
import resource
import signal
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from world import opened, pool_xml, volume_xml

from kvik.conf.enums import StorageVolWipeAlgorithm
from kvik.conf.storage_volume import format_volume
from kvik.errors import (
    HostError,
    InvalidArgument,
    NoStorageVolume,
    OperationInvalid,
    ResourceBusy,
    StorageVolumeExists,
)
from kvik.host.threads import in_thread
from kvik.image.create import create as create_image
from kvik.storage import sparse, volumes
from kvik.storage.pool import PoolObject
from kvik.storage.pools import Pools
from kvik.storage.wiping import PASSES

MIB = 1 << 20


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[tuple[Pools, PoolObject, Path]]:
    async with opened(tmp_path / "root") as pools:
        (tmp_path / "p").mkdir()
        pool = await pools.create_xml(pool_xml("p", tmp_path / "p"))
        yield pools, pool, tmp_path / "p"


World = tuple[Pools, PoolObject, Path]


async def test_a_volume_has_the_size_space_owner_and_mode_asked_for(world: World) -> None:
    pools, pool, path = world
    made = await volumes.create(pools, pool, volume_xml("thin", MIB))
    assert (made.size, made.allocated, made.type, made.format) == (MIB, 0, "file", "raw")
    assert (path / "thin").stat().st_mode & 0o7777 == 0o600
    more = f"<target><permissions><mode>0640</mode><owner>{os.getuid()}</owner></permissions></target>"
    made = await volumes.create(pools, pool, volume_xml("thick", MIB, 2 * MIB, more))
    assert (made.size, made.allocated) == (MIB, MIB)
    info = (path / "thick").stat()
    assert (info.st_mode & 0o7777, info.st_uid) == (0o640, os.getuid())
    assert made.key == made.path == str(path / "thick")
    with pytest.raises(StorageVolumeExists):
        await volumes.create(pools, pool, volume_xml("thin", MIB))
    (path / "unseen").touch()
    with pytest.raises(StorageVolumeExists):  # also one that the last look did not see
        await volumes.create(pools, pool, volume_xml("unseen", MIB))


@pytest.mark.parametrize("kind", ["symbolic link", "dangling link", "FIFO", "socket", "hidden", "newline", "dash"])
async def test_what_is_no_volume_is_left_out_with_the_reason_and_never_opened(world: World, kind: str) -> None:
    _, pool, path = world
    secret = path.parent / "secret"
    secret.write_bytes(b"secret")
    name = {"hidden": ".x", "newline": "a\nb", "dash": "-rf"}.get(kind, "x")
    place = path / name
    if kind.endswith("link"):
        place.symlink_to(secret if kind == "symbolic link" else "/nonexistent")
    elif kind == "FIFO":
        os.mkfifo(place)  # to open it would wait for a writer
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(place))
    else:
        place.touch()
    await pool.refresh()
    assert pool.volumes() == []
    assert len(pool.warnings) == 1
    assert "is not shown as a volume" in pool.warnings[0]
    with pytest.raises(NoStorageVolume):
        pool.volume(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
async def test_a_device_in_a_pool_is_no_volume(world: World) -> None:
    _, pool, path = world
    os.mknod(path / "null", 0o020600, os.makedev(1, 3))
    os.mknod(path / "loop", 0o060600, os.makedev(7, 99))
    await pool.refresh()
    assert pool.volumes() == []
    assert ["device" in warning for warning in pool.warnings] == [True, True]


async def test_a_volume_that_became_something_else_is_not_touched(world: World) -> None:
    """Between the list and the call somebody puts a link where the volume was."""
    pools, pool, path = world
    secret = path.parent / "secret"
    secret.write_bytes(b"secret" * 1000)
    for change in (
        lambda: volumes.wipe(pools, pool, "v", 0),
        lambda: volumes.resize(pools, pool, "v", 0, shrink=True),
        lambda: volumes.open_bytes(pools, pool, "v", 0, 0, writable=True).__aenter__(),
        lambda: volumes.open_bytes(pools, pool, "v", 0, 0, writable=False).__aenter__(),
        lambda: volumes.copy(pools, pool, volume_xml("w", 1), pool, "v"),
        lambda: volumes.delete(pools, pool, "v"),
    ):
        (path / "v").unlink(missing_ok=True)
        (path / "v").write_bytes(b"x" * 6000)
        await pool.refresh()
        (path / "v").unlink()
        (path / "v").symlink_to(secret)
        with pytest.raises((HostError, OperationInvalid)):
            await change()
        assert secret.read_bytes() == b"secret" * 1000
    assert not (path / "w").exists()


async def test_a_file_with_a_second_name_is_read_but_not_written(world: World) -> None:
    pools, pool, path = world
    (path.parent / "other").write_bytes(b"theirs" * 1000)
    os.link(path.parent / "other", path / "v")
    await pool.refresh()
    assert pool.volume("v").size == 6000
    for change in (volumes.wipe(pools, pool, "v", 0), volumes.resize(pools, pool, "v", 9000)):
        with pytest.raises(OperationInvalid, match="hard link"):
            await change
    await volumes.delete(pools, pool, "v")  # only this name goes
    assert (path.parent / "other").read_bytes() == b"theirs" * 1000


def image(path: Path, size: int, base: str) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        create_image(fd, "qcow2", size, backing_file=base, backing_format="raw")
    finally:
        os.close(fd)


async def test_the_format_is_told_from_the_header_and_the_base_is_not_opened(world: World) -> None:
    _, pool, path = world
    image(path / "q.qcow2", 5 * MIB, "/etc/shadow")
    damaged = bytearray((path / "q.qcow2").read_bytes())
    damaged[20:24] = (60).to_bytes(4)  # clusters of 2^60 bytes
    (path / "damaged").write_bytes(damaged)
    (path / "cd.iso").write_bytes(bytes(32769) + b"CD001" + bytes(100))
    (path / "short").write_bytes(b"QFI\xfb")
    (path / "luks").write_bytes(b"LUKS\xba\xbe" + bytes(600))
    (path / "sub").mkdir()
    image(path / "net.qcow2", 5 * MIB, "nbd://host/x")
    await pool.refresh()
    net = pool.volume("net.qcow2").backing_store
    assert net is not None and net.path == "nbd://host/x"  # no file of the pool's
    (path / "net.qcow2").unlink()
    await pool.refresh()
    told = {volume.name: (volume.type, volume.format, volume.size) for volume in pool.volumes()}
    assert told == {
        "q.qcow2": ("file", "qcow2", 5 * MIB), "cd.iso": ("file", "iso", 32874), "short": ("file", "qcow2", 4),
        "damaged": ("file", "qcow2", len(damaged)),
        "luks": ("file", "raw", 606), "sub": ("dir", "dir", 0),
    }  # fmt: skip
    base = pool.volume("q.qcow2").backing_store
    assert base is not None and base.path == "/etc/shadow" and base.permissions is None
    assert pool.volume("damaged").backing_store is None  # nothing could show through it
    assert "<encryption format='luks'/>" in format_volume(pool.volume("luks"))


async def test_resizing(world: World) -> None:
    pools, pool, path = world
    await volumes.create(pools, pool, volume_xml("v", MIB))
    await volumes.resize(pools, pool, "v", 2 * MIB)
    assert pool.volume("v").size == 2 * MIB
    with pytest.raises(InvalidArgument, match="shrink"):
        await volumes.resize(pools, pool, "v", MIB)
    await volumes.resize(pools, pool, "v", MIB, delta=True, shrink=True)
    await volumes.resize(pools, pool, "v", MIB, delta=True, allocate=True)
    assert (pool.volume("v").size, pool.volume("v").allocated) == (2 * MIB, 2 * MIB)
    await volumes.resize(pools, pool, "v", 99 * MIB, delta=True, shrink=True)
    assert (path / "v").stat().st_size == 0
    with pytest.raises(InvalidArgument):
        await volumes.resize(pools, pool, "v", 1 << 63)


async def test_a_copy_has_the_bytes_and_the_holes_of_its_source(world: World) -> None:
    pools, pool, path = world
    with (path / "v").open("wb") as file:
        file.write(b"begin")
        file.seek(8 * MIB)
        file.write(b"end")
    await pool.refresh()
    made = await volumes.copy(pools, pool, volume_xml("w", 1), pool, "v")
    assert (path / "w").read_bytes() == (path / "v").read_bytes()
    assert made.allocated < MIB
    made = await volumes.copy(pools, pool, volume_xml("x", 16 * MIB), pool, "v")  # larger: zeros at the end
    assert made.size == 16 * MIB
    assert (path / "x").read_bytes()[: 8 * MIB + 3] == (path / "v").read_bytes()
    with pytest.raises(StorageVolumeExists):
        await volumes.copy(pools, pool, volume_xml("w", 1), pool, "v")


@pytest.mark.parametrize("algorithm", sorted(PASSES))
async def test_wiping_overwrites_what_was_written_and_fills_no_holes(world: World, algorithm: int) -> None:
    pools, pool, path = world
    with (path / "v").open("wb") as file:
        file.write(b"secret" * 10000)
        file.truncate(8 * MIB)
    await pool.refresh()
    await volumes.wipe(pools, pool, "v", algorithm)
    assert b"secret" not in (path / "v").read_bytes()
    assert pool.volume("v").size == 8 * MIB
    assert pool.volume("v").allocated < MIB


def test_passes_of_wiping_are_as_many_as_scrub_documents() -> None:
    lengths = {name: len(PASSES[number]) for name, number in StorageVolWipeAlgorithm if number in PASSES}
    assert lengths == {
        "ZERO": 1, "NNSA": 3, "DOD": 3, "BSI": 9, "GUTMANN": 35, "SCHNEIER": 7, "PFITZNER7": 7, "PFITZNER33": 33,
        "RANDOM": 1,
    }  # fmt: skip


async def test_trim_gives_back_all_that_a_volume_takes(world: World) -> None:
    pools, pool, path = world
    await volumes.create(pools, pool, volume_xml("v", MIB, MIB))
    (path / "v").write_bytes(b"x" * MIB)
    await volumes.wipe(pools, pool, "v", StorageVolWipeAlgorithm.TRIM)
    assert (path / "v").read_bytes() == bytes(MIB) and pool.volume("v").allocated == 0


async def test_what_cannot_be_wiped_is_said(world: World) -> None:
    pools, pool, _ = world
    await volumes.create(pools, pool, volume_xml("v", 10))
    with pytest.raises(InvalidArgument):
        await volumes.wipe(pools, pool, "v", 99)


async def test_a_volume_that_a_running_machine_has_open_stays_as_it_is(world: World) -> None:
    pools, pool, path = world
    await volumes.create(pools, pool, volume_xml("v", 4096))
    os.link(path / "v", path.parent / "by-another-name")
    pools.users = lambda: [(str(path.parent / "by-another-name"), "web", True)]
    for change in (
        volumes.delete(pools, pool, "v"),
        volumes.resize(pools, pool, "v", 8192),
        volumes.wipe(pools, pool, "v", 0),
        volumes.copy(pools, pool, volume_xml("w", 1), pool, "v"),
        volumes.open_bytes(pools, pool, "v", 0, 0, writable=True).__aenter__(),
    ):
        with pytest.raises(ResourceBusy, match="machine 'web' is running from it"):
            await change
    pools.users = lambda: [(str(path / "v"), "web", False)]
    await volumes.copy(pools, pool, volume_xml("w", 1), pool, "v")  # who only reads holds up no reader
    with pytest.raises(ResourceBusy):
        await volumes.delete(pools, pool, "v")


async def test_the_base_of_another_volume_is_not_deleted(world: World) -> None:
    pools, pool, path = world
    (path / "base").write_bytes(b"x" * 512)
    image(path / "top", 512, "base")
    await pool.refresh()
    with pytest.raises(OperationInvalid, match="'top' of pool 'p' is based on it"):
        await volumes.delete(pools, pool, "base")
    await volumes.delete(pools, pool, "top")
    await volumes.delete(pools, pool, "base")


FAULTS = [errno.ENOSPC, errno.EIO, errno.EDQUOT]


@pytest.mark.parametrize("number", FAULTS, ids=[errno.errorcode[number] for number in FAULTS])
@pytest.mark.parametrize("call", ["posix_fallocate", "ftruncate", "fsync", "fchmod", "fchown"])
async def test_a_fault_leaves_no_half_volume(
    world: World, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    pools, pool, path = world

    def fail(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    more = f"<target><permissions><owner>{os.getuid() + 1}</owner></permissions></target>"
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(HostError) as caught:
        await volumes.create(pools, pool, volume_xml("v", MIB, MIB, more))
    assert caught.value.errno == number
    monkeypatch.undo()
    assert [*path.iterdir()] == []
    await pool.refresh()
    assert pool.volumes() == []


async def test_a_limit_on_file_sizes_leaves_no_half_volume(world: World) -> None:
    pools, pool, path = world
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        with pytest.raises(HostError) as caught:
            await volumes.create(pools, pool, volume_xml("v", 4 * MIB, 4 * MIB))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert [*path.iterdir()] == []


async def test_what_is_written_into_a_volume_counts_in_the_pools_figures(world: World) -> None:
    pools, pool, _ = world
    await volumes.create(pools, pool, volume_xml("v", 64 * MIB))
    pool.contents.allocation = pool.contents.available = 0
    async with volumes.open_bytes(pools, pool, "v", 0, 0, writable=True) as opened:
        os.pwrite(opened.fd, b"x" * MIB, 0)
    assert pool.contents.allocation > 0 and pool.contents.available > 0
    pool.contents.available = 0
    await volumes.wipe(pools, pool, "v", 0)
    assert pool.contents.available > 0


async def test_what_a_kill_left_goes_with_the_next_look_and_what_is_being_made_stays(world: World) -> None:
    _, pool, path = world
    for name in (".kvik-1-old.tmp", ".kvik-2-young.tmp", ".kvik-3-held.tmp"):
        (path / name).write_bytes(b"x")
    for name in (".kvik-1-old.tmp", ".kvik-3-held.tmp"):
        os.utime(path / name, (1, 1))
    held = os.open(path / ".kvik-3-held.tmp", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    await pool.refresh()
    assert pool.volumes() == [] and not pool.warnings  # none of them is shown, or said
    assert sorted(each.name for each in path.iterdir()) == [".kvik-2-young.tmp", ".kvik-3-held.tmp"]
    os.close(held)


async def test_a_stuck_server_holds_up_its_own_pool_only(world: World, tmp_path: Path) -> None:
    """One thread each: however many calls wait for one server, another pool is answered."""
    pools, pool, _ = world
    answered = threading.Event()
    stuck = [asyncio.create_task(in_thread(answered.wait)) for _ in range(50)]
    await volumes.create(pools, pool, volume_xml("v", 4096))
    answered.set()
    assert all(await asyncio.gather(*stuck))


def test_extents_of_a_file_cover_it_without_gaps(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb+") as file:
        for at in (0, 5 * MIB, 9 * MIB):
            file.seek(at)
            file.write(b"x" * 4096)
        file.truncate(12 * MIB)
        found = [*sparse.extents(file.fileno(), 1000, 12 * MIB)]
    assert found[0][0] == 1000
    for (start, length, data), (following, _, other) in itertools.pairwise(found):
        assert start + length == following and data != other
    assert sum(length for _, length, _ in found) == 12 * MIB - 1000
    assert [data for _, _, data in found] == [True, False, True, False, True, False]
