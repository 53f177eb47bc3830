"""kvik-vmm's own raw disk: a new image on top of it in the same process, and its state handed to another one."""

from __future__ import annotations

import errno
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import ImageError, OperationFailed, OperationInvalid, ResourceBusy
from kvik.image.create import create
from kvik.image.lock import lock_image
from kvik.image.opening import Opener
from kvik.image.qcow2.writer import Qcow2Writer
from kvik.vmm.backends.block import BlockImage
from kvik.vmm.blk.block_jobs import BlockJobs
from kvik.vmm.blk.overlay import Overlays
from kvik.vmm.loop import IoThread
from kvik.vmm.memory import HostMemory
from kvik.vmm.virtio import blk
from kvik.vmm.virtio.blk import CONFIG_WCE, Blk
from kvik.vmm.virtio.queue import RING_PACKED, RING_RESET

from .blk_process import BlkProcess, Served
from .ring import FakeMachine
from .test_blk import LATE
from .test_virtio_blk import Disk

MIB = 1 << 20
SIZE = 4 * MIB
needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img (apt install qemu-utils)")


class World:
    """One disk, with an I/O thread of its own as in a machine."""

    def __init__(self, root: Path, cache: str = "writeback") -> None:
        self.root = root
        self.raw = root / "disk.raw"
        self.raw.write_bytes(bytes(SIZE))
        self.below = self.raw
        self.thread = IoThread("disk0")
        self.thread.start()
        device = Blk("disk0", BlockImage(str(self.raw), cache=cache), loop=self.thread.loop, werror="report")
        self.disk = Disk(device)
        self.overlays = device.overlays = Overlays(device, locking=device.image.locking)

    @property
    def device(self) -> Blk:
        return self.disk.device

    def new(self, name: str, **more: Any) -> Path:
        path = self.root / name
        kind = "raw" if self.below == self.raw else "qcow2"
        create(str(path), "qcow2", more.pop("size", SIZE), backing_file=str(self.below), backing_format=kind, **more)
        return path

    def add(self, path: Path) -> None:
        direct = self.device.image.direct
        self.overlays.add(
            os.open(path, os.O_RDWR),
            os.open(self.below, os.O_RDONLY),
            os.open(path, os.O_RDWR) if direct else -1,
            node=path.name,
            group="g",
            name=str(path),
        )

    def put(self, path: Path) -> None:
        """As the manager does: at a standstill."""
        self.add(path)
        self.device.pause()
        self.overlays.put()
        self.below = path

    def write(self, sector: int, data: bytes) -> None:
        assert self.disk.request(blk.T_OUT, sector, data)[0] == blk.S_OK

    def read(self, sector: int, size: int) -> bytes:
        status, data = self.disk.request(blk.T_IN, sector, room=size)
        assert status == blk.S_OK
        return data

    def close(self) -> None:
        self.disk.close()
        self.thread.stop()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(**more: Any) -> World:
        worlds.append(World(tmp_path, **more))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


def opened(root: Path) -> int:
    """How many descriptors there are of files in a directory."""
    found = [item.readlink() for item in Path("/proc/self/fd").iterdir() if item.is_symlink()]
    return sum(path.is_relative_to(root) for path in found)


def shown(path: Path, form: str = "qcow2") -> bytes:
    with Opener(share=True, lock=False).open(str(path), form) as image:
        return image.read(0, image.size)


@needs_qemu_img
@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough"])
def test_random_requests_before_and_after_are_each_in_their_image(cache: str, made: Callable[..., World]) -> None:
    """Four images deep; each is what the disk was when the next came on top."""
    world, chance, model = made(cache=cache), random.Random(7), bytearray(SIZE)
    kept: list[tuple[Path, bytes]] = []
    for number in range(4):
        for _ in range(40):
            sector, count = chance.randrange(SIZE // 512 - 300), chance.randrange(1, 300)
            data = chance.randbytes(8) * (64 * count)
            world.write(sector, data)
            model[sector * 512 : sector * 512 + len(data)] = data
            place = chance.randrange(SIZE // 512 - 300)
            assert world.read(place, 300 * 512) == model[place * 512 :][: 300 * 512]
        kept.append((world.below, bytes(model)))
        world.put(world.new(f"new{number}"))
        world.device.resume()
        assert world.overlays.report() == {"state": "none", "top": f"new{number}"}
    world.device.resize(SIZE + MIB)
    world.write(SIZE // 512, b"x" * 512)
    assert world.disk.request(blk.T_FLUSH, 0)[0] == blk.S_OK
    top = world.below
    world.disk.close()
    for path, content in kept:
        assert shown(path, "raw" if path == world.raw else "qcow2") == content
    assert shown(top) == bytes(model) + b"x" * 512 + bytes(MIB - 512)
    for number in range(4):
        subprocess.run(["qemu-img", "check", "-q", str(world.root / f"new{number}")], check=True)


@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough"])
def test_random_requests_while_it_is_copied_are_in_the_copy(cache: str, made: Callable[..., World]) -> None:
    """From raw to qcow2 and to raw again, and to what comes to nothing; each image is as it was when it was left."""
    world, chance, model = made(cache=cache), random.Random(7), bytearray(SIZE)
    told: list[dict[str, Any]] = []
    jobs = BlockJobs(world.device, world.overlays, None, lambda _, data: told.append(data))

    def change(times: int) -> None:
        for _ in range(times):
            sector, count = chance.randrange(SIZE // 512 - 300), chance.randrange(1, 300)
            data = chance.randbytes(8) * (64 * count)
            world.write(sector, data)
            model[sector * 512 : sector * 512 + len(data)] = data

    def state(wanted: str) -> None:
        end = time.monotonic() + 20
        while jobs.report()[0]["state"] != wanted:
            assert time.monotonic() < end, jobs.report()
            change(1)

    def begin(path: Path, form: str) -> None:
        create(str(path), form, SIZE)
        images = [(os.open(path, os.O_RDWR), form)]
        data = os.open(path, os.O_RDWR) if world.device.image.direct else -1
        jobs.copy("j", images, data=data, shallow=False, shared=False, blank=True, node=path.name, speed=0,
                  granularity=0, room=0)  # fmt: skip

    change(20)
    last, kept = (world.raw, "raw"), dict[Path, bytes]()
    for name, form, pivots in (("a", "qcow2", True), ("b", "qcow2", False), ("c", "raw", True), ("d", "raw", False)):
        path = world.root / name
        begin(path, form)
        state("ready")
        change(20)
        if pivots:
            jobs.complete("j")
        else:
            jobs.cancel("j")
        state("concluded")
        assert jobs.report()[0]["error"] == "" and told.pop() == {"id": "j", "status": "concluded"} and not told
        jobs.dismiss("j")
        if pivots:
            kept[last[0]], last = shown(*last), (path, form)
        change(20)
        assert world.read(0, SIZE) == model
        assert jobs.chain() == [{"device": last[0].stat().st_dev, "inode": last[0].stat().st_ino}]
    assert world.disk.request(blk.T_FLUSH, 0)[0] == blk.S_OK
    assert shown(*last) == model
    for path, content in kept.items():
        assert shown(path, "raw" if path == world.raw else "qcow2") == content
    assert opened(world.root) == (3 if cache == "none" else 2)


def test_until_the_device_goes_on_it_can_be_dropped(made: Callable[..., World]) -> None:
    world = made()
    world.write(0, b"a" * 512)
    first = world.new("first")
    world.put(first)
    assert world.overlays.report() == {"state": "on-top", "top": "first", "node-name": "first", "group": "g"}
    world.overlays.drop()
    assert world.overlays.report() == {"state": "none", "top": ""}
    world.below = world.raw
    world.device.resume()
    world.write(0, b"b" * 512)
    assert shown(world.raw, "raw")[:512] == b"b" * 512
    # added, and not put: nothing changes when the device goes on
    world.add(first)
    assert world.overlays.report()["state"] == "added"
    world.write(0, b"c" * 512)
    world.overlays.drop()
    world.put(first)
    world.device.resume()
    world.overlays.drop()  # too late
    world.write(0, b"d" * 512)
    assert shown(world.raw, "raw")[:512] == b"c" * 512
    with world.raw.open("r+b") as other, pytest.raises(ResourceBusy):
        lock_image(other.fileno(), "other", write=True)
    with world.raw.open("rb") as other:
        lock_image(other.fileno(), "other", write=False)
    with pytest.raises(OperationInvalid, match="no image was added"):
        world.overlays.put()


@pytest.mark.parametrize(
    ("bytes_at", "error"),
    [
        ((79, b"\1"), "was not closed by its last writer"),
        ((79, b"\2"), "corrupt"),
        ((0, b"nothing"), "is not a qcow2 image"),
    ],
)
def test_an_image_that_would_need_what_was_not_imported_is_refused(
    bytes_at: tuple[int, bytes], error: str, made: Callable[..., World]
) -> None:
    world = made()
    path = world.new("new")
    with path.open("r+b") as file:
        file.seek(bytes_at[0])
        file.write(bytes_at[1])
    before = opened(world.root)
    with pytest.raises(ImageError, match=error):
        world.add(path)
    with pytest.raises(ImageError, match="bytes, and the disk"):
        world.add(world.new("small", size=MIB))
    assert opened(world.root) == before
    world.write(0, b"a" * 512)
    assert world.overlays.report() == {"state": "none", "top": ""}


def test_a_request_for_which_there_was_no_room_is_done_in_the_next_image(
    made: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host is full, the guest stands still, a snapshot is taken elsewhere, and it goes on there."""
    world = made()
    device, disk = world.device, world.disk
    device.werror = "enospc"
    world.put(world.new("first"))
    device.resume()

    def full(image: Qcow2Writer, offset: int, buffers: list[memoryview]) -> None:
        raise OSError(errno.ENOSPC, "no space")

    head, status = disk.space(16, struct.pack("<IIQ", blk.T_OUT, 0, 8)), disk.space(1, b"\xee")
    with monkeypatch.context() as patch:
        patch.setattr(Qcow2Writer, "writev", full)
        disk.put(0, [(head, 16, False), (disk.space(512, b"a" * 512), 512, False), (status, 1, True)])
        disk.kick(0)
        device.pause()
    assert disk.machine.stopped == "io-error" and not disk.take(0)
    first = world.below
    world.put(world.new("second"))
    device.resume()
    end = time.monotonic() + 10
    while not (done := disk.take(0)) and time.monotonic() < end:
        time.sleep(0.01)
    assert len(done) == 1 and disk.memory.read(status, 1) == bytes([blk.S_OK])
    assert world.disk.request(blk.T_FLUSH, 0)[0] == blk.S_OK
    assert shown(first)[4096:4608] == bytes(512) and shown(world.below)[4096:4608] == b"a" * 512


# Handed on: a state of the VMM's own disk, restored where another process serves it ---------------------------------


class Restored(Served):
    """A driver that goes on where another left off, on another device."""

    def start(self, features: int = -1, before: Callable[[], None] = lambda: None) -> None: ...

    def go_on(self, old: Disk, state: dict[str, Any]) -> None:
        for name in ("free", "avail", "kicked", "used"):
            setattr(self, name, getattr(old, name))
        self.device.restore(state)
        if self.device.active:
            self.device.activate()


@pytest.mark.parametrize("writeback", [True, False])
def test_a_driver_goes_on_with_kvik_blk(writeback: bool, tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(SIZE))
    machine = FakeMachine(host=HostMemory(shared=True))
    mine = Disk(Blk("disk0", BlockImage(str(raw)), queues=2), machine=machine)
    features = mine.device.features | RING_RESET
    mine.start(features)
    assert features & CONFIG_WCE
    if not writeback:
        mine.device.config["writeback"] = 0
        mine.device.config_written(32, 1)
    assert mine.request(blk.T_OUT, 0, b"a" * 512)[0] == blk.S_OK
    assert mine.request(blk.T_OUT, 1, b"b" * 512, index=1)[0] == blk.S_OK
    mine.device.pause()
    state = mine.device.state()
    mine.close()
    process = BlkProcess((raw, "raw"))
    process.close()
    process = BlkProcess((raw, "raw"), options=("--queues=2",))
    try:
        served = Restored(process.device(2), machine=machine)
        process.driver = served
        served.go_on(mine, state)
        assert served.transport.taken == {0, 1} and not machine.events
        assert served.read(0, 1024) == b"a" * 512 + b"b" * 512
        served.write(512, b"c" * 512, queue=1)
        assert (served.device.config["writeback"], served.request(blk.T_FLUSH)[0]) == (int(writeback), blk.S_OK)
        # one queue is reset by itself, and comes back (2.6.1)
        served.device.queue_reset(1)
        assert served.transport.taken == {0}
        served.device.queue_enabled(1)
        assert served.read(512, 512, queue=1) == b"c" * 512
        served.device.pause()
        state = served.device.state()
        served.device.close()
        # and back to a VMM that reads it itself
        again = Restored(Blk("disk0", BlockImage(str(raw), locking=False), queues=2), machine=machine)
        again.go_on(mine, state)
        assert again.device.active and again.device.config["writeback"] == writeback
        again.close()
        assert raw.read_bytes()[:1024] == b"a" * 512 + b"c" * 512
    finally:
        process.close()


def test_a_back_end_without_what_the_driver_took_up_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(SIZE))
    device = Blk("disk0", BlockImage(str(raw)))
    device.ring_features |= RING_PACKED
    mine = Disk(device, machine=FakeMachine(host=HostMemory(shared=True)))
    state = mine.device.state() | {"acked": mine.device.acked | RING_PACKED}
    mine.close()
    process = BlkProcess((raw, "raw"))
    try:
        process.driver = Restored(process.device(), machine=mine.machine)
        with pytest.raises(OperationFailed, match=r"lacks features that the guest uses \(bits 34\)"):
            process.driver.device.restore(state)
    finally:
        process.close()


IN_VMM = """
import ast, sys
from pathlib import Path
from kvik.vmm import confinement as main
main.import_all((*main.LATE, *main.LATE_CONTROL, *main.OVERLAYS))
"""
# Functions that no request and no command of its monitor reaches.
NOT_REACHED = {
    "kvik.image.create parse_size fractions",
    "kvik.image.opening open_image kvik.image.luks",
    "kvik.image.opening probe_format kvik.image.ova",
    "kvik.image.qcow2.allocator _repair_refcounts kvik.image.qcow2.repair",  # such an image is refused
    "kvik.image.qcow2.reader read_compressed kvik.image.zstd",  # such a one, too
}


def test_whatever_an_overlay_imports_late_is_imported_before_the_sandbox() -> None:
    code = IN_VMM + LATE[LATE.index("source = ") :].replace("parents[3]", "parents[2]")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = ("kvik.image", "kvik.vmm.blk")
    assert {line for line in found.stdout.splitlines() if line.startswith(ours)} <= NOT_REACHED
