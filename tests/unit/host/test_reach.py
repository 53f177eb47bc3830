"""Looks at files that may not answer: given up in time, not repeated, and what comes too late is given back."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from kvik.errors import HostError
from kvik.host import reach as module
from kvik.host.reach import CROWD, about, obtain, open_file, reach


class Storage:
    """Answers nothing until `back` is set."""

    def __init__(self) -> None:
        self.back = threading.Event()
        self.asked: list[str] = []

    def look(self, *paths: str) -> str:
        for path in paths:
            about(path)
            self.asked.append(path)
            self.back.wait()
        return "seen"


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    monkeypatch.setattr(module, "PATIENCE", 0.02)
    monkeypatch.setattr(module, "_standing", [])
    monkeypatch.setattr(module, "mount_point", lambda path: f"/{path.split('/')[1]}" if path else "")
    it = Storage()
    yield it
    it.back.set()


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_an_answer_is_passed_on_and_so_is_an_error() -> None:
    async def work() -> None:
        assert await reach(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await reach(lambda: 1 / 0)

    run(work)


def test_the_error_names_the_path_at_which_it_stands(storage: Storage) -> None:
    async def work() -> None:
        with pytest.raises(HostError, match=r"/nfs/b\.img is on does not answer") as error:
            await reach(lambda: (about("/a.img"), storage.look("/nfs/b.img")))
        assert error.value.errno == errno.ETIMEDOUT
        assert "findmnt -T /nfs/b.img" in error.value.remedy

    run(work)


def test_the_loop_goes_on_meanwhile(storage: Storage) -> None:
    async def work() -> None:
        task = asyncio.create_task(reach(storage.look, "/nfs/a"))
        await until(lambda: storage.asked)
        storage.back.set()
        assert await task == "seen"

    run(work)


def test_a_path_that_stands_still_is_not_asked_again_and_its_neighbours_are(storage: Storage) -> None:
    async def work() -> None:
        for _ in range(2):
            with pytest.raises(HostError, match="/nfs/a is on does not answer"):
                await reach(storage.look, "/nfs/a")
        assert storage.asked == ["/nfs/a"]
        with pytest.raises(HostError, match="/nfs/b is on does not answer"):
            await reach(storage.look, "/nfs/b")
        assert storage.asked == ["/nfs/a", "/nfs/b"]

    run(work)


def test_one_mount_holds_so_many_threads_and_others_are_looked_at(storage: Storage) -> None:
    async def work() -> None:
        for number in range(2 * CROWD):
            with pytest.raises(HostError, match="does not answer"):
                await reach(storage.look, f"/nfs/{number}")
        assert len(storage.asked) == CROWD
        with pytest.raises(HostError, match=r"cannot look at /nfs/x: the storage that /nfs/0 is on does not answer"):
            await reach(storage.look, "/nfs/x")
        assert await reach(lambda: about("/elsewhere/a") or "fine") == "fine"
        storage.back.set()
        await until(lambda: not module._standing)
        assert await reach(storage.look, "/nfs/0") == "seen"

    run(work)


def test_what_was_given_up_goes_no_further(storage: Storage) -> None:
    async def work() -> None:
        with pytest.raises(HostError):
            await reach(storage.look, "/nfs/a", "/nfs/b")
        storage.back.set()
        await until(lambda: not module._standing)
        assert storage.asked == ["/nfs/a"]

    run(work)


@pytest.mark.parametrize("cancelled", [False, True], ids=["deadline", "cancelled"])
def test_what_comes_too_late_is_given_back(storage: Storage, cancelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []

    async def work() -> None:
        if cancelled:
            monkeypatch.setattr(module, "PATIENCE", 3600.0)
        task = asyncio.create_task(obtain(left.append, storage.look, "/nfs/a"))
        await until(lambda: storage.asked)
        if cancelled:
            task.cancel()
        with pytest.raises(asyncio.CancelledError if cancelled else HostError):
            await task
        assert not left
        storage.back.set()
        await until(lambda: left == ["seen"])

    run(work)


def test_each_path_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of many images on a slow server is no dead server."""
    monkeypatch.setattr(module, "PATIENCE", 1.0)

    def slow() -> str:
        for number in range(4):
            about(f"/nfs/{number}")
            time.sleep(0.4)
        return "seen"

    async def work() -> None:
        assert await reach(slow) == "seen"

    run(work)


def test_a_file_is_opened_or_its_error_names_it(tmp_path: Path) -> None:
    async def work() -> None:
        (tmp_path / "a").write_text("x")
        fd = await open_file(tmp_path / "a", os.O_RDONLY)
        assert not os.get_inheritable(fd)
        os.close(fd)
        with pytest.raises(HostError, match=f"cannot open {tmp_path}/b: No such file"):
            await open_file(tmp_path / "b", os.O_RDONLY)

    run(work)
