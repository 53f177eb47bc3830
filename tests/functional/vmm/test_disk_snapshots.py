"""Snapshots of a kvik-vmm that runs: real kvik-blks, a guest of a few hundred bytes that writes when it is told to."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from blk_guest import BlkDriver
from disk_world import (
    Death,
    Killed,
    World,
    checked,
    daemons,
    disk,
    idle,
    image,
    raw,
    take,
    told,
    tops,
    two,
    word,
    writes,
)
from guests import needs_kvm
from tiny_kernel import IDLE

from kvik.conf.enums import DomainSnapshotCreateFlags as Create
from kvik.conf.enums import DomainSnapshotRevertFlags as Revert
from kvik.conf.enums import DomainState
from kvik.errors import KvikError, MonitorError, OperationUnsupported
from kvik.manager.domain import DomainObject
from kvik.manager.snapshots import create, delete, revert
from kvik.manager.store import Store
from kvik.qmp.aio import QmpConnection

pytestmark = [pytest.mark.functional, needs_kvm]


async def test_what_the_guest_writes_goes_to_the_new_images_of_all_disks(world: World) -> None:
    paths, code, xml = two(world)
    domain = await world.start(code, xml)
    await told(world, b"up")
    await told(world, b"oneone")
    held = await take(domain, "s1")
    print(f"the guest stood still for {held / 1000:.1f} ms")
    assert domain.state == DomainState.RUNNING and tops(domain) == ["a.s1", "b.s1"]
    await told(world, b"twotwo")
    assert [word(path) for path in paths] == [b"one", b"one"]
    # paused: it stays so; and the next daemon knows the chain
    await domain.suspend()
    assert await take_paused(domain, "s2") and domain.state == DomainState.PAUSED
    domain = await world.next_manager()
    await domain.resume()
    await told(world, b"threethree")
    await take(domain, "s3")
    await told(world, b"fourfour")
    assert [word(world.root / f"a.{name}") for name in ("s1", "s2")] == [b"two", b"three"]
    # what is deleted is merged while it runs, but into or out of what the guest writes to; going back starts it there
    await delete.delete(domain, "s2", 0)
    await idle(domain)
    assert len([path for path in world.root.glob("a.s[123]") if path.name != "a.s3"]) == 1
    await domain.destroy()
    await idle(domain)
    for path in [*world.root.glob("[ab].s*"), *paths]:
        if path.suffix != ".sock":
            checked(path)
    assert [word(world.root / name) for name in tops(domain)] == [b"four", b"four"]
    await revert.revert(domain, "s1", 0)
    assert [word(world.root / name) for name in tops(domain)] == [b"one", b"one"]


async def take_paused(domain: DomainObject, name: str) -> bool:
    await create.create(domain, f"<domainsnapshot><name>{name}</name></domainsnapshot>", Create.DISK_ONLY)
    return name in domain.snapshots.snapshots


async def test_a_guest_goes_back_with_its_memory(world: World) -> None:
    """The word that it writes next is in its memory: back there, it writes that one again."""
    path = image(world.root / "a.qcow2")
    domain = await world.start(writes(BlkDriver(5)), disk(path))
    await told(world, b"up")
    await told(world, b"one")
    held = await take(domain, "s1", 0)
    print(f"with its memory the guest stood still for {held / 1000:.1f} ms")
    assert domain.state == DomainState.RUNNING and tops(domain) == ["a.s1"]
    await told(world, b"two")
    await told(world, b"three")
    assert word(path) == b"one"
    for _ in range(2):
        await revert.revert(domain, "s1", 0)
        assert domain.state == DomainState.RUNNING and word(world.root / tops(domain)[0]) == b"one"
        world.connect()
        await told(world, b"two")
        assert word(path) == b"one"
    await revert.revert(domain, "s1", Revert.PAUSED)
    assert domain.state == DomainState.PAUSED
    await delete.delete(domain, "s1", 0)
    assert not list(world.root.rglob("*.mem"))


async def test_disks_that_can_have_none_now_are_named(world: World) -> None:
    path = raw(world.root / "a.raw")
    own = image(world.root / "b.qcow2")
    theirs = image(world.root / "c.qcow2")
    xml = disk(path, "raw", options=" error_policy='stop'") + disk(own, slot=6, dev="vdb")
    xml += disk(theirs, slot=7, dev="vdc", name="qemu-storage-daemon")
    domain = await world.start(IDLE, xml)
    document = "<domainsnapshot><name>s1</name><disks>{}</disks></domainsnapshot>"
    next_start = "could not be started again .* errors of such a disk"
    for target, others, words in (("vda", ("vdc",), next_start), ("vdc", ("vda",), "qemu-storage-daemon")):
        left = "".join(f"<disk name='{name}' snapshot='no'/>" for name in others)
        with pytest.raises(OperationUnsupported, match=f"disk {target} .*{words}") as refused:
            await create.create(domain, document.format(left), Create.DISK_ONLY)
        assert f"--diskspec {target},snapshot=no" in refused.value.remedy
    assert not domain.snapshots.snapshots and domain.snapshots.journal is None and not list(world.root.glob("*.s1"))
    left = "".join(f"<disk name='{name}' snapshot='no'/>" for name in ("vda", "vdc"))
    await create.create(domain, document.format(left), Create.DISK_ONLY)
    assert tops(domain) == ["a.raw", "b.s1", "c.qcow2"]


async def test_one_disk_that_cannot_leaves_all_as_they_were(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [image(world.root / "a.qcow2"), image(world.root / "b.qcow2")]
    domain = await world.start(writes(BlkDriver(5), BlkDriver(6)), disk(paths[0]) + disk(paths[1], slot=6, dev="vdb"))
    await told(world, b"up")
    await told(world, b"oneone")
    original = QmpConnection.execute
    asked: list[str] = []

    async def execute(connection: QmpConnection, command: str, *given: Any, **more: Any) -> Any:
        asked.append(command)
        if command == "x-kvik-overlay-put" and asked.count(command) == 2:
            raise MonitorError("no room for its tables")
        return await original(connection, command, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(QmpConnection, "execute", execute)
        with pytest.raises(MonitorError, match="no room"):
            await take(domain, "s1")
    assert asked.count("x-kvik-overlay-put") == 2
    assert domain.state == DomainState.RUNNING and tops(domain) == ["a.qcow2", "b.qcow2"]
    assert not domain.snapshots.snapshots and not list(world.root.glob("*.s1"))
    await told(world, b"twotwo")
    assert [word(path) for path in paths] == [b"two", b"two"]
    # a process that was killed: no snapshot until another has taken its place
    os.kill(daemons(domain)[1][0], signal.SIGKILL)
    with pytest.raises(KvikError):
        await take(domain, "s2")
    assert domain.state == DomainState.RUNNING and tops(domain) == ["a.qcow2", "b.qcow2"]
    assert domain.snapshots.journal is None and not list(world.root.glob("*.s2"))
    await told(world, b"threethree")
    await take(domain, "s2")
    assert tops(domain) == ["a.s2", "b.s2"]


@pytest.mark.parametrize("first", ["qcow2", "raw"])
async def test_the_daemon_is_killed_at_each_command_of_a_snapshot(
    world: World, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Whichever it is: the guest goes on, all its disks have the new images or none, and no word is lost. A raw one is
    kvik-vmm's own, the other another process's."""
    paths = [(raw if first == "raw" else image)(world.root / f"a.{first}"), image(world.root / "b.qcow2")]
    code = writes(BlkDriver(5), BlkDriver(6), words=(b"x",) * 40)
    domain = await world.start(code, disk(paths[0], first) + disk(paths[1], slot=6, dev="vdb"))
    await told(world, b"up")
    stands: list[bool] = []
    for number in range(30):
        death = Death(number)
        with monkeypatch.context() as patch:
            patch.setattr(QmpConnection, "execute", death.commands(QmpConnection.execute))
            patch.setattr(Store, "run", death.files(Store.run))
            try:
                await create.create(domain, f"<domainsnapshot><name>n{number}</name></domainsnapshot>", 16)
            except (Killed, KvikError):
                assert death.came
            await world.bury(domain)
        domain = await world.after_death()
        assert domain.state == DomainState.RUNNING and domain.snapshots.journal is None, number
        new = {Path(name).suffix == f".n{number}" for name in tops(domain)}
        assert len(new) == 1, number
        stands.append(new.pop())
        assert stands[-1] == (f"n{number}" in domain.snapshots.snapshots), number
        assert stands[-1] or not list(world.root.glob(f"*.n{number}")), number
        await told(world, b"xx")
        assert [word(world.root / name) for name in tops(domain)] == [b"x", b"x"]
        if not death.came:
            break
    else:
        pytest.fail("the snapshot never came to its end")
    assert not all(stands) and any(stands[:-1])
    await domain.destroy()
    for name in tops(domain):
        checked(world.root / name)
