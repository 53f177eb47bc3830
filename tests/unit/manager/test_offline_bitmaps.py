"""What checkpoints tell of a machine that is off, whose snapshots are taken, gone back to and deleted meanwhile: all
that differs from then, or that it is not known."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from guillotine import cut
from manager_bench import Bench
from snapshot_bench import SIZE, machine, take, top, write

from kvik.conf.checkpoint import Checkpoint, CheckpointDisk, CheckpointDisks, TrackedImage, TrackedImages
from kvik.conf.devices.disk import BackingStore, Disk, DiskDriver, DiskSource, DiskTarget, Format
from kvik.errors import CheckpointInconsistent
from kvik.hypervisor.driver import Bitmap
from kvik.image.opening import Opener
from kvik.image.qcow2.bitmap_changes import BitmapChanges
from kvik.image.qcow2.bitmaps import AUTO, IN_USE, read_bits
from kvik.image.qcow2.reader import Qcow2Reader
from kvik.image.qcow2.writer import Qcow2Writer
from kvik.manager.checkpoints import chain
from kvik.manager.checkpoints.store import store_of
from kvik.manager.domain import DomainObject
from kvik.manager.snapshots import delete, revert
from kvik.storage import overlays

BLOCK = 65536


def content(domain: DomainObject) -> bytes:
    path, format = top(domain)
    with Opener().open(path, format) as image:
        return image.read(0, image.size)


def blocks(one: bytes, other: bytes) -> set[int]:
    return {at for at in range(SIZE // BLOCK) if one[at * BLOCK :][:BLOCK] != other[at * BLOCK :][:BLOCK]}


def track(domain: DomainObject, name: str) -> bytes:
    """A checkpoint as a running machine makes one; what the disk holds then."""
    path, _ = top(domain)
    with Opener().open(path, "qcow2", writable=True) as image:
        assert isinstance(image, Qcow2Writer)
        changes = BitmapChanges(image)
        changes.add(name, BLOCK)
        changes.store()
    checkpoint = Checkpoint(
        name=name,
        creation_time=7,
        disks=CheckpointDisks(disks=[CheckpointDisk(name="vda", checkpoint="bitmap")]),
        images=TrackedImages(images=[TrackedImage(disk="vda", path=path)]),
    )
    store_of(domain).write(checkpoint)
    domain.checkpoints.all[name] = checkpoint
    return content(domain)


def changed(domain: DomainObject, name: str) -> set[int]:
    """The blocks that an incremental backup would hold. Raises `CheckpointInconsistent`."""
    path: str | None = top(domain)[0]
    paths: list[str] = []
    while path is not None:
        paths.append(path)
        path = overlays.look(path, "qcow2").backing
    known: dict[int, dict[str, Bitmap]] = {}
    bits: dict[int, bytearray] = {}
    below: BackingStore | None = None
    for key, path in enumerate(reversed(paths), 1):
        with Opener().open(path, "qcow2", chain=False) as image:
            assert isinstance(image, Qcow2Reader)
            known[key] = {
                one.name: Bitmap(one.granularity, 0, bool(one.flags & AUTO), True, bool(one.flags & IN_USE))
                for one in image.bitmaps
            }
            for one in image.bitmaps:
                if one.name == name:
                    bits[key] = read_bits(image, one)
        if key < len(paths):
            source = DiskSource(file=path)
            below = BackingStore(
                type="file", index=key, format=Format(type="qcow2"), source=source, backing_store=below
            )
    disk = Disk(
        driver=DiskDriver(type="qcow2"),
        source=DiskSource(file=paths[0], index=len(paths)),
        backing_store=below,
        target=DiskTarget(dev="vda", bus="virtio"),
    )
    sources = chain.sources(disk, domain.checkpoints.get(name), known)
    return {at for at in range(SIZE // BLOCK) for key, _ in sources if bits[key][at >> 3] >> (at & 7) & 1}


async def test_an_incremental_backup_goes_on_over_snapshots_taken_while_it_is_off(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    write(domain, 0, b"x" * BLOCK)
    then = track(domain, "monday")
    write(domain, 2 * BLOCK, b"a")
    await take(domain, "s1")
    assert changed(domain, "monday") == {2}
    write(domain, 5 * BLOCK, b"b")
    later = track(domain, "tuesday")
    write(domain, 7 * BLOCK, b"c")
    await take(domain, "s2")
    write(domain, 9 * BLOCK, b"d")
    assert changed(domain, "monday") == {2, 5, 7, 9} == blocks(then, content(domain))
    assert changed(domain, "tuesday") == {7, 9} == blocks(later, content(domain))
    # In a daemon that comes later, and with what lay between merged.
    domain = (await bench.reopen()).lookup_name("a")
    await delete.delete(domain, "s1", 0)
    assert changed(domain, "monday") >= {2, 5, 7, 9}
    assert changed(domain, "tuesday") >= {7, 9}
    # On a branch from before tuesday's checkpoint nothing is known of tuesday, and all of monday.
    await take(domain, "s3")
    await delete.delete(domain, "s2", 0)
    assert changed(domain, "monday") >= {2, 5, 7, 9} and changed(domain, "tuesday") >= {7, 9}
    await delete.delete(domain, "s3", 0)
    assert changed(domain, "monday") >= {2, 5, 7, 9} and changed(domain, "tuesday") >= {7, 9}


async def test_what_was_changed_and_changed_back_is_told_of_after_a_merge(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    write(domain, 3 * BLOCK, b"x" * BLOCK)
    await take(domain, "s0")
    write(domain, 3 * BLOCK, b"y" * BLOCK)
    track(domain, "monday")
    write(domain, 3 * BLOCK, b"x" * BLOCK)
    await take(domain, "s1")
    write(domain, 5 * BLOCK, b"z" * 6 * BLOCK)
    middle = overlays.look(top(domain)[0], "qcow2").backing
    await delete.delete(domain, "s1", 0)
    assert not Path(str(middle)).exists(), "it was to be merged into what rests on it"
    assert changed(domain, "monday") >= {3, 5}


async def test_going_back_to_before_a_checkpoint_leaves_it_unknown(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    then = track(domain, "monday")
    write(domain, BLOCK, b"a")
    await take(domain, "s1")
    track(domain, "tuesday")
    write(domain, 3 * BLOCK, b"b")
    await revert.revert(domain, "s1", 0)
    write(domain, 4 * BLOCK, b"c")
    assert changed(domain, "monday") == {1, 4} == blocks(then, content(domain))
    with pytest.raises(CheckpointInconsistent, match="has no bitmap 'tuesday'"):
        changed(domain, "tuesday")


async def test_going_back_inside_an_image_takes_its_bitmaps_away(bench: Bench, tmp_path: Path) -> None:
    from kvik.manager.snapshots import create

    domain = await machine(bench, tmp_path)
    write(domain, 0, b"a")
    xml = "<domainsnapshot><name>s1</name><disks><disk name='vda' snapshot='internal'/></disks></domainsnapshot>"
    await create.create(domain, xml, 0)
    before = content(domain)
    track(domain, "monday")
    write(domain, BLOCK, b"b")
    await revert.revert(domain, "s1", 0)
    assert content(domain) == before and domain.snapshots.journal is None
    with pytest.raises(CheckpointInconsistent, match="has no bitmap 'monday'"):
        changed(domain, "monday")


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_done_nothing_that_differs_is_missing(bench: Bench, tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    domain = await machine(bench, tmp_path)
    then: dict[str, bytes] = {}
    names = iter(range(1000))
    asked = 0
    for _ in range(45):
        snapshots = sorted(domain.snapshots.snapshots)
        action = dice.choice(["write", "write", "write", "undo", "take", "take", "track", "revert", "delete", "delete"])
        if action == "write":
            write(domain, dice.randrange(SIZE // BLOCK) * BLOCK, bytes([dice.randrange(256)]) * dice.choice([1, BLOCK]))
        elif action == "undo" and then:  # back to what it was at some checkpoint: it differs from others all the same
            at = dice.randrange(SIZE // BLOCK) * BLOCK
            write(domain, at, dice.choice(list(then.values()))[at : at + BLOCK])
        elif action == "take" and len(snapshots) < 5:
            await take(domain, f"s{next(names)}")
        elif action == "track" and len(then) < 4:
            name = f"c{next(names)}"
            then[name] = track(domain, name)
        elif action == "revert" and snapshots:
            await revert.revert(domain, dice.choice(snapshots), 0)
        elif action == "delete" and snapshots:
            await delete.delete(domain, dice.choice(snapshots), dice.choice([0, 0, 1]))
        for name, was in then.items():
            try:
                marked = changed(domain, name)
            except CheckpointInconsistent:
                continue
            asked += 1
            assert blocks(was, content(domain)) <= marked, f"{name} after {action}"
    assert asked > 20


@pytest.mark.parametrize("name", ["s0", "s1", "s2"])
async def test_killed_amid_a_merge_no_checkpoint_tells_less(tmp_path: Path, name: str) -> None:
    where, kept = tmp_path / "now", tmp_path / "before"
    (where / "disks").mkdir(parents=True)
    bench = Bench(where)
    await bench.open()
    domain = await machine(bench, where / "disks")
    then = {}
    for number in range(3):
        then[f"c{number}"] = track(domain, f"c{number}")
        write(domain, number * BLOCK, b"a" * BLOCK)
        await take(domain, f"s{number}")
        write(domain, (number + 8) * BLOCK, b"b" * BLOCK * (3 - number))
    now = content(domain)
    await bench.manager.close()
    shutil.copytree(where, kept, symlinks=True)
    for steps in range(0, 400, 3):
        shutil.rmtree(where)
        shutil.copytree(kept, where, symlinks=True)
        bench = Bench(where)
        domain = (await bench.open()).lookup_name("a")
        fell = await cut(bench, steps, delete.delete(domain, name, 0))
        manager = await bench.open()
        domain = manager.lookup_name("a")
        async with domain.jobs.hold("see the end of", wait=20):
            pass
        assert content(domain) == now
        for checkpoint, was in then.items():
            try:
                assert blocks(was, now) <= changed(domain, checkpoint), f"{checkpoint} after {steps} steps"
            except CheckpointInconsistent:
                assert fell
        await manager.close()
        if not fell:
            return
    pytest.fail("it never came to its end")


async def test_bitmaps_that_were_not_written_are_not_gone_on_with(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    track(domain, "monday")
    image = Opener().open(top(domain)[0], "qcow2", writable=True)
    image.write(0, b"a")
    os.close(image.fd)  # as a VMM that dies: the bitmap stays marked as in use
    image.fd = image.data_fd = -1
    await take(domain, "s1")
    with pytest.raises(CheckpointInconsistent, match="has no bitmap 'monday'"):
        changed(domain, "monday")
    await delete.delete(domain, "s1", 0)
    with pytest.raises(CheckpointInconsistent):
        changed(domain, "monday")
