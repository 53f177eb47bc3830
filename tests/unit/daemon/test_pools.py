"""The calls about storage pools and volumes: what a client gets to hear, what it may do, its events and its bytes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from daemon_harness import running
from fake_manager import FakeManager

from kvik.daemon.errors import OperationDenied
from kvik.errors import (
    ConfigUnsupported,
    InvalidArgument,
    KvikError,
    NoStoragePool,
    NoStorageVolume,
    OperationUnsupported,
    ResourceBusy,
)
from kvik.rpc import message as m

POOL = "<pool type='dir'><name>{name}</name><target><path>{path}</path></target></pool>"
VOLUME = "<volume><name>{name}</name><capacity>{size}</capacity><allocation>0</allocation></volume>"
WITH_BUILD = 1
MIB = 1 << 20


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Any, Any, Path]]:
    """A daemon, a client of it, and a directory for pools."""
    manager = FakeManager(root=tmp_path / "root")
    await manager.pools.open()
    async with running(manager, **options) as daemon:
        yield daemon, await daemon.client(), tmp_path


def xml(path: Path, name: str) -> str:
    return POOL.format(name=name, path=path / name)


async def three(client: Any, path: Path) -> dict[str, Any]:
    """An active one that starts with the host, an inactive one, a transient one."""
    (on,) = await client.call("STORAGE_POOL_DEFINE_XML", xml(path, "on"), 0)
    await client.call("STORAGE_POOL_SET_AUTOSTART", on, 1)
    await client.call("STORAGE_POOL_CREATE", on, WITH_BUILD)
    (off,) = await client.call("STORAGE_POOL_DEFINE_XML", xml(path, "off"), 0)
    (brief,) = await client.call("STORAGE_POOL_CREATE_XML", xml(path, "brief"), WITH_BUILD)
    return {"on": on, "off": off, "brief": brief}


async def test_pools_are_listed_as_asked(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client, path):
        await three(client, path)
        assert tuple(await client.call("CONNECT_NUM_OF_STORAGE_POOLS")) == (2,)
        assert tuple(await client.call("CONNECT_NUM_OF_DEFINED_STORAGE_POOLS")) == (1,)
        assert (await client.call("CONNECT_LIST_STORAGE_POOLS", 100))[0] == ["on", "brief"]
        assert (await client.call("CONNECT_LIST_DEFINED_STORAGE_POOLS", 100))[0] == ["off"]
        for flags, names in (
            (0, "on off brief"), (1, "off"), (2, "on brief"), (4, "on off"), (8, "brief"), (16, "on"),
            (32, "off brief"), (64, "on off brief"), (128, ""), (64 | 128 | 1, "off"), (1 << 15, ""),
        ):  # fmt: skip
            rows, count = await client.call("CONNECT_LIST_ALL_STORAGE_POOLS", 1, flags)
            assert ([name for name, _ in rows], count) == (names.split(), len(names.split())), flags
        assert tuple(await client.call("CONNECT_LIST_ALL_STORAGE_POOLS", 0, 0)) == ([], 3)
        with pytest.raises(InvalidArgument):
            await client.call("CONNECT_LIST_ALL_STORAGE_POOLS", 1, 1 << 30)
        for procedure in ("CONNECT_LIST_STORAGE_POOLS", "CONNECT_LIST_DEFINED_STORAGE_POOLS"):
            with pytest.raises(InvalidArgument):
                await client.call(procedure, -1)


async def test_a_pool_is_found_and_told_of(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client, path):
        on = (await three(client, path))["on"]
        assert (await client.call("STORAGE_POOL_LOOKUP_BY_NAME", "on"))[0] == on
        assert (await client.call("STORAGE_POOL_LOOKUP_BY_UUID", on[1]))[0] == on
        assert (await client.call("STORAGE_POOL_LOOKUP_BY_TARGET_PATH", f"{path}/on"))[0] == on
        for procedure, value in (("NAME", "x"), ("UUID", bytes(16)), ("TARGET_PATH", "/x")):
            with pytest.raises(NoStoragePool):
                await client.call(f"STORAGE_POOL_LOOKUP_BY_{procedure}", value)
        state, capacity, allocation, available = await client.call("STORAGE_POOL_GET_INFO", on)
        assert state == 2 and capacity == allocation + available > 0
        assert (await client.call("STORAGE_POOL_GET_XML_DESC", on, 1))[0].startswith("<pool type='dir'>")
        for procedure in ("IS_ACTIVE", "IS_PERSISTENT", "GET_AUTOSTART"):
            assert (await client.call(f"STORAGE_POOL_{procedure}", on))[0] == 1
        for procedure in ("GET_XML_DESC", "REFRESH", "DELETE", "BUILD"):
            with pytest.raises(KvikError, match="flags"):
                await client.call(f"STORAGE_POOL_{procedure}", on, 1 << 20)
        capabilities = (await client.call("CONNECT_GET_STORAGE_POOL_CAPABILITIES", 0))[0]
        assert "<pool type='dir' supported='yes'>" in capabilities
        with pytest.raises(OperationUnsupported, match="does not support source discovery"):
            await client.call("CONNECT_FIND_STORAGE_POOL_SOURCES", "dir", None, 0)


async def test_what_is_to_be_said_of_a_pool(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client, path):
        text = xml(path, "p").replace("</name>", "</name><frob/>")
        with pytest.raises(ConfigUnsupported, match="frob"):
            await client.call("STORAGE_POOL_DEFINE_XML", text, 1)
        (pool,) = await client.call("STORAGE_POOL_CREATE_XML", text, WITH_BUILD)
        (path / "p/link").symlink_to("/etc/passwd")
        await client.call("STORAGE_POOL_REFRESH", pool, 0)
        said = (await client.call("STORAGE_POOL_MESSAGES", pool, program="kvik"))[0]
        assert "frob" in said[0] and "symbolic link" in said[1]
        with pytest.raises(InvalidArgument, match="mutually exclusive"):
            await client.call("STORAGE_POOL_BUILD", pool, 4 | 8)


async def test_events_reach_those_who_asked(tmp_path: Path) -> None:
    async with serving(tmp_path) as (daemon, client, path):
        pools = await three(client, path)
        watcher = await daemon.client()
        (every,) = await watcher.call("CONNECT_STORAGE_POOL_EVENT_REGISTER_ANY", 0, None)
        (refreshed,) = await watcher.call("CONNECT_STORAGE_POOL_EVENT_REGISTER_ANY", 1, pools["on"])
        await client.call("STORAGE_POOL_REFRESH", pools["brief"], 0)
        await client.call("STORAGE_POOL_REFRESH", pools["on"], 0)
        await client.call("STORAGE_POOL_DESTROY", pools["on"])
        told = [tuple((await watcher.event()).decode()) for _ in range(2)]
        assert told == [(refreshed, pools["on"]), (every, pools["on"], 3, 0)]
        await watcher.call("CONNECT_STORAGE_POOL_EVENT_DEREGISTER_ANY", every)
        for name, *values in (("DEREGISTER", every), ("REGISTER", 7, None)):
            with pytest.raises(InvalidArgument):
                await watcher.call(f"CONNECT_STORAGE_POOL_EVENT_{name}_ANY", *values)
        assert daemon.server.pool_events.count == 1


async def test_readers_look_but_do_not_touch(tmp_path: Path) -> None:
    async with serving(tmp_path) as (daemon, client, path):
        pool = (await three(client, path))["on"]
        (volume,) = await client.call("STORAGE_VOL_CREATE_XML", pool, VOLUME.format(name="v", size=10), 0)
        (path / "outside").touch()
        reader = await daemon.client(flags=1)
        assert (await reader.call("STORAGE_VOL_LOOKUP_BY_PATH", volume[2]))[0] == volume
        assert (await reader.call("STORAGE_VOL_GET_INFO", volume))[1] == 10
        with pytest.raises(NoStorageVolume):  # not even whether it is there
            await reader.call("STORAGE_VOL_LOOKUP_BY_PATH", str(path / "outside"))
        loose = (await client.call("STORAGE_VOL_LOOKUP_BY_PATH", str(path / "outside")))[0]
        for procedure, *values in (
            ("STORAGE_VOL_GET_XML_DESC", loose, 0),
            ("STORAGE_VOL_DELETE", volume, 0),
            ("STORAGE_VOL_DOWNLOAD", volume, 0, 0, 0),
            ("STORAGE_POOL_REFRESH", pool, 0),
        ):
            with pytest.raises(KvikError) as denied:
                await reader.call(procedure, *values)
            assert denied.value.code == OperationDenied.code


async def test_volumes_are_made_found_and_changed(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client, path):
        pool = (await three(client, path))["on"]
        (made,) = await client.call("STORAGE_VOL_CREATE_XML", pool, VOLUME.format(name="v", size=MIB), 0)
        assert tuple(made) == ("on", "v", f"{path}/on/v")
        for procedure, value in (("KEY", made[2]), ("PATH", made[2])):
            assert (await client.call(f"STORAGE_VOL_LOOKUP_BY_{procedure}", value))[0] == made
        assert (await client.call("STORAGE_VOL_LOOKUP_BY_NAME", pool, "v"))[0] == made
        assert (await client.call("STORAGE_POOL_LOOKUP_BY_VOLUME", made))[0] == pool
        (copied,) = await client.call("STORAGE_VOL_CREATE_XML_FROM", pool, VOLUME.format(name="w", size=1), made, 0)
        assert tuple(await client.call("STORAGE_POOL_NUM_OF_VOLUMES", pool)) == (2,)
        assert (await client.call("STORAGE_POOL_LIST_VOLUMES", pool, 10))[0] == ["v", "w"]
        assert tuple(await client.call("STORAGE_POOL_LIST_ALL_VOLUMES", pool, 1, 0)) == ([made, copied], 2)
        await client.call("STORAGE_VOL_RESIZE", made, MIB, 2)
        assert tuple(await client.call("STORAGE_VOL_GET_INFO", made)) == (0, 2 * MIB, 0)
        assert tuple(await client.call("STORAGE_VOL_GET_INFO_FLAGS", made, 1)) == (0, 2 * MIB, 2 * MIB)
        await client.call("STORAGE_VOL_WIPE", made, 0)
        await client.call("STORAGE_VOL_WIPE_PATTERN", made, 8, 0)
        await client.call("STORAGE_VOL_DELETE", made, 1)  # wiped first
        with pytest.raises(NoStorageVolume):
            await client.call("STORAGE_VOL_GET_XML_DESC", made, 0)
        with pytest.raises(NoStorageVolume):
            await client.call("STORAGE_VOL_LOOKUP_BY_KEY", made[2])
        with pytest.raises(ConfigUnsupported, match="frob"):
            strict = VOLUME.format(name="x", size=1).replace("</volume>", "<frob/></volume>")
            await client.call("STORAGE_VOL_CREATE_XML", pool, strict, 4)


async def volume_of(client: Any, path: Path, size: int = MIB) -> Any:
    pool = (await three(client, path))["on"]
    return (await client.call("STORAGE_VOL_CREATE_XML", pool, VOLUME.format(name="v", size=size), 0))[0]


async def stream_of(client: Any, procedure: str, *values: Any) -> Any:
    """Open a stream; its key. It is known before the answer is read: packets may come with it."""
    future = client.start(procedure, *values)
    key = client.last_key
    client.wire.open_stream(key)
    message = await future
    if isinstance(message, m.ErrorReply):
        raise message.error()
    return key


async def received(client: Any) -> list[Any]:
    """What comes on the stream up to its end."""
    found = []
    while not isinstance(message := await client.packet(), m.StreamEnd | m.StreamAbort | m.StreamFinish):
        found.append(message)
    return [*found, message]


async def test_an_upload_is_on_disk_when_the_daemon_says_so(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client, path):
        volume = await volume_of(client, path)
        key = await stream_of(client, "STORAGE_VOL_UPLOAD", volume, 100, 0, 0)
        data = bytes(range(256)) * 40_000  # 10 MB: more than may wait
        for start in range(0, len(data), m.STREAM_DATA_MAX):
            piece = m.stream_data(key, data[start : start + m.STREAM_DATA_MAX])
            await asyncio.to_thread(client.send, piece)  # it waits for the daemon, whose loop runs here
        client.send(m.stream_finish(key))
        assert isinstance((await received(client))[-1], m.StreamFinish)
        assert (path / "on/v").read_bytes() == bytes(100) + data
        assert (await client.call("STORAGE_VOL_GET_INFO", volume))[1] == len(data) + 100


async def test_a_download_brings_the_bytes_asked_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client, path):
        volume = await volume_of(client, path)
        data = bytes(range(256)) * 40_000
        (path / "on/v").write_bytes(data)
        for offset, length, expected in ((0, 0, data), (5, 0, data[5:]), (7, 300_000, data[7:300_007])):
            key = await stream_of(client, "STORAGE_VOL_DOWNLOAD", volume, offset, length, 0)
            pieces = await received(client)
            assert b"".join(piece.payload for piece in pieces[:-1]) == expected
            client.send(m.stream_finish(key))
            assert isinstance(await client.packet(), m.StreamFinish)
        with pytest.raises(InvalidArgument):
            await client.call("STORAGE_VOL_DOWNLOAD", volume, len(data), 1, 0)


async def test_holes_go_both_ways_as_holes(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client, path):
        volume = await volume_of(client, path, 64 * MIB)
        (path / "on/v").write_bytes(b"old" * 1000)
        key = await stream_of(client, "STORAGE_VOL_UPLOAD", volume, 0, 0, 1)
        client.send(m.stream_hole(key, 8 * MIB) + m.stream_data(key, b"data") + m.stream_hole(key, 8 * MIB))
        client.send(m.stream_finish(key))
        assert isinstance((await received(client))[-1], m.StreamFinish)
        assert (path / "on/v").read_bytes() == bytes(8 * MIB) + b"data" + bytes(8 * MIB)
        assert (path / "on/v").stat().st_blocks * 512 < MIB
        key = await stream_of(client, "STORAGE_VOL_DOWNLOAD", volume, 0, 0, 1)
        pieces = await received(client)
        assert [type(piece) for piece in pieces[:-1]] == [m.StreamHole, m.StreamData, m.StreamHole]
        client.send(m.stream_finish(key))
        assert isinstance(await client.packet(), m.StreamFinish)
        key = await stream_of(client, "STORAGE_VOL_UPLOAD", volume, 0, 0, 0)
        client.send(m.stream_hole(key, 1))  # to a stream that was not opened as sparse
        assert isinstance((await received(client))[-1], m.StreamAbort)


async def test_more_than_was_announced_is_refused_and_the_volume_is_free_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client, path):
        volume = await volume_of(client, path)
        key = await stream_of(client, "STORAGE_VOL_UPLOAD", volume, 0, 10, 0)
        with pytest.raises(ResourceBusy, match="it is being written to"):
            await client.call("STORAGE_VOL_DELETE", volume, 0)
        client.send(m.stream_data(key, b"x" * 11))
        assert isinstance((await received(client))[-1], m.StreamAbort)
        await free(client, volume)


async def free(client: Any, volume: Any) -> None:
    """Delete it as soon as nobody holds it."""
    for _ in range(500):
        try:
            await client.call("STORAGE_VOL_DELETE", volume, 0)
        except ResourceBusy:
            await asyncio.sleep(0.01)
        else:
            return
    raise AssertionError("it is held for ever")


async def test_a_client_that_goes_amid_a_stream_leaves_the_volume_free(tmp_path: Path) -> None:
    async with serving(tmp_path) as (daemon, client, path):
        first = await volume_of(client, path, 64 * MIB)
        pool = (await client.call("STORAGE_POOL_LOOKUP_BY_VOLUME", first))[0]
        (second,) = await client.call("STORAGE_VOL_CREATE_XML", pool, VOLUME.format(name="w", size=64 * MIB), 0)
        for procedure, volume in (("STORAGE_VOL_UPLOAD", first), ("STORAGE_VOL_DOWNLOAD", second)):
            other = await daemon.client()
            key = await stream_of(other, procedure, volume, 0, 0, 0)
            if procedure == "STORAGE_VOL_UPLOAD":
                other.send(m.stream_data(key, b"x" * 1000))
            await other.close()
            await free(client, volume)


async def test_a_disk_that_fails_ends_the_upload_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as (_, client, path):
        volume = await volume_of(client, path)

        def fail(*args: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        key = await stream_of(client, "STORAGE_VOL_UPLOAD", volume, 0, 0, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            client.send(m.stream_data(key, b"x" * 1000))
            (abort,) = await received(client)
        assert "No space left on device" in str(abort.error())
        await free(client, volume)
