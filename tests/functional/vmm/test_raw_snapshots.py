"""Snapshots of a running kvik-vmm's own disks: raw images that no other process serves, and others beside them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from blk_guest import BlkDriver, wait_key
from disk_world import World, checked, daemons, disk, idle, image, raw, soon, take, told, tops, word, writes
from guests import needs_kvm
from tiny_kernel import IDLE, say

from kvik.conf.enums import DomainState
from kvik.errors import KvikError, OperationUnsupported, ResourceBusy
from kvik.image.lock import lock_image
from kvik.manager.saved import machine as saved
from kvik.manager.snapshots import delete, revert

pytestmark = [pytest.mark.functional, needs_kvm]


def opened_for_writing(pid: int, path: Path) -> bool:
    found = set()
    for item in Path(f"/proc/{pid}/fd").iterdir():
        if item.exists() and item.samefile(path):
            flags = (item.parents[1] / "fdinfo" / item.name).read_text().split("flags:")[1].split()[0]
            found.add(int(flags, 8) & os.O_ACCMODE)
    assert found
    return found != {os.O_RDONLY}


async def test_raw_disks_of_the_vmm_and_one_of_kvik_blk_change_over_together(world: World) -> None:
    a, b = raw(world.root / "a.raw"), raw(world.root / "b.raw")
    c = image(world.root / "c.qcow2")
    xml = disk(a, "raw") + disk(b, "raw", slot=6, dev="vdb", options=" cache='none'") + disk(c, slot=7, dev="vdc")
    domain = await world.start(writes(BlkDriver(5), BlkDriver(6), BlkDriver(7)), xml)
    assert len(daemons(domain)) == 1 and domain.pid is not None
    await told(world, b"up")
    await told(world, b"oneoneone")
    held = await take(domain, "s1")
    print(f"the guest stood still for {held / 1000:.1f} ms")
    assert domain.state == DomainState.RUNNING and tops(domain) == ["a.s1", "b.s1", "c.s1"]
    await told(world, b"twotwotwo")
    assert [word(path) for path in (a, b, c)] == [b"one"] * 3
    # nobody there can write to it any more, and others may read it
    assert not any(opened_for_writing(domain.pid, path) for path in (a, b))
    with a.open("r+b") as other, pytest.raises(ResourceBusy):
        lock_image(other.fileno(), "other", write=True)
    with a.open("rb") as other:
        lock_image(other.fileno(), "other", write=False)
    # the next daemon knows who writes where: another one, figures, a new size, limits
    domain = await world.next_manager()
    figures = await domain.stats()
    assert figures["block.0.wr.reqs"] == 2 and figures["block.0.capacity"] == 8 << 20
    await take(domain, "s2")
    await told(world, b"threethreethree")
    assert [word(world.root / f"a.{name}") for name in ("s1", "s2")] == [b"two", b"three"]
    await delete.delete(domain, "s1", 0)
    await domain.destroy()
    await idle(domain)
    await soon(lambda: not (world.root / "a.s1").exists() or not (world.root / "a.s2").exists())
    for path in [*world.root.glob("[abc].s*"), c]:
        checked(path)
    assert [word(world.root / name) for name in tops(domain)] == [b"three"] * 3
    await revert.revert(domain, "s2", 0)
    assert [word(world.root / name) for name in tops(domain)] == [b"two"] * 3


async def test_a_guest_goes_back_with_its_memory_to_a_disk_that_another_process_serves(world: World) -> None:
    """Its driver began with kvik-vmm's own disk, and goes on with kvik-blk's: the word that it writes next is in its
    memory."""
    a, b = raw(world.root / "a.raw"), raw(world.root / "b.raw")
    xml = disk(a, "raw") + disk(b, "raw", slot=6, dev="vdb")
    domain = await world.start(writes(BlkDriver(5), BlkDriver(6)), xml)
    await told(world, b"up")
    await told(world, b"oneone")
    held = await take(domain, "s1", 0)
    print(f"with its memory the guest stood still for {held / 1000:.1f} ms")
    assert domain.state == DomainState.RUNNING and tops(domain) == ["a.s1", "b.s1"] and not daemons(domain)
    await told(world, b"twotwo")
    await told(world, b"threethree")
    assert [word(path) for path in (a, b)] == [b"one", b"one"]
    # Saved, and restored: its own disks until then, kvik-blk's from then on.
    await saved.managed_save(domain, 0)
    assert not domain.is_active
    for name in tops(domain):
        checked(world.root / name)
    await domain.start()
    world.connect()
    assert len(daemons(domain)) == 2
    await told(world, b"fourfour")
    assert [word(world.root / name) for name in tops(domain)] == [b"four", b"four"]
    for _ in range(2):
        await revert.revert(domain, "s1", 0)
        assert domain.state == DomainState.RUNNING and len(daemons(domain)) == 2
        assert [word(world.root / name) for name in tops(domain)] == [b"one", b"one"]
        world.connect()
        await told(world, b"twotwo")
        assert [word(path) for path in (a, b)] == [b"one", b"one"]
    await delete.delete(domain, "s1", 0)
    await domain.destroy()
    await idle(domain)
    for name in tops(domain):
        if not name.endswith(".raw"):
            checked(world.root / name)
        assert word(world.root / name) == b"two"


async def test_a_disk_that_was_plugged_in_has_snapshots_and_goes_again(world: World) -> None:
    a, b = raw(world.root / "a.raw"), raw(world.root / "b.raw")
    plugged = BlkDriver(8)
    code = wait_key() + plugged.start() + say(b"up.")
    for text in (b"one", b"two"):
        code += wait_key() + plugged.write(16, text) + plugged.flush() + say(text + b".")
    code += wait_key() + plugged.eject_when_asked()
    domain = await world.start(code + IDLE, disk(a, "raw"))
    assert domain.run is not None and domain.pid is not None
    xml = disk(b, "raw", slot=8, dev="vdb")
    await domain.attach_device(xml)
    await told(world, b"up")
    await told(world, b"one")
    await take(domain, "s1")
    await told(world, b"two")
    live = domain.run.live.devices.disks
    assert [Path(item.source.file or "").name for item in live if item.source] == ["a.s1", "b.s1"]
    assert (word(b), word(world.root / "b.s1")) == (b"one", b"two")
    world.key()
    await domain.detach_device(disk(world.root / "b.s1", slot=8, dev="vdb"))
    await soon(lambda: len(live) == 1)
    opened = [os.readlink(item) for item in Path(f"/proc/{domain.pid}/fd").iterdir()]
    assert not any("/b." in path for path in opened)
    checked(world.root / "b.s1")
    # the same place and name again, now for one that the VMM cannot have by itself: its memory is its own
    with pytest.raises(OperationUnsupported, match="memory that can be shared"):
        await domain.attach_device(disk(world.root / "b.s1", slot=8, dev="vdb"))
    await domain.attach_device(disk(raw(world.root / "c.raw"), "raw", slot=8, dev="vdb"))


async def test_a_machine_without_such_a_disk_at_its_start_says_so(world: World) -> None:
    """Its code is not there, and confined it cannot be fetched."""
    domain = await world.start(IDLE)
    await domain.attach_device(disk(raw(world.root / "a.raw"), "raw", slot=8))
    with pytest.raises(KvikError, match="started without a disk of this kind"):
        await take(domain, "s1")
    assert domain.state == DomainState.RUNNING and not list(world.root.glob("*.s1"))
    assert domain.snapshots.journal is None


async def test_a_killed_vmm_loses_nothing_that_was_flushed(world: World) -> None:
    """Its image is whole for the process that serves it next."""
    a = raw(world.root / "a.raw")
    driver = BlkDriver(5)
    code = wait_key() + driver.start() + say(b"up.")
    for text in (b"one", b"two"):
        code += wait_key() + driver.write(16, text) + driver.flush() + say(text + b".")
    for sector in range(0, 4096, 160):  # new clusters, none of them flushed
        code += driver.write(1024 + sector, b"more")
    domain = await world.start(code + say(b"written.") + IDLE, disk(a, "raw"))
    await told(world, b"up")
    await told(world, b"one")
    await take(domain, "s1")
    await told(world, b"two")
    await world.said(b"written.")
    assert domain.pid is not None
    os.kill(domain.pid, signal.SIGKILL)
    await soon(lambda: not domain.is_active)
    assert (word(a), word(world.root / "a.s1")) == (b"one", b"two")
    await domain.start()
    assert len(daemons(domain)) == 1
    await domain.destroy()
    checked(world.root / "a.s1")
    assert (word(a), word(world.root / "a.s1")) == (b"one", b"two")
