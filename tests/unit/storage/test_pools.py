"""Pools of type dir: defined, built, started, found again after a kill, forgotten; and what is said of all that."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest
from world import opened, pool_xml, volume_xml

from kvik.conf.storage_pool import parse_pool
from kvik.errors import (
    AlreadyExists,
    ConfigError,
    ConfigUnsupported,
    HostError,
    NoStoragePool,
    OperationInvalid,
    OperationTimeout,
    ResourceBusy,
)
from kvik.host.threads import in_thread
from kvik.paths import Paths
from kvik.storage import volumes
from kvik.storage.backend import Contents
from kvik.storage.backends import dir as dir_backend
from kvik.storage.pools import REFRESHED, Pools

DEFINED, UNDEFINED, STARTED, STOPPED, CREATED, DELETED = range(6)


def build(backend: object) -> None:
    backend.build()


async def test_the_life_of_a_pool_and_what_is_told_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a/pool"
    async with opened(tmp_path) as pools:
        told: list[tuple[str, int]] = []
        pools.subscribe(lambda pool, event: told.append((pool.name, event)))
        pool = await pools.define(pool_xml("p", path))
        with pytest.raises(HostError, match="No such file"):
            await pool.start()
        assert not pool.is_active
        assert not [*pools.store.status.glob("*.xml")]
        await pool.build(build)
        assert path.stat().st_mode & 0o777 == 0o711
        await pool.start()
        with pytest.raises(OperationInvalid, match="already active"):
            await pool.start()
        for forbidden in (pools.undefine(pool), pool.build(build), pool.delete()):
            with pytest.raises(OperationInvalid, match="still active"):
                await forbidden
        (path / "file").write_bytes(b"x" * 5000)
        await pool.refresh()
        assert [volume.name for volume in pool.volumes()] == ["file"]
        live = parse_pool(pool.xml())
        assert live.capacity is not None and live.capacity.value > 0
        assert live.target is not None and live.target.permissions is not None
        await pool.destroy()
        with pytest.raises(OperationInvalid, match="not active"):
            pool.volumes()
        with pytest.raises(HostError, match="Directory not empty"):
            await pool.delete()
        (path / "file").unlink()
        await pool.delete()
        assert not path.exists()
        await pools.undefine(pool)
        with pytest.raises(NoStoragePool):
            pools.lookup_name("p")
        assert told == [("p", event) for event in (0, CREATED, STARTED, REFRESHED, STOPPED, DELETED, UNDEFINED)]
        assert not [*(tmp_path / "etc/kvik/storage").glob("*.xml")]


async def test_the_next_daemon_finds_everything_again(tmp_path: Path) -> None:
    (tmp_path / "on").mkdir()
    (tmp_path / "brief").mkdir()
    async with opened(tmp_path) as pools:
        on = await pools.define(pool_xml("on", tmp_path / "on"))
        await on.set_autostart(True)
        await on.start()
        await volumes.create(pools, on, volume_xml("v", 4096))
        await pools.define(pool_xml("off", tmp_path / "off"))
        await pools.create_xml(pool_xml("brief", tmp_path / "brief"))
    async with opened(tmp_path) as pools:
        assert not pools.warnings
        found = {pool.name: (pool.is_active, pool.persistent, pool.autostart) for pool in pools.list()}
        assert found == {"on": (True, True, True), "off": (False, True, False), "brief": (True, False, False)}
        assert [volume.name for volume in pools.lookup_name("on").volumes()] == ["v"]
        assert pools.lookup_name("on").uuid == on.uuid
        await pools.lookup_name("brief").destroy()  # a transient one is forgotten when it stops
        assert {pool.name for pool in pools.list()} == {"on", "off"}


async def test_a_pool_whose_directory_went_is_inactive_and_said(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    async with opened(tmp_path) as pools:
        await (await pools.define(pool_xml("p", tmp_path / "p"))).start()
    (tmp_path / "p").rmdir()
    async with opened(tmp_path) as pools:
        assert not pools.lookup_name("p").is_active
        assert "its source is gone" in pools.warnings[0]


async def test_autostart_happens_once_per_boot(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    async with opened(tmp_path) as pools:
        pool = await pools.define(pool_xml("p", tmp_path / "p"))
        await pool.set_autostart(True)
    async with opened(tmp_path) as pools:  # the same boot: whoever stopped it wants it stopped
        assert not pools.lookup_name("p").is_active
    for path in (tmp_path / "run/kvik/storage").iterdir():
        path.write_bytes(b"another boot")
    async with opened(tmp_path) as pools:
        assert pools.lookup_name("p").is_active
        await pools.lookup_name("p").set_autostart(False)
    async with opened(tmp_path) as pools:
        assert not pools.lookup_name("p").autostart


async def test_files_that_cannot_be_read_are_set_aside(tmp_path: Path) -> None:
    async with opened(tmp_path) as pools:
        await pools.define(pool_xml("good", tmp_path / "good"))
    place, status = tmp_path / "etc/kvik/storage", tmp_path / "run/kvik/storage"
    (place / "bad.xml").write_text("<pool")
    (place / "other.xml").write_text(pool_xml("another", tmp_path / "x"))
    (place / "hand.xml").write_text(pool_xml("hand", tmp_path / "hand"))
    (place / "autostart/gone.xml").symlink_to(place / "gone.xml")
    (status / "junk.xml").write_text("<poolstate/>")
    async with opened(tmp_path) as pools:
        assert sorted(pool.name for pool in pools.list()) == ["good", "hand"]
        assert len(pools.warnings) == 3
        assert "<uuid>" in (place / "hand.xml").read_text()  # fixed for good
    assert sorted(path.name for path in place.glob("*.corrupt-0")) == ["bad.xml.corrupt-0", "other.xml.corrupt-0"]
    assert not (place / "autostart/gone.xml").is_symlink()


async def test_names_uuids_and_sources_are_of_one_pool_only(tmp_path: Path) -> None:
    async with opened(tmp_path) as pools:
        one = await pools.define(pool_xml("one", tmp_path / "one"))
        same_uuid = pool_xml("two", tmp_path / "two").replace("</name>", f"</name><uuid>{one.uuid_text}</uuid>")
        with pytest.raises(OperationInvalid, match="already defined with uuid"):
            await pools.define(same_uuid)
        with pytest.raises(AlreadyExists, match="Storage source conflict with pool: 'one'"):
            await pools.define(pool_xml("two", tmp_path / "one"))
        other = one.xml().replace(one.uuid_text, "11111111-2222-4333-8444-555555555555")
        with pytest.raises(OperationInvalid, match="already exists with uuid"):
            await pools.define(other)
        again = await pools.define(pool_xml("one", tmp_path / "elsewhere"))  # the same name: a change
        assert again is one
        assert one.document.path == str(tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match="would be taken for an option"):
            await pools.define(pool_xml("-x", tmp_path / "x"))


async def test_a_transient_pool_can_be_made_to_stay_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as pools:
        with pytest.raises(HostError):
            await pools.create_xml(pool_xml("t", tmp_path / "none"))
        assert not pools.list()
        pool = await pools.create_xml(pool_xml("t", tmp_path / "t"), build)
        await pools.define(pool.xml())
        assert pool.persistent
    async with opened(tmp_path) as pools:
        pool = pools.lookup_name("t")
        assert pool.is_active and pool.persistent


async def test_a_pool_is_not_stopped_while_a_volume_is_worked_on(tmp_path: Path) -> None:
    async with opened(tmp_path) as pools:
        pool = await pools.create_xml(pool_xml("p", tmp_path / "p"), build)
        await volumes.create(pools, pool, volume_xml("v", 4096))
        with pool.working("v", "it is being wiped"):
            with pytest.raises(ResourceBusy, match="it is being wiped"):
                await pool.destroy()
            with pytest.raises(ResourceBusy, match="it is being wiped"):
                await volumes.delete(pools, pool, "v")
            await volumes.create(pools, pool, volume_xml("w", 4096))  # others are not held up
            await pool.refresh()
        await pool.destroy()


class Waiting(dir_backend.Backend):
    """A server that answers when it is told to."""

    go = threading.Event()

    def wait(self) -> None:
        self.entered.set()
        assert self.go.wait(30)

    entered = threading.Event()

    def refresh(self) -> Contents:
        self.wait()
        return super().refresh()

    def stop(self) -> None:
        self.wait()


async def test_what_was_asked_for_is_known_even_if_who_asked_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call is cancelled with its client, but what it began goes on: pool and state file agree about its end."""
    monkeypatch.setattr(dir_backend, "Backend", Waiting)
    (tmp_path / "p").mkdir()
    async with opened(tmp_path) as pools:
        pool = await pools.define(pool_xml("p", tmp_path / "p"))
        for call, after in ((pool.start, True), (pool.destroy, False)):
            Waiting.go.clear(), Waiting.entered.clear()
            task = asyncio.ensure_future(call())
            await in_thread(Waiting.entered.wait, 30)
            task.cancel()
            Waiting.go.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with pool.job("wait for the end of"):
                assert pool.is_active is after
            assert [*pools.store.status.glob("p.xml")] == [pools.store.status / "p.xml"] * after


async def test_a_source_that_does_not_answer_holds_up_nobody_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("p", "q", "t"):
        (tmp_path / name).mkdir()
    async with opened(tmp_path) as pools:
        other = await pools.create_xml(pool_xml("q", tmp_path / "q"))
        pool = await pools.create_xml(pool_xml("p", tmp_path / "p"))
        await volumes.create(pools, pool, volume_xml("v", 4096))
        assert pool.backend is not None
        pools.patience = pools.glance = 0.05
        Waiting.go.clear()
        monkeypatch.setattr(pool.backend, "look_at", lambda volume: Waiting.go.wait(30) and volume)
        monkeypatch.setattr(pool.backend, "refresh", lambda: Waiting.go.wait(30) and Contents())
        await pool.look_again(pool.volume("v"))  # shown as it was
        assert "its source does not answer" in pool.warnings
        await pool.look_again(pool.volume("v"))  # and no further thread waits for it
        for call in (pool.refresh(), volumes.create(pools, pool, volume_xml("w", 4096))):
            with pytest.raises(OperationTimeout, match="storage pool 'p' does not answer"):
                await call
        assert [volume.name for volume in pool.volumes()] == ["v"]
        monkeypatch.setattr(dir_backend, "Backend", Waiting)
        with pytest.raises(OperationTimeout, match="storage pool 't' does not answer"):
            await pools.create_xml(pool_xml("t", tmp_path / "t"))
        monkeypatch.undo()
        pools.patience = 30
        await pools.define(pool_xml("r", tmp_path / "r"))  # others go on
        await volumes.create(pools, other, volume_xml("w", 4096))
        Waiting.go.set()
        async with pools.lookup_name("t").job("wait for the end of"):
            assert pools.lookup_name("t").is_active  # it came when it was answered
        while pool.warnings:
            await asyncio.sleep(0.01)
        await pool.refresh()


async def test_a_pool_whose_source_never_answers_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p").mkdir()
    async with opened(tmp_path) as pools:
        pool = await pools.define(pool_xml("p", tmp_path / "p"))
        await pool.start()
        before = pool.backend
        assert before is not None
        pools.patience, go = 0.05, threading.Event()
        monkeypatch.setattr(before, "refresh", lambda: go.wait(30) and Contents(capacity=7))
        with pytest.raises(OperationTimeout, match="does not answer"):
            await pool.refresh()
        pools.patience = 30
        await pool.destroy()
        assert before.given_up and not pool.is_active and not [*pools.store.status.glob("p.xml")]
        await pool.start()  # a new look at it, which the old one does not disturb
        assert pool.backend is not before
        await pool.refresh()
        go.set()
        await in_thread(lambda: None)
        await asyncio.sleep(0)
        assert pool.contents.capacity != 7
        await pool.refresh()


async def test_a_lookup_by_path_or_key_finds_it_in_any_pool(tmp_path: Path) -> None:
    async with opened(tmp_path) as pools:
        pool = await pools.create_xml(pool_xml("p", tmp_path / "p"), build)
        made = await volumes.create(pools, pool, volume_xml("v", 4096))
        assert pools.lookup_path(made.path) == (pool, made)
        assert pools.lookup_key(made.key or "") == (pool, made)
        assert pools.lookup_target(f"{tmp_path}/p/") is pool
        for missing in (
            lambda: pools.lookup_path("/x"),
            lambda: pools.lookup_key("x"),
            lambda: pools.lookup_target("/"),
        ):
            with pytest.raises(Exception, match="no storage"):
                missing()


class Killed(BaseException):
    """The process ends here."""


OPERATIONS = ("open", "rename", "unlink", "symlink", "fsync", "mkdir", "rmdir", "fchmod")


async def _life(pools: Pools, tmp_path: Path) -> None:
    pool = await pools.define(pool_xml("p", tmp_path / "p"))
    await pool.build(build)
    await pool.set_autostart(True)
    await pool.start()
    await volumes.create(pools, pool, volume_xml("v", 8192, 8192))
    await pool.destroy()
    await pools.undefine(pool)


async def test_killed_at_any_step_the_next_daemon_finds_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operation on files in turn is the last one of a daemon."""
    step = 0
    while True:
        root = tmp_path / str(step)
        root.mkdir()
        left, ended = step, True

        def counted(real: object) -> object:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal left, ended
                if left == 0:
                    ended = False
                    raise Killed
                left -= 1
                return real(*args, **kwargs)

            return call

        pools = Pools(Paths.system(root))
        await pools.open()
        with monkeypatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                await asyncio.wait_for(_life(pools, root), 30)
            except Killed:
                pass
        async with opened(root) as after:
            assert all("corrupt" not in warning for warning in after.warnings)
            for pool in after.list():
                if not pool.is_active:
                    await pool.build(build)
                    await pool.start()
                assert all(volume.size == 8192 for volume in pool.volumes())
                assert not [path for path in (root / "p").iterdir() if path.name == "v" and path.stat().st_size != 8192]
        if ended:
            break
        step += 1
    assert step > 20


async def test_a_file_system_of_a_cluster_is_made_by_its_own_tool(tmp_path: Path) -> None:
    xml = f"""<pool type='fs'><name>p</name><source><device path='/dev/kvik'/><format type='gfs2'/></source>
    <target><path>{tmp_path}/m</path></target></pool>"""
    async with opened(tmp_path) as pools:
        pool = await pools.define(xml)
        with pytest.raises(ConfigUnsupported, match=r"mkfs\.gfs2 -p lock_dlm -t CLUSTER:NAME -j HOSTS /dev/kvik"):
            await pool.build(lambda backend: backend.build(overwrite=True))
