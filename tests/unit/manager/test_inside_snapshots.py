"""Snapshots inside images: of machines that are off and that run, mixed with others, and where the daemon dies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from guillotine import cut
from manager_bench import Bench, document, until
from snapshot_bench import SIZE, disk_xml, images, machine, shows, started, take, top, write

from kvik.conf.enums import DomainSnapshotCreateFlags as Create
from kvik.conf.enums import DomainSnapshotDeleteFlags as Delete
from kvik.conf.enums import DomainState
from kvik.errors import ConfigUnsupported, KvikError, OperationInvalid
from kvik.hypervisor.driver import Feature
from kvik.hypervisor.test.behaviour import Behaviour
from kvik.image.create import create as create_image
from kvik.image.opening import Opener
from kvik.manager.domain import DomainObject
from kvik.manager.snapshots import create, delete, revert

INSIDE = "<disks><disk name='vda' snapshot='internal'/></disks>"


async def within(domain: DomainObject, name: str, xml: str = INSIDE, flags: int = 0) -> None:
    assert await create.create(domain, f"<domainsnapshot><name>{name}</name>{xml}</domainsnapshot>", flags) == name


def names(path: str | Path) -> list[str]:
    with Opener().open(str(path), "qcow2") as image:
        return [one.name for one in image.snapshots]  # type: ignore[attr-defined]  # a qcow2 has them


async def test_of_a_machine_that_is_off(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    states = {}
    for name in ("s1", "s2"):
        write(domain, 4096, name.encode() * 500)
        states[name] = shows(domain)
        await within(domain, name)
    snapshot = domain.snapshots.snapshots["s2"]
    assert snapshot.internal and not snapshot.external and snapshot.state == "shutoff"
    assert images(tmp_path) == {"disk.qcow2"} and names(top(domain)[0]) == ["s1", "s2"]
    write(domain, 0, os.urandom(5000))
    for name in ("s1", "s2", "s1"):
        await revert.revert(domain, name, 0)
        assert shows(domain) == states[name] and not domain.is_active
    await bench.reopen()
    domain = bench.manager.lookup_name("a")
    assert f"take snapshot s1 out of {top(domain)[0]}" in await delete.planned(domain, "s1", 0)
    await delete.delete(domain, "s1", 0)
    assert names(top(domain)[0]) == ["s2"] and shows(domain) == states["s1"]
    await delete.delete(domain, "s2", Delete.METADATA_ONLY)
    assert names(top(domain)[0]) == ["s2"], "its contents are the user's now"
    assert not bench.paths.snapshots.joinpath("a").exists()


async def test_with_the_memory_of_one_that_runs(bench: Bench, tmp_path: Path) -> None:
    domain = await started(bench, tmp_path)
    bench.driver.machines["a"].memory = b"then"
    then = shows(domain)
    bench.events.clear()
    await within(domain, "s1", "<memory snapshot='internal'/>")
    assert bench.lifecycle() == [(3, 0), (4, 0)] and domain.state == DomainState.RUNNING
    snapshot = domain.snapshots.snapshots["s1"]
    assert snapshot.state == "running" and snapshot.memory is not None and snapshot.memory.snapshot == "internal"
    bench.driver.machines["a"].memory = b"now"
    write(domain, 0, os.urandom(4096))
    await revert.revert(domain, "s1", 0)
    assert bench.driver.machines["a"].memory == b"then" and shows(domain) == then
    assert (domain.state, domain.reason) == (DomainState.RUNNING, 4)
    await delete.delete(domain, "s1", 0)
    assert "delete-inside" in bench.driver.machines["a"].commands and names(top(domain)[0]) == []


@pytest.mark.parametrize(
    ("xml", "flags", "why"),
    [
        ("<disks><disk name='vda' snapshot='internal'/><disk name='vdb' snapshot='external'/></disks>", 0, "not both"),
        ("<disks><disk name='vda' snapshot='internal'/></disks>", 0, "format raw can have no snapshot inside"),
        (INSIDE.replace("</disks>", "<disk name='vdb' snapshot='no'/></disks>"), Create.NO_METADATA, "these options"),
        (INSIDE.replace("</disks>", "<disk name='vdb' snapshot='no'/></disks>"), 0, "inside already"),
    ],
)
async def test_what_cannot_be_is_refused(bench: Bench, tmp_path: Path, xml: str, flags: int, why: str) -> None:
    for name, format in (("x.qcow2", "qcow2"), ("y.raw", "raw")):
        create_image(str(tmp_path / name), format, SIZE)
    disks = disk_xml(tmp_path / "x.qcow2") + disk_xml(tmp_path / "y.raw", "vdb", "raw")
    domain = await bench.manager.define(document(devices=disks))
    if "already" in why:
        from kvik.image.qcow2.snapshotting import create_snapshot

        with Opener().open(str(tmp_path / "x.qcow2"), "qcow2", writable=True) as image:
            create_snapshot(image, "s")  # type: ignore[arg-type]  # a qcow2
    with pytest.raises(ConfigUnsupported, match=why):
        await within(domain, "s", xml, flags)
    assert not domain.snapshots.snapshots and domain.snapshots.journal is None


async def test_a_vmm_that_refuses_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    bench.driver.behaviours["a"] = Behaviour(refuses_save="not now")
    domain = await started(bench, tmp_path)
    with pytest.raises(KvikError, match="not now"):
        await within(domain, "s1", "<memory snapshot='internal'/>")
    assert domain.state == DomainState.RUNNING and not domain.snapshots.snapshots
    bench.driver.without = {Feature.SNAPSHOTS_INSIDE}
    with pytest.raises(KvikError, match="cannot put a machine's memory"):
        await within(domain, "s1", "<memory snapshot='internal'/>")


async def test_nothing_that_others_rest_on_goes_back(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    write(domain, 0, b"inner" * 100)
    await within(domain, "inner")
    write(domain, 0, b"outer" * 100)
    outer = shows(domain)
    await take(domain, "outer")
    write(domain, 0, b"now" * 100)
    now = shows(domain)
    with pytest.raises(OperationInvalid, match="would change"):
        await revert.revert(domain, "inner", 0)
    assert shows(domain) == now
    await revert.revert(domain, "outer", 0)
    assert shows(domain) == outer
    # one in an image that a snapshot made: the image stays, whatever is deleted
    await within(domain, "deep")
    deep = shows(domain)
    await revert.revert(domain, "outer", 0)
    await delete.delete(domain, "outer", 0)
    await revert.revert(domain, "deep", 0)
    assert shows(domain) == deep
    for name in ("inner", "deep"):
        await delete.delete(domain, name, 0)
    assert shows(domain) == deep and names(tmp_path / "disk.qcow2") == []


async def test_what_is_deleted_while_it_cannot_be_taken_out_goes_later(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    await within(domain, "inner")
    await take(domain, "outer")
    await domain.start()
    await delete.delete(domain, "inner", 0)
    assert names(tmp_path / "disk.qcow2") == ["inner"] and domain.snapshots.inside
    await bench.reopen()
    domain = bench.manager.lookup_name("a")
    assert domain.snapshots.inside
    await domain.destroy()
    await until(lambda: not domain.snapshots.inside)
    assert names(tmp_path / "disk.qcow2") == []


Operation = Callable[[DomainObject], Awaitable[None]]


async def take_one(domain: DomainObject) -> None:
    await within(domain, "new", "<memory snapshot='internal'/>" if domain.is_active else INSIDE)


async def go_back(domain: DomainObject) -> None:
    await revert.revert(domain, "s1", 0)


async def delete_it(domain: DomainObject) -> None:
    await delete.delete(domain, "s1", 0)


@pytest.mark.parametrize(
    ("operation", "running", "stride"),
    [(take_one, False, 13), (take_one, True, 13), (go_back, False, 11), (delete_it, False, 11), (delete_it, True, 11)],
)
async def test_killed_at_any_change_to_a_file_nothing_is_lost(
    tmp_path: Path, operation: Operation, running: bool, stride: int
) -> None:
    for steps in range(0, 1000, stride):
        where = tmp_path / str(steps)
        where.mkdir()
        bench = Bench(where)
        await bench.open()
        domain = await machine(bench, where)
        write(domain, 0, b"then" * 500)
        then = shows(domain)
        await within(domain, "s1")
        write(domain, 0, b"now" * 500)
        now = shows(domain)
        if running:
            await domain.start()
        fell = await cut(bench, steps, operation(domain))
        manager = await bench.open()
        said = f"after {steps} steps of {operation.__name__}"
        try:
            domain = manager.lookup_name("a")
            for _ in range(2):  # what the daemon does by itself when it starts is done
                async with domain.jobs.hold("see the end of", wait=20):
                    pass
            tree = domain.snapshots
            assert tree.journal is None, said
            assert shows(domain) in ((now, then) if operation is go_back else (now,)), said
            assert sorted(tree.snapshots) == sorted(names(where / "disk.qcow2")) or tree.inside, said
            assert not tree.inside, said
            if running:
                assert domain.state == DomainState.RUNNING, said
                await domain.destroy()
            if "s1" in tree.snapshots:
                await revert.revert(domain, "s1", 0)
                assert shows(domain) == then, said
            if "new" in tree.snapshots and not running:
                await revert.revert(domain, "new", 0)
                assert shows(domain) == now, said
        finally:
            await manager.close()
        shutil.rmtree(where)
        if not fell:
            assert steps > 3
            return
    pytest.fail("the operation never came to its end")
