"""Power lost at any moment of any change: the image opens, is whole, and has everything that was flushed.

`KVIK_POWER_STATES` sets how many states are tried in all (20,000 by default).
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from functional.image.conftest import qemu_img
from functional.image.power_loss import Model, Recorder, is_allowed, memory_file, states
from kvik.errors import ImageError
from kvik.image.commit import commit, empty
from kvik.image.create import create
from kvik.image.opening import Opener
from kvik.image.qcow2.amend import amend
from kvik.image.qcow2.bitmap_changes import BitmapChanges
from kvik.image.qcow2.check import check
from kvik.image.qcow2.reader import Qcow2Reader
from kvik.image.qcow2.repair import repair
from kvik.image.qcow2.snapshotting import apply_snapshot, create_snapshot, delete_snapshot
from kvik.image.qcow2.writer import Qcow2Writer
from kvik.image.resize import resize
from kvik.storage import overlays

STATES = int(os.environ.get("KVIK_POWER_STATES", "20000"))
KINDS: dict[str, dict[str, object]] = {
    "small": {"cluster_size": 512},
    "v2": {"cluster_size": 1024, "compat": "0.10"},
    "wide": {"cluster_size": 2048, "refcount_bits": 64},
    "extended": {"cluster_size": 16384, "extended_l2": True},
}
SIZE = 96 << 10
FORMAT = "qcow2"


def write_some(image: Qcow2Writer, model: bytearray, dice: random.Random, count: int) -> None:
    for _ in range(count):
        offset = dice.randrange(len(model) // 512) * 512
        length = min(len(model) - offset, dice.choice((512, 2048, 8192)))
        what = dice.randrange(4)
        if what < 2:
            data = dice.randbytes(512) * (length // 512)
            image.write(offset, data)
            model[offset : offset + length] = data
        else:
            image.write_zeroes(offset, length, discard=what == 3)
            model[offset : offset + length] = bytes(length)


class Scenario:
    """An image in a memory file, a model of it, and the record of what is done."""

    def __init__(self, kind: str, dice: random.Random) -> None:
        self.dice = dice
        self.kind = kind
        self.fd = memory_file()
        create(self.fd, FORMAT, SIZE, **KINDS[kind])
        self.disk = bytearray(SIZE)
        self.snapshots: dict[str, bytes] = {}
        with self.writer() as image:
            write_some(image, self.disk, dice, 6)
            create_snapshot(image, "first")
            self.snapshots["first"] = bytes(self.disk)
            write_some(image, self.disk, dice, 4)
        self.recorder = Recorder({"image": self.fd})
        self.recorder.step(self.model())

    def writer(self) -> Qcow2Writer:
        return Qcow2Writer(os.dup(self.fd), "image")

    def model(self, *, atomic: bool = False) -> Model:
        return Model(bytes(self.disk), self.snapshots, atomic=atomic)


def write_twice(image: Qcow2Writer, scenario: Scenario) -> None:
    for _ in range(2):  # a model for each: what the first wrote may be there as long as the second has not come
        write_some(image, scenario.disk, scenario.dice, 1)
        scenario.recorder.step(scenario.model(), durable=False)


def do_write(scenario: Scenario) -> None:
    with scenario.writer() as image:
        for _ in range(3):
            for _ in range(3):
                write_some(image, scenario.disk, scenario.dice, 1)
                scenario.recorder.step(scenario.model(), durable=False)
            image.flush()
            scenario.recorder.step(scenario.model())


def do_create_snapshot(scenario: Scenario) -> None:
    for name in ("second", "third"):
        with scenario.writer() as image:
            create_snapshot(image, name)
            scenario.snapshots[name] = bytes(scenario.disk)
            scenario.recorder.step(scenario.model(atomic=True))
            write_some(image, scenario.disk, scenario.dice, 1)
            scenario.recorder.step(scenario.model(), durable=False)
        scenario.recorder.step(scenario.model())


def do_apply_snapshot(scenario: Scenario) -> None:
    with scenario.writer() as image:
        apply_snapshot(image, "first")
        scenario.disk[:] = scenario.snapshots["first"]
        scenario.recorder.step(scenario.model(atomic=True))
        write_twice(image, scenario)
    scenario.recorder.step(scenario.model())


def do_delete_snapshot(scenario: Scenario) -> None:
    with scenario.writer() as image:
        delete_snapshot(image, image.snapshots[0])
        del scenario.snapshots["first"]
        scenario.recorder.step(scenario.model(atomic=True))
        write_twice(image, scenario)
    scenario.recorder.step(scenario.model())


def do_amend(scenario: Scenario) -> None:
    """Every kind of change; nothing that is read changes."""
    with scenario.writer() as image:
        version, bits = image.header.version, 1 << image.header.refcount_order
        amend(image, compat="1.1")
        for width in (32, 4):
            amend(image, refcount_bits=width)
        amend(image, lazy_refcounts=True)
        if version == 2:
            delete_snapshot(image, image.snapshots[0])  # whose zeros version 2 has not
            del scenario.snapshots["first"]
            scenario.recorder.step(scenario.model(atomic=True))
            amend(image, compat="0.10", lazy_refcounts=False, refcount_bits=16)
        else:
            amend(image, refcount_bits=bits)
    scenario.recorder.step(scenario.model())


def do_bitmaps(scenario: Scenario) -> None:
    """Bitmaps come, record writes, and go."""
    with scenario.writer() as image:
        if image.header.version < 3:
            amend(image, compat="1.1")
        changes = BitmapChanges(image)
        changes.add("one", 512)
        changes.add("two")
        changes.store()
    with scenario.writer() as image:
        write_twice(image, scenario)
    scenario.recorder.step(scenario.model())
    with scenario.writer() as image:
        changes = BitmapChanges(image)
        changes.merge("two", "one")
        changes.remove("one")
        changes.store()
    with scenario.writer() as image:
        changes = BitmapChanges(image)
        changes.remove("two")
        changes.store()


def do_resize(scenario: Scenario) -> None:
    """Bigger, so that the L1 table moves, and smaller again."""
    if scenario.kind == "v2":  # which cannot, with snapshots
        with scenario.writer() as image:
            delete_snapshot(image, image.snapshots[0])
        scenario.snapshots.clear()
        scenario.recorder.step(scenario.model())
    for size in (40 * SIZE, SIZE // 2, SIZE):
        with scenario.writer() as image:
            resize(image, size, shrink=True)
        # Until the end is reached, what is behind the new end may be there or be zero already.
        kept = scenario.disk[:size]
        scenario.disk[:] = kept + bytes(max(0, size - len(kept)))
        scenario.recorder.step(scenario.model())


OPERATIONS: dict[str, Callable[[Scenario], None]] = {
    "write": do_write,
    "create-snapshot": do_create_snapshot,
    "apply-snapshot": do_apply_snapshot,
    "delete-snapshot": do_delete_snapshot,
    "amend": do_amend,
    "bitmaps": do_bitmaps,
    "resize": do_resize,
}
CASES = [(operation, kind) for operation in OPERATIONS for kind in KINDS]


def look(fd: int, backing: int | None = None) -> tuple[bytes, dict[str, bytes], int]:
    """(disk, snapshots, leaks) of an image, which must be whole."""

    def below(name: str, format: str | None) -> Qcow2Reader:
        assert backing is not None
        return Qcow2Reader(os.dup(backing), name)

    with Qcow2Reader(os.dup(fd), "image", backing=below if backing is not None else None) as image:
        found = check(image)
        assert not found.corruptions and not found.check_errors, found.messages
        assert not found.leaks or image.dirty or image.header.version == 2, "nobody will look for the leaks"
        disk = image.read(0, image.size)
        snapshots = {}
        for snapshot in image.snapshots:
            image.use_snapshot(snapshot)
            snapshots[snapshot.name] = image.read(0, image.size)
    return disk, snapshots, found.leaks


def mend(fd: int) -> None:
    """Opened for writing, it has no leaks any more; version 2, which cannot say that it has, after `check -r leaks`."""
    with Qcow2Writer(os.dup(fd), "image", barriers=False) as image:
        if image.header.version == 2:
            repair(image, everything=False)
    with Qcow2Reader(os.dup(fd), "image") as image:
        assert check(image).clean and not image.dirty


def put(fd: int, content: bytes) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, content, 0)


def try_all(
    operation: str, kind: str, dice: random.Random, count: int, seen: Callable[[dict[str, bytes]], None]
) -> int:
    """`count` states of one operation on images of one kind; how many there were."""
    fd = memory_file()
    number = 0
    while number < count:
        scenario = Scenario(kind, dice)
        with scenario.recorder.recording():
            OPERATIONS[operation](scenario)
        os.close(scenario.fd)
        for files, models in states(scenario.recorder, min(600, count - number), dice):
            number += 1
            put(fd, files["image"])
            disk, snapshots, leaks = look(fd)
            assert is_allowed(disk, snapshots, models), number
            if leaks and number % 8 == 0:
                mend(fd)
                assert look(fd) == (disk, snapshots, 0)
            if number % (count // 3) == 1:
                seen(files)
    os.close(fd)
    return number


@pytest.mark.parametrize(("operation", "kind"), CASES, ids=[f"{operation}-{kind}" for operation, kind in CASES])
def test_power_lost_at_any_moment(operation: str, kind: str, tmp_path: Path) -> None:
    share = STATES // len(CASES)
    count = share // 4 if kind == "extended" else share * 5 // 4  # whose tables take longer to read

    def qemu_agrees(files: dict[str, bytes]) -> None:
        path = tmp_path / "a.qcow2"
        path.write_bytes(files["image"])
        done = qemu_img("check", path)
        assert done.code in (0, 3), done.out + done.err  # 3: leaks

    assert try_all(operation, kind, random.Random(f"{operation} {kind}"), count, qemu_agrees) >= count


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_missing_barrier_would_be_seen(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Qcow2Writer, "barrier", lambda image: None)
    with pytest.raises((AssertionError, ImageError)):
        try_all(operation, "small", random.Random(operation), 1000, lambda files: None)


def test_power_lost_while_an_image_is_made() -> None:
    """It is an image, whole and empty, or it is none yet."""
    for options in KINDS.values():
        fd, copy = memory_file(), memory_file()
        recorder = Recorder({"image": fd})
        with recorder.recording():
            create(fd, FORMAT, SIZE, **options)
        finished = 0
        for files, _ in states(recorder, 100, random.Random(1)):
            put(copy, files["image"])
            try:
                assert look(copy)[:2] == (bytes(SIZE), {})
                finished += 1
            except ImageError as error:
                assert "is not a qcow2 image" in str(error)
        assert finished
        os.close(fd)
        os.close(copy)


@pytest.fixture(params=["raw-like", "snapshot"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[int, int, bytes]]:
    """(base, top, what top reads)"""
    dice = random.Random(7)
    base, top = memory_file(), memory_file()
    create(base, FORMAT, SIZE // 2, cluster_size=512)
    create(top, FORMAT, SIZE, cluster_size=1024, backing_file="base", backing_format="qcow2")
    below = bytearray(SIZE // 2)
    with Qcow2Writer(os.dup(base), "base") as image:
        write_some(image, below, dice, 8)
        if request.param == "snapshot":
            create_snapshot(image, "kept")
    model = below + bytes(SIZE // 2)
    with Qcow2Writer(os.dup(top), "top", backing=lambda name, format: Qcow2Reader(os.dup(base), name)) as image:
        write_some(image, model, dice, 8)
    yield base, top, bytes(model)
    os.close(base)
    os.close(top)


def test_power_lost_in_a_commit(pair: tuple[int, int, bytes]) -> None:
    """At every moment the upper image reads as it did, and both are whole."""
    base, top, model = pair
    recorder = Recorder({"base": base, "top": top})
    with (
        recorder.recording(),
        Qcow2Writer(os.dup(top), "top", backing=lambda name, format: Qcow2Writer(os.dup(base), name)) as image,
    ):
        below = image.backing
        assert below is not None
        commit(image, below)
        empty(image)
    low, high = memory_file(), memory_file()
    number = 0
    for number, (files, _) in enumerate(states(recorder, STATES // len(CASES), random.Random(3)), 1):
        put(low, files["base"])
        put(high, files["top"])
        disk, _, _ = look(high, low)
        assert disk == model, number
        _, snapshots, _ = look(low)
        assert set(snapshots) <= {"kept"}
    assert number > 300
    os.close(low)
    os.close(high)


def test_power_lost_while_snapshots_images_are_merged(tmp_path: Path) -> None:
    """A snapshot in the middle is deleted: the image above takes what it had, and reads the same at every moment."""
    dice = random.Random(11)
    base, middle, top = (tmp_path / name for name in ("base", "middle", "top"))
    model = bytearray(SIZE)
    below: dict[str, object] = {}
    for path, size in ((base, SIZE // 2), (middle, SIZE), (top, SIZE)):
        create(str(path), FORMAT, size, cluster_size=1024, **below)
        below = {"backing_file": str(path), "backing_format": FORMAT}
        with Opener().open(str(path), FORMAT, writable=True) as image:
            assert isinstance(image, Qcow2Writer)
            part = model[:size]
            write_some(image, part, dice, 40)
            model[:size] = part
    expected = hashlib.sha256(model).hexdigest()
    with top.open("r+b") as file:
        recorder = Recorder({"top": file.fileno()})
        with recorder.recording():
            overlays.merge_forward(overlays.look(str(top), FORMAT), overlays.look(str(middle), FORMAT))
        number = rested = 0
        for number, (files, _) in enumerate(states(recorder, STATES // len(CASES), dice), 1):
            put(file.fileno(), files["top"])
            assert overlays.digest(str(top), FORMAT) == expected, number
            with Opener(lock=False).open(str(top), FORMAT, chain=False) as image:
                assert isinstance(image, Qcow2Reader)
                found = check(image)
                assert not found.corruptions and (not found.leaks or image.dirty), number
                rested += image.header.backing_file == str(base)
    assert number > 300 and 0 < rested < number
