"""Snapshots under faults: the daemon killed at every change to a file, no space in the middle of a merge; and the
planner under any sequence of operations. Whatever happens, every snapshot and the machine's disk show what they did."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from guillotine import cut
from hypothesis import given, settings
from hypothesis import strategies as st
from manager_bench import Bench
from snapshot_bench import DISKS, images, machine, shows, take, top, write

from kvik.errors import KvikError, OperationFailed
from kvik.manager.domain import DomainObject
from kvik.manager.snapshots import collect, delete, revert
from kvik.manager.snapshots.files import kept_disks
from kvik.manager.snapshots.plan import BACK, FORWARD, Layer, needed, plan
from kvik.storage import overlays


def states(domain: DomainObject) -> dict[str, str]:
    """What every snapshot keeps, by checksum."""
    found = {}
    for name, snapshot in domain.snapshots.snapshots.items():
        for disk, _ in kept_disks(snapshot):
            assert disk.source is not None and disk.source.file and disk.driver is not None
            found[name] = overlays.digest(disk.source.file, disk.driver.type or "raw")
    return found


async def grown(bench: Bench, tmp_path: Path) -> DomainObject:
    """s1 - s2 - s3, and s4 from s1, where the machine is."""
    domain = await machine(bench, tmp_path)
    for name in ("s1", "s2", "s3"):
        write(domain, 65536 * int(name[1]), os.urandom(3000))
        await take(domain, name)
    await revert.revert(domain, "s1", 0)
    write(domain, 65536 * 4, os.urandom(3000))
    await take(domain, "s4")
    write(domain, 0, os.urandom(100))
    return domain


async def create_one(domain: DomainObject) -> None:
    await take(domain, "new", DISKS if domain.is_active else 0)


async def go_back(domain: DomainObject) -> None:
    await revert.revert(domain, "s2", 0)


async def delete_back(domain: DomainObject) -> None:
    await delete.delete(domain, "s4", 0)


async def delete_forward(domain: DomainObject) -> None:
    await delete.delete(domain, "s2", 0)


async def delete_branch(domain: DomainObject) -> None:
    await delete.delete(domain, "s2", 1)


Operation = Callable[[DomainObject], Awaitable[None]]


@pytest.mark.parametrize(
    ("operation", "running", "stride"),
    [
        (create_one, False, 4),
        (create_one, True, 1),
        (go_back, False, 7),
        (delete_back, False, 4),
        (delete_forward, False, 4),
        (delete_branch, False, 4),
        (delete_forward, True, 1),
        (delete_back, True, 1),
        (delete_branch, True, 1),
        (go_back, True, 1),
    ],
    ids=lambda one: one.__name__ if callable(one) else str(one),
)
async def test_killed_at_any_change_to_a_file_nothing_is_lost(
    tmp_path: Path, operation: Operation, running: bool, stride: int
) -> None:
    where, kept = tmp_path / "now", tmp_path / "before"
    (where / "disks").mkdir(parents=True)
    bench = Bench(where)
    await bench.open()
    domain = await grown(bench, where / "disks")
    before, disk = states(domain), shows(domain)
    await bench.manager.close()
    shutil.copytree(where, kept, symlinks=True)
    for steps in range(0, 1000, stride):
        shutil.rmtree(where)
        shutil.copytree(kept, where, symlinks=True)
        bench = Bench(where)
        domain = (await bench.open()).lookup_name("a")
        await idle(domain)
        if running:
            await domain.start()
        fell = await cut(bench, steps, operation(domain))
        manager = await bench.open()
        try:
            domain = manager.lookup_name("a")
            await idle(domain)
            said = f"after {steps} steps of {operation.__name__}"
            after = states(domain)
            for name, checksum in before.items():
                assert after.get(name, checksum) == checksum, f"{said}: snapshot {name}"
            assert set(before) - set(after) <= {"s2", "s3", "s4"}, said
            assert shows(domain) in (disk, before["s2"]), said
            assert domain.snapshots.journal is None, said
            if not running:
                steps_left, _ = await collect.planned(domain)
                assert not steps_left, f"{said}: left to be done"
                inside = {Path(path).name for path in domain.snapshots.made} | {"disk.qcow2"}
                assert images(where / "disks") == inside, f"{said}: a file that nobody needs is left"
        finally:
            await manager.close()
        if not fell:
            assert steps > 0
            return
    pytest.fail("the operation never came to its end")


async def idle(domain: DomainObject) -> None:
    """What the daemon does by itself when it starts is done."""
    async with domain.jobs.hold("see the end of", wait=20):
        pass


@pytest.mark.parametrize("name", ["s2", "s4"])
async def test_no_space_in_the_middle_of_a_merge_loses_nothing(bench: Bench, tmp_path: Path, name: str) -> None:
    domain = await grown(bench, tmp_path)
    before, disk = states(domain), shows(domain)
    original, count = os.pwrite, 0
    with pytest.MonkeyPatch.context() as patch:

        def full(fd: int, data: bytes, offset: int) -> int:
            nonlocal count
            count += 1
            if count > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(fd, data, offset)

        patch.setattr(os, "pwrite", full)
        with pytest.raises(OperationFailed, match="No space left on device"):
            await delete.delete(domain, name, 0)
    del before[name]
    assert states(domain) == before and shows(domain) == disk
    await collect.collect(domain)
    assert states(domain) == before and shows(domain) == disk
    assert not (await collect.planned(domain))[0]


async def test_no_space_for_a_new_image_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    with pytest.MonkeyPatch.context() as patch:

        def full(fd: int, data: bytes, offset: int) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "pwrite", full)
        with pytest.raises(KvikError, match="No space left on device"):
            await take(domain, "s1")
    assert images(tmp_path) == {"disk.qcow2"}
    assert top(domain)[0] == str(tmp_path / "disk.qcow2") and domain.snapshots.journal is None


# The planner ----------------------------------------------------------------------------------------------------

CELLS = 4


class Model:
    """Image files as dictionaries of cells; snapshots and the machine by the file they are in."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[int, int]] = {"base": {0: 1}}
        self.backing: dict[str, str | None] = {"base": None}
        self.tops: dict[str, str] = {"machine": "base"}
        self.made: set[str] = set()
        self.originals: set[str] = {"base"}
        self.count = 0

    def shows(self, path: str) -> dict[int, int]:
        below = self.backing[path]
        return {**(self.shows(below) if below is not None else {}), **self.cells[path]}

    def all(self) -> dict[str, dict[int, int]]:
        return {who: self.shows(path) for who, path in self.tops.items()}

    def overlay(self, below: str) -> str:
        self.count += 1
        path = f"o{self.count}"
        self.cells[path], self.backing[path] = {}, below
        self.made.add(path)
        return path

    def layers(self) -> dict[str, Layer]:
        return {path: Layer(path, below, len(self.cells[path])) for path, below in self.backing.items()}

    def settle(self, busy: Callable[[str], bool] = lambda path: False) -> None:
        for step in plan(self.layers(), set(self.tops.values()), self.made, self.originals, busy=busy):
            assert step.path in self.made, "only what snapshots made is ever removed"
            assert not busy(step.path) and not busy(step.into)
            if step.kind == FORWARD:
                assert self.backing[step.into] == step.path
                self.cells[step.into] = {**self.cells[step.path], **self.cells[step.into]}
                self.backing[step.into] = self.backing[step.path]
            elif step.kind == BACK:
                assert self.backing[step.path] == step.into
                assert step.into not in self.tops.values(), "a file that a snapshot is kept in is never written"
                self.cells[step.into] |= self.cells[step.path]
                for path, below in self.backing.items():
                    if below == step.path:
                        self.backing[path] = step.into
                self.tops = {who: step.into if path == step.path else path for who, path in self.tops.items()}
            del self.cells[step.path], self.backing[step.path]
            self.made.discard(step.path)
            assert step.path not in needed(self.layers(), set(self.tops.values()))


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["write", "create", "revert", "delete", "delete", "busy"]), st.integers(0, 30)),
    max_size=40,
)


@given(OPERATIONS)
@settings(max_examples=300, deadline=None)
def test_after_any_sequence_what_remains_shows_what_it_did(operations: list[tuple[str, int]]) -> None:
    model = Model()
    for turn, (kind, number) in enumerate(operations):
        names = sorted(set(model.tops) - {"machine"})
        before = model.all()
        if kind == "write":
            model.cells[model.tops["machine"]][number % CELLS] = turn
            before = model.all()
        elif kind == "create":
            name = f"s{turn}"
            model.tops[name] = model.tops["machine"]
            model.tops["machine"] = model.overlay(model.tops[name])
            before = model.all()
        elif not names:
            continue
        elif kind == "revert":
            name = names[number % len(names)]
            model.tops["machine"] = model.overlay(model.tops[name])
            before = model.all()
            assert before["machine"] == before[name]
            model.settle()
        else:
            del model.tops[names[number % len(names)]]
            before = model.all()
            chain = needed(model.layers(), {model.tops["machine"]}) if kind == "busy" else set()
            model.settle(lambda path, chain=chain: path in chain)
        assert model.all() == before
        kept = [path for path in model.tops.values() if path in model.tops.values()]
        assert "base" in model.backing, "the first image is the user's"
        if kind in ("revert", "delete"):
            wanted = needed(model.layers(), set(model.tops.values()))
            assert model.made <= wanted, "a file that nothing needs is left"
            for path in wanted - set(kept):
                above = [other for other, below in model.backing.items() if below == path]
                assert len(above) > 1 or (path == "base" and above[0] not in model.made), "two files where one would do"
