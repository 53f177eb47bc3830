"""Snapshots with memory: what belongs to one is kept, goes back and goes away together; also where the daemon dies."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from guillotine import cut
from manager_bench import Bench, until
from snapshot_bench import DISKS, SIZE, disk_xml, images, machine, shows, started, take, top

from kvik.conf.enums import DomainSnapshotCreateFlags as Create
from kvik.conf.enums import DomainSnapshotDeleteFlags as Delete
from kvik.conf.enums import DomainState
from kvik.conf.snapshot import format_snapshot
from kvik.errors import KvikError, OperationFailed, OperationInvalid
from kvik.hypervisor.test.behaviour import Behaviour
from kvik.image.create import create as create_image
from kvik.manager.domain import DomainObject
from kvik.manager.snapshots import create, delete, revert

LIVE = 1
THEN, NOW = b"then" * 1000, b"now" * 1000


def remember(bench: Bench, memory: bytes) -> None:
    bench.driver.machines["a"].memory = memory


def memory(bench: Bench) -> bytes:
    return bench.driver.machines["a"].memory


async def memorable(bench: Bench, tmp_path: Path) -> DomainObject:
    """A machine that runs, with a disk, a TPM and something in its memory."""
    bench.driver.tpms["a"] = tpm = tmp_path / "tpm"
    tpm.mkdir(exist_ok=True)
    (tpm / "tpm2-00.permall").write_bytes(b"then")
    domain = await started(bench, tmp_path)
    remember(bench, THEN)
    return domain


async def with_file(domain: DomainObject, name: str, file: Path, flags: int = 0) -> None:
    xml = f"<domainsnapshot><name>{name}</name><memory snapshot='external' file='{file}'/></domainsnapshot>"
    assert await create.create(domain, xml, flags) == name


async def test_memory_disks_and_tpm_go_back_together(bench: Bench, tmp_path: Path) -> None:
    domain, file = await memorable(bench, tmp_path), tmp_path / "memory"
    bench.events.clear()
    await with_file(domain, "s1", file)
    assert bench.lifecycle() == [(3, 0), (4, 0)]  # suspended, resumed
    assert domain.state == DomainState.RUNNING and memory(bench) == THEN
    snapshot = domain.snapshots.snapshots["s1"]
    assert snapshot.state == "running" and snapshot.external and snapshot.taken is not None
    assert snapshot.taken.pause is not None and Path(top(domain)[0]).name == "disk.s1"
    remember(bench, NOW)
    tpm = bench.driver.tpms["a"] / "tpm2-00.permall"
    tpm.write_bytes(b"now")
    await take(domain, "s2")
    remember(bench, b"later")
    for name, wanted, state in (("s1", THEN, b"then"), ("s2", NOW, b"now"), ("s1", THEN, b"then")):
        bench.events.clear()
        await revert.revert(domain, name, 0)
        assert memory(bench) == wanted and tpm.read_bytes() == state
        assert (domain.state, domain.reason) == (DomainState.RUNNING, 4) and domain.snapshots.current == name
        assert bench.lifecycle()[-1] == (2, 3)  # started: from snapshot
    await revert.revert(domain, "s2", 2)
    assert domain.state == DomainState.PAUSED and memory(bench) == NOW
    await bench.reopen()
    domain = bench.manager.lookup_name("a")
    await revert.revert(domain, "s1", 0)
    assert memory(bench) == THEN
    for name in ("s1", "s2"):
        await delete.delete(domain, name, 0)
    assert not file.exists()
    await domain.destroy()
    await until(lambda: not bench.paths.snapshots.joinpath("a").exists())


async def test_a_disk_that_only_the_run_had_comes_back_with_it(bench: Bench, tmp_path: Path) -> None:
    """Its new image is needed by no definition: it is kept for the machine that is about to run."""
    domain = await memorable(bench, tmp_path)
    create_image(str(tmp_path / "plugged.qcow2"), "qcow2", SIZE)
    await domain.attach_device(disk_xml(tmp_path / "plugged.qcow2", "vdb"), LIVE)
    await take(domain, "s1")
    for _ in range(2):
        await revert.revert(domain, "s1", 0)
        assert domain.state == DomainState.RUNNING and memory(bench) == THEN and domain.run is not None
        running = [disk.source.location for disk in domain.run.live.devices.disks if disk.source is not None]
        assert len(running) == 2 and all(Path(path or "").exists() for path in running)
    await domain.destroy()
    await until(lambda: not (tmp_path / "plugged.s1-now").exists())
    assert (tmp_path / "plugged.qcow2").exists()


async def test_a_paused_machine_comes_back_paused_unless_told_otherwise(bench: Bench, tmp_path: Path) -> None:
    domain = await memorable(bench, tmp_path)
    await domain.suspend()
    await take(domain, "s1")
    assert domain.snapshots.snapshots["s1"].state == "paused" and domain.state == DomainState.PAUSED
    await revert.revert(domain, "s1", 0)
    assert domain.state == DomainState.PAUSED
    await revert.revert(domain, "s1", 1)
    assert domain.state == DomainState.RUNNING and memory(bench) == THEN


async def test_a_tpm_goes_back_with_snapshots_of_disks_as_well(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    bench.driver.tpms["a"] = tpm = tmp_path / "tpm"
    tpm.mkdir()
    (tpm / "tpm2-00.permall").write_bytes(b"then")
    (tpm / "link").symlink_to("/etc/passwd")
    await take(domain, "s1")
    (tpm / "tpm2-00.permall").write_bytes(b"now")
    (tpm / "more").write_bytes(b"now")
    await revert.revert(domain, "s1", 0)
    assert {path.name: path.read_bytes() for path in tpm.iterdir()} == {"tpm2-00.permall": b"then"}
    await delete.delete(domain, "s1", 0)
    assert not bench.paths.snapshots.joinpath("a").exists()


async def test_live_and_halted(bench: Bench, tmp_path: Path) -> None:
    domain = await memorable(bench, tmp_path)
    await take(domain, "s1", Create.LIVE)
    assert "pause" not in bench.driver.machines["a"].commands
    assert domain.state == DomainState.RUNNING
    await take(domain, "s2", Create.HALT)
    assert domain.state == DomainState.SHUTOFF
    await revert.revert(domain, "s2", 0)
    assert memory(bench) == THEN


@pytest.mark.parametrize(
    ("xml", "flags", "why"),
    [
        ("<memory snapshot='external' file='relative'/>", 0, "not absolute"),
        ("<memory snapshot='external' file='/m'/>", DISKS, "disks alone"),
        ("<memory snapshot='no' file='/m'/>", 0, "has no file"),
        ("<memory snapshot='external' file='/nowhere/m'/>", 0, "No such file"),
        ("<memory snapshot='external' file='@taken'/>", 0, "already exists"),
        ("", Create.NO_METADATA, "has to be said"),
    ],
)
async def test_what_cannot_be_is_refused_and_the_guest_goes_on(
    bench: Bench, tmp_path: Path, xml: str, flags: int, why: str
) -> None:
    domain = await memorable(bench, tmp_path)
    (tmp_path / "taken").write_bytes(b"mine")
    with pytest.raises(KvikError, match=why):
        await create.create(
            domain, f"<domainsnapshot><name>s</name>{xml}</domainsnapshot>".replace("@", f"{tmp_path}/"), flags
        )
    assert images(tmp_path) == {"disk.qcow2", "taken"} and not domain.snapshots.snapshots
    assert domain.state == DomainState.RUNNING and await bench.driver.machines["a"].state() == "running"


async def test_the_guest_goes_on_while_its_memory_of_that_instant_is_written(bench: Bench, tmp_path: Path) -> None:
    domain, file = await memorable(bench, tmp_path), tmp_path / "memory"
    bench.events.clear()
    await with_file(domain, "s1", file, Create.LIVE)
    one = bench.driver.machines["a"]
    order = [
        name for name in one.commands if name in ("save-live", "put-on-top", "freeze", "finish", "pause", "resume")
    ]
    assert order == ["save-live", "put-on-top", "freeze", "finish"] and not bench.lifecycle()
    taken = domain.snapshots.snapshots["s1"].taken
    assert taken is not None and taken.pause == 1000 and taken.memory == str(file) and taken.stood is None
    assert taken.tpm is not None and domain.snapshots.current == "s1" and domain.snapshots.journal is None
    remember(bench, NOW)
    await revert.revert(domain, "s1", 0)
    assert memory(bench) == THEN
    # One that cannot stands still, and says why.
    one = bench.driver.machines["a"]
    one.behaviour = Behaviour(stands_still="its memory cannot be protected")
    await take(domain, "s2", Create.LIVE)
    taken = domain.snapshots.snapshots["s2"].taken
    assert taken is not None and taken.stood == "its memory cannot be protected" and taken.memory is not None
    # Without metadata nothing of it is ours afterwards.
    one.behaviour = Behaviour()
    made = set(domain.snapshots.made)
    await with_file(domain, "s3", tmp_path / "other", Create.LIVE | Create.NO_METADATA)
    assert domain.snapshots.made == made and "s3" not in domain.snapshots.snapshots
    assert (tmp_path / "other").exists() and Path(top(domain)[0]).name == "disk.s3"


@pytest.mark.parametrize("flags", [0, Create.LIVE], ids=["still", "live"])
@pytest.mark.parametrize("fault", ["refuses_save", "refuses_snapshot"])
async def test_a_vmm_that_refuses_leaves_nothing_and_goes_on(
    bench: Bench, tmp_path: Path, fault: str, flags: int
) -> None:
    bench.driver.behaviours["a"] = Behaviour(**{fault: "not now"})
    domain = await memorable(bench, tmp_path)
    with pytest.raises(KvikError, match="not now"):
        await with_file(domain, "s1", tmp_path / "memory", flags)
    assert not domain.snapshots.snapshots
    if "put-on-top" in bench.driver.machines["a"].commands and fault == "refuses_save" and flags:
        # Its disk writes to the new image already: that is merged, which this driver does when the machine is off.
        assert images(tmp_path) == {"disk.qcow2", "disk.s1"} and domain.state == DomainState.RUNNING
        await domain.destroy()
        await until(lambda: images(tmp_path) == {"disk.qcow2"})
        return
    assert images(tmp_path) == {"disk.qcow2"} and domain.snapshots.journal is None
    assert domain.state == DomainState.RUNNING and await bench.driver.machines["a"].state() == "running"


async def test_memory_that_is_damaged_is_found_before_anything_ends(bench: Bench, tmp_path: Path) -> None:
    domain, file = await memorable(bench, tmp_path), tmp_path / "memory"
    await with_file(domain, "s1", file)
    remember(bench, NOW)
    data = bytearray(file.read_bytes())
    file.write_bytes(data[:5000])
    with pytest.raises(OperationFailed, match="damaged"):
        await revert.revert(domain, "s1", 0)
    assert memory(bench) == NOW and domain.state == DomainState.RUNNING
    file.unlink()
    with pytest.raises(KvikError, match="No such file"):
        await revert.revert(domain, "s1", 0)
    assert memory(bench) == NOW


async def test_a_document_cannot_name_memory_that_is_read_or_removed(bench: Bench, tmp_path: Path) -> None:
    domain, mine = await memorable(bench, tmp_path), tmp_path / "mine"
    await take(domain, "s1")
    mine.write_bytes(b"not for a snapshot")
    snapshot = domain.snapshots.snapshots["s1"]
    assert snapshot.taken is not None and snapshot.taken.memory is not None
    text = format_snapshot(snapshot, secure=True).replace(snapshot.taken.memory, str(mine))
    await create.create(domain, text.replace("<name>s1<", "<name>s2<", 1), Create.REDEFINE)
    with pytest.raises(OperationInvalid, match="redefined"):
        await revert.revert(domain, "s2", 0)
    await delete.delete(domain, "s2", Delete.METADATA_ONLY)
    await delete.delete(domain, "s1", 0)
    assert mine.read_bytes() == b"not for a snapshot"


# Killed at every change to a file


async def take_one(domain: DomainObject, file: Path) -> None:
    await with_file(domain, "new", file)


async def take_live(domain: DomainObject, file: Path) -> None:
    await with_file(domain, "new", file, Create.LIVE)


async def go_back(domain: DomainObject, file: Path) -> None:
    await revert.revert(domain, "s1", 0)


async def delete_it(domain: DomainObject, file: Path) -> None:
    await delete.delete(domain, "s1", 0)


Operation = Callable[[DomainObject, Path], Awaitable[None]]


@pytest.mark.parametrize(("operation", "stride"), [(take_one, 17), (take_live, 17), (go_back, 13), (delete_it, 5)])
async def test_killed_at_any_change_to_a_file_it_is_there_as_a_whole_or_not_at_all(
    tmp_path: Path, operation: Operation, stride: int
) -> None:
    for steps in range(0, 1000, stride):
        where = tmp_path / str(steps)
        where.mkdir()
        bench = Bench(where)
        await bench.open()
        domain, file = await memorable(bench, where), where / "memory"
        await take(domain, "s1")
        kept = shows(domain)
        remember(bench, NOW)
        fell = await cut(bench, steps, operation(domain, file))
        manager = await bench.open()
        said = f"after {steps} steps of {operation.__name__}"
        try:
            domain = manager.lookup_name("a")
            async with domain.jobs.hold("see the end of", wait=20):
                pass
            assert domain.snapshots.journal is None, said
            if domain.is_active:
                await until(lambda domain=domain: domain.state == DomainState.RUNNING)
                assert memory(bench) in (NOW, THEN if operation is go_back else NOW), said
            else:
                assert operation is go_back, said
            if "s1" in domain.snapshots.snapshots:
                await revert.revert(domain, "s1", 0)
                assert memory(bench) == THEN and shows(domain) == kept, said
            else:
                assert operation is delete_it
                assert not list(bench.paths.snapshots.glob("a/s1*")), said
            if operation in (take_one, take_live):
                assert file.exists() == ("new" in domain.snapshots.snapshots), said
                assert not list(where.glob(".*saving")), said
                if file.exists():
                    await revert.revert(domain, "new", 0)
                    assert memory(bench) == NOW, said
        finally:
            await manager.close()
        shutil.rmtree(where)
        if not fell:
            assert steps > 3
            return
    pytest.fail("the operation never came to its end")
