"""kvik-blk: images of every shape through its vhost-user front against plain bytes; kills, hostile VMMs, errors."""

from __future__ import annotations

import os
import random
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import HostError, ImageError, InvalidArgument, ResourceBusy
from kvik.image.create import create
from kvik.image.lock import lock_image
from kvik.vmm.backends.request import DISCARD, READ, WRITE, Request
from kvik.vmm.blk.chain import open_chain
from kvik.vmm.blk.image import FormatImage
from kvik.vmm.blk.memory import DirtyPages, SharedMemory
from kvik.vmm.faults import GuestFault
from kvik.vmm.loop import EventLoop
from kvik.vmm.virtio import blk

from .blk_process import BlkProcess

MIB = 1 << 20
SIZE = 8 * MIB
needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img (apt install qemu-utils)")


def qemu_img(*words: str | Path) -> str:
    return subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True).stdout


def content(path: Path, form: str) -> bytes:
    raw = path.with_suffix(".content")
    qemu_img("convert", "-f", form, "-O", "raw", path, raw)
    return raw.read_bytes()


def plain(path: Path, size: int = SIZE) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", path, str(size))
    return path


# Images of every shape: what makes them, the chain from the top down, and what they hold at first.

Shape = tuple[list[tuple[Path, str]], bytes]


def _raw(directory: Path, dice: random.Random) -> Shape:
    data = dice.randbytes(SIZE)
    path = directory / "disk.raw"
    path.write_bytes(data)
    return [(path, "raw")], data


def _on_bases(*options: str) -> Callable[[Path, random.Random], Shape]:
    """On a compressed qcow2 image that lies on a raw one, both shorter than the disk."""

    def make(directory: Path, dice: random.Random) -> Shape:
        bottom, middle, top = directory / "bottom.raw", directory / "middle.qcow2", directory / "top.qcow2"
        data = bytearray(dice.randbytes(3 * MIB + 512))
        bottom.write_bytes(data)
        data += bytes(5 * MIB - len(data))
        data[MIB : 2 * MIB] = bytes(range(256)) * 4096
        half = directory / "half.raw"
        half.write_bytes(data)
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-B", bottom, "-F", "raw", half, middle)
        qemu_img("create", "-q", "-f", "qcow2", *options, "-b", middle, "-F", "qcow2", top, str(SIZE))
        return [(top, "qcow2"), (middle, "qcow2"), (bottom, "raw")], bytes(data) + bytes(SIZE - len(data))

    return make


def _alone(*options: str) -> Callable[[Path, random.Random], Shape]:
    def make(directory: Path, dice: random.Random) -> Shape:
        path = directory / "disk.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", *options, path, str(SIZE))
        return [(path, "qcow2")], bytes(SIZE)

    return make


def _with_snapshot(directory: Path, dice: random.Random) -> Shape:
    """Every cluster is shared with a snapshot: all that is written first is written to new ones."""
    data = dice.randbytes(SIZE)
    (directory / "full.raw").write_bytes(data)
    path = directory / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", directory / "full.raw", path)
    qemu_img("snapshot", "-c", "one", path)
    return [(path, "qcow2")], data


SHAPES = {
    "raw": _raw,
    "plain": _alone(),
    "small clusters": _alone("-o", "cluster_size=512"),
    "subclusters": _alone("-o", "extended_l2=on,cluster_size=16k"),
    "version 2": _alone("-o", "compat=0.10"),
    "lazy refcounts": _alone("-o", "lazy_refcounts=on,refcount_bits=1"),
    "preallocated": _alone("-o", "preallocation=metadata"),
    "chain": _on_bases(),
    "chain, subclusters": _on_bases("-o", "extended_l2=on"),
    "snapshot": _with_snapshot,
}


@needs_qemu_img
@pytest.mark.parametrize(
    ("shape", "cache"),
    [*((shape, "writeback") for shape in SHAPES), ("raw", "none"), ("chain", "none"), ("plain", "writethrough")],
)
def test_a_guest_sees_what_it_wrote_and_qemu_sees_it_too(
    shape: str, cache: str, tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    dice = random.Random(f"{shape}{cache}")
    images, first = SHAPES[shape](tmp_path, dice)
    model = bytearray(first)
    lower = [path.read_bytes() for path, _ in images[1:]]
    path, form = images[0]
    process = running(*images, options=(f"--cache={cache}",))
    driver = process.start(queues=1)
    for step in range(90):
        length = 512 * dice.choice((1, 1, 2, 8, 8, 16, 129, 400))
        offset = 512 * dice.randrange((SIZE - length) // 512 + 1)
        if dice.random() < 0.4:
            offset = min(offset & -65536, SIZE - length)
        driver.indirect = dice.random() < 0.7
        what = dice.choice(("write", "write", "write", "read", "read", "discard", "zeroes", "flush", "kill"))
        if what == "write":
            data = dice.randbytes(length)
            driver.write(offset, data, cuts=dice.choice((1, 1, 3, 20)))
            model[offset : offset + length] = data
        elif what == "read":
            assert driver.read(offset, length, cuts=dice.choice((1, 1, 5))) == model[offset : offset + length], step
        elif what == "discard":
            assert driver.segment(blk.T_DISCARD, offset, length) == blk.S_OK
            now = driver.read(offset, length)
            before = model[offset : offset + length]
            for at in range(0, length, 512):
                assert now[at : at + 512] in (before[at : at + 512], bytes(512))
            model[offset : offset + length] = now
        elif what == "zeroes":
            assert driver.segment(blk.T_WRITE_ZEROES, offset, length, dice.choice((0, 1))) == blk.S_OK
            model[offset : offset + length] = bytes(length)
        elif what == "flush":
            driver.flush()
        elif step > 30 and dice.random() < 0.25:
            # What was flushed survives whatever happens to the process.
            if cache != "writethrough":
                driver.flush()
            process.kill()
            if form == "qcow2":
                subprocess.run(["qemu-img", "check", "-q", "-r", "leaks", str(path)], check=True)
            assert content(path, form) == model
            process = running(*images, options=(f"--cache={cache}",))
            driver = process.start()
    assert driver.read(0, SIZE) == model
    assert process.end() == (0, "")
    if form == "qcow2":
        qemu_img("check", "-q", path)  # no leaks either
    assert content(path, form) == model
    assert [path.read_bytes() for path, _ in images[1:]] == lower


@needs_qemu_img
def test_what_a_driver_is_told_of_the_disk(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    process = running(
        (plain(tmp_path / "a.qcow2"), "qcow2"), options=("--queues=3", "--serial=one", "--block-size=4096")
    )
    device = process.device(3)
    config = device.config
    assert (config["capacity"], config["num_queues"], config["blk_size"]) == (SIZE // 512, 3, 4096)
    assert config["discard_sector_alignment"] == 128 and config["max_discard_seg"] > 0
    assert device.features & (blk.F_FLUSH | blk.MQ | blk.F_DISCARD | blk.F_WRITE_ZEROES | blk.RO) == (
        blk.F_FLUSH | blk.MQ | blk.F_DISCARD | blk.F_WRITE_ZEROES
    )
    device.close()
    process.end()


@needs_qemu_img
def test_several_rings_a_serial_and_a_new_size(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    path = plain(tmp_path / "a.qcow2")
    process = running((path, "qcow2"), options=("--queues=2", "--serial=the serial"))
    driver = process.start(queues=2)
    for queue in (0, 1):
        driver.write(queue * 4096, bytes([queue + 1]) * 4096, queue=queue)
    assert driver.read(0, 8192, queue=1) == b"\1" * 4096 + b"\2" * 4096
    assert driver.request(blk.T_GET_ID, room=20)[1] == b"the serial".ljust(20, b"\0")
    assert driver.request(99)[0] == blk.S_UNSUPP
    assert driver.request(blk.T_IN, SIZE // 512, room=512)[0] == blk.S_IOERR
    with pytest.raises(InvalidArgument):
        process.ours_device.resize(2 * SIZE)  # nobody made it so
    assert process.ask("block_resize", device="disk0", size=2 * SIZE) == {}
    process.ours_device.resize(2 * SIZE)
    assert process.ours_device.config["capacity"] == 2 * SIZE // 512 and driver.transport.config_changes == 1
    driver.write(2 * SIZE - 4096, b"e" * 4096)
    figures = process.ask("query-blockstats")[0]["stats"]
    assert figures["wr_operations"] == 3 and figures["rd_bytes"] == 8192
    assert process.end() == (0, "")
    qemu_img("check", "-q", path)
    assert content(path, "qcow2")[-4096:] == b"e" * 4096


@needs_qemu_img
def test_a_read_only_disk_and_its_lock(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    path = plain(tmp_path / "a.qcow2")
    before = path.read_bytes()
    process = running((path, "qcow2"), options=("--read-only",))
    driver = process.start()
    assert driver.request(blk.T_OUT, 0, b"x" * 512)[0] == blk.S_IOERR
    assert driver.segment(blk.T_DISCARD, 0, 65536) == blk.S_UNSUPP
    driver.flush()
    with path.open("r+b") as other, pytest.raises(ResourceBusy):
        lock_image(other.fileno(), "other", write=True)
    process.end()
    assert path.read_bytes() == before
    with path.open("r+b") as other:
        lock_image(other.fileno(), "other", write=True)
        process = running((path, "qcow2"))
        code, said = process.end()
    assert code == 1 and "in use by another process" in said and "a.qcow2" in said


@needs_qemu_img
def test_killed_it_leaves_no_leaks_to_the_next_and_repairs_nothing_that_another_uses(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    path = plain(tmp_path / "a.qcow2")
    process = running((path, "qcow2"))
    driver = process.start()
    driver.write(0, b"w" * MIB)
    driver.flush()
    process.process.kill()
    process.process.wait(20)
    assert "cleanly shut down: no" in qemu_img("info", path)
    with path.open("r+b") as other:  # a cluster that counts and that nothing leads to
        other.truncate(65536 * 64)
        other.seek(2 * 65536 + 2 * 63)
        other.write(b"\0\1")
        other.flush()
        lock_image(other.fileno(), "other", write=True)
        before = path.read_bytes()
        assert running((path, "qcow2")).end()[0] == 1
        assert path.read_bytes() == before
    process = running((path, "qcow2"))
    process.start()
    assert process.end()[0] == 0
    assert "cleanly shut down" not in qemu_img("info", path)
    qemu_img("check", "-q", path)
    assert content(path, "qcow2")[:MIB] == b"w" * MIB


def test_what_it_does_not_take(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(os.urandom(65536))
    code, said = running((path, "qcow2")).end()
    assert code == 1 and "a.qcow2" in said and "qcow2" in said
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(MIB))
    path.unlink()
    create(str(path), "qcow2", MIB, backing_file=str(base), backing_format="raw")
    code, said = running((path, "qcow2")).end()
    assert code == 1 and "which was not passed" in said
    code, said = running((path, "qcow2"), options=("--nonsense",)).end()
    assert code == 1 and "--nonsense" in said


@needs_qemu_img
def test_its_life_line_and_a_signal_end_it_with_everything_written(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    for way in ("life", "signal"):
        path = plain(tmp_path / f"{way}.qcow2")
        process = running((path, "qcow2"))
        process.start().write(0, b"w" * MIB)  # not flushed
        if way == "life":
            process.life.close()
        else:
            process.process.terminate()
        assert process.process.wait(20) == 0
        qemu_img("check", "-q", path)
        assert content(path, "qcow2")[:MIB] == b"w" * MIB


# A VMM that says what it may not


def messages(dice: random.Random) -> Iterator[tuple[bytes, int]]:
    """(message, descriptors beside it): wild ones, and nearly right ones."""
    for _ in range(40):
        request = dice.choice([*range(1, 30), 1 << 31])
        payload = dice.randbytes(dice.choice((0, 4, 8, 8, 8, 40, 40, 12, 8 + 32 * dice.randrange(9), 4096)))
        if dice.random() < 0.7:
            payload = struct.pack("=I", dice.randrange(3)) + payload[4:]
        if request == 5:  # a table of memory
            count = dice.choice((0, 1, 2, 8, 9, 1 << 31))
            payload = struct.pack("=II", count, 0) + b"".join(
                struct.pack("=QQQQ", *(dice.choice((0, 4096, MIB, 1 << 63, (1 << 64) - 1)) for _ in range(4)))
                for _ in range(min(count, 8))
            )
        length = len(payload) if dice.random() < 0.95 else dice.choice((1 << 31, 4097))
        yield (
            struct.pack("=III", request, dice.choice((1, 1, 1, 9, 9, 0)), length) + payload,
            dice.choice((0, 1, 1, 2, 8)),
        )


@needs_qemu_img
def test_no_message_of_a_vmm_ends_it_otherwise_than_in_order(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    """It hangs up, and that is all; the next one is served."""
    path = plain(tmp_path / "a.qcow2")
    memfd = os.memfd_create("ram")
    os.ftruncate(memfd, 4 * MIB)
    with socket.socket(socket.AF_UNIX) as listening, path.open("r+b") as file:
        listening.bind("")
        listening.listen(64)
        name = listening.getsockname()
        process = running(fds=(file.fileno(), listening.fileno()))
    dice = random.Random(7)
    for _ in range(60):
        with socket.socket(socket.AF_UNIX) as vmm:
            vmm.connect(name)
            vmm.settimeout(0.5)
            try:
                for message, count in messages(dice):
                    socket.send_fds(vmm, [message], [memfd] * count)
            except OSError:
                continue
    with socket.socket(socket.AF_UNIX) as vmm:
        vmm.settimeout(20)
        vmm.connect(name)
        vmm.sendall(struct.pack("=III", 1, 1, 0))
        assert len(vmm.recv(20)) == 20
    assert len(os.listdir(f"/proc/{process.process.pid}/fd")) < 24  # none was kept
    process.process.terminate()
    assert process.process.wait(20) == 0
    os.close(memfd)
    qemu_img("check", "-q", path)


@needs_qemu_img
def test_a_guest_that_breaks_its_ring_stops_only_its_disk(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    process = running((plain(tmp_path / "a.qcow2"), "qcow2"))
    driver = process.start()
    driver.write(0, b"a" * 512)
    driver.put(0, [(1 << 40, 16, False), (0x20_0000, 1, True)])  # no RAM there
    os.eventfd_write(driver.transport.kicks[0], 1)
    assert process.ask("query-block")[0]["io-status"] == "ok"  # it lives
    driver.device.stop()
    driver.start()
    assert driver.read(0, 512) == b"a" * 512  # after a reset it serves again
    code, said = process.end()
    assert code == 0 and "needs a reset" in said


# Memory of the VMM


def memfd(size: int) -> int:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def test_a_table_of_memory_is_checked_and_changed_in_place() -> None:
    memory = SharedMemory()
    fd = memfd(4 * MIB)
    memory.set_table([(0, MIB, 0x7000_0000, 0)], [os.dup(fd)])
    low = memory.regions[0]
    memory.write(4096, b"here")
    assert os.pread(fd, 4, 4096) == b"here"
    assert memory.guest_address(0x7000_1000, 16) == 0x1000
    for theirs, size in ((0x6FFF_FFFF, 2), (0x700F_FFFF, 2), (0, 1)):
        with pytest.raises(GuestFault):
            memory.guest_address(theirs, size)
    wrong: list[list[tuple[int, int, int, int]]] = [
        [(0, MIB, 0, 0), (MIB // 2, MIB, 0, 2 * MIB)],  # overlap
        [(0, MIB, 0, 0), (0, MIB, 0, 0)],
        [(0, 0, 0, 0)],
        [(0, 8 * MIB, 0, 0)],  # more than the file has
        [(1 << 63, MIB, 0, 0)],
        [(0, MIB, 0, 100)],  # no page
    ]
    before = len(os.listdir("/proc/self/fd"))
    for entries in wrong:
        with pytest.raises((InvalidArgument, HostError)):
            memory.set_table(entries, [os.dup(fd) for _ in entries])
        assert len(os.listdir("/proc/self/fd")) == before
        assert memory.regions == [low] and memory.read(4096, 4) == b"here"
    memory.set_table([(0, MIB, 0x7000_0000, 0), (1 << 32, MIB, 0x8000_0000, MIB)], [os.dup(fd), os.dup(fd)])
    assert memory.regions[0] is low
    memory.write((1 << 32) + 8, b"high")
    assert os.pread(fd, 4, MIB + 8) == b"high"
    view = memory.view(1 << 32, 16)
    memory.set_table([(0, MIB, 0x7000_0000, 0)], [os.dup(fd)])
    assert bytes(view) == bytes(16)  # pages of nobody, and no fault
    with pytest.raises(GuestFault):
        memory.view(1 << 32, 1)
    view.release()
    memory.close()
    os.close(fd)


def test_pages_that_were_written_are_marked_within_bounds() -> None:
    fd = memfd(8192)
    log = DirtyPages(os.dup(fd), 2, 4096)
    log.mark(4095, 2)
    log.mark(15 * 4096, 1 << 40)  # beyond what the log has room for
    assert os.pread(fd, 3, 4096) == b"\x03\x80\0"
    log.close()
    for size, offset in ((0, 0), (1 << 40, 0), (4096, 8192)):
        with pytest.raises((InvalidArgument, HostError)):
            DirtyPages(os.dup(fd), size, offset)
    os.close(fd)


# Errors of the host and of the image


def opened(path: Path) -> FormatImage:
    image = FormatImage(
        open_chain([(os.open(path, os.O_RDWR), "qcow2")], read_only=False), os.open(path, os.O_RDWR), locking=False
    )
    loop = EventLoop()
    image.start(loop, private=True)
    return image


def done(image: FormatImage, request: Request) -> int:
    if not image.submit(request):
        image.flush()
        assert image.drain(20)
    return request.result


@needs_qemu_img
def test_no_room_on_the_host_is_an_error_and_leaves_the_image_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = plain(tmp_path / "a.qcow2")
    image = opened(path)
    data = [memoryview(bytearray(b"x" * 4096))]
    assert done(image, Request(WRITE, 0, 4096, data)) == 0

    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("kvik.image.base.os.pwritev", full)
        patch.setattr("kvik.image.base.os.pwrite", full)
        for number in range(1, 20):
            assert done(image, Request(WRITE, number * 65536, 4096, data)) == -28
    back = bytearray(4096)
    assert done(image, Request(READ, 65536, 4096, [memoryview(back)])) == 0 and not any(back)
    assert done(image, Request(WRITE, 3 * MIB, 4096, data)) == 0
    image.close()
    qemu_img("check", "-q", path)


@needs_qemu_img
def test_an_entry_that_leads_to_a_table_is_an_error_of_the_image(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.qcow2")
    image = opened(path)
    data = [memoryview(bytearray(b"x" * 4096))]
    assert done(image, Request(WRITE, 0, 4096, data)) == 0
    image.image.flush()
    with path.open("r+b") as file:
        file.seek(40)
        l1 = int.from_bytes(file.read(8), "big")
        file.seek(l1)
        l2 = int.from_bytes(file.read(8), "big") & 0x00FF_FFFF_FFFF_FE00
        file.seek(l2)
        file.write((1 << 63 | l1).to_bytes(8, "big"))  # the L1 table as data
        file.write((1 << 62 | 1 << 50).to_bytes(8, "big"))  # compressed, far behind the end
    image.close()
    said: list[str] = []
    image = opened(path)
    image._log = said.append
    assert not image.now(WRITE, data, 0, 4096)
    assert done(image, Request(WRITE, 0, 4096, data)) == -5
    assert done(image, Request(READ, 65536, 4096, data)) == -5
    assert "table of the image" in said[0] and "outside the file" in said[1]
    image.close()


@needs_qemu_img
def test_a_discard_waits_for_writes_that_are_on_their_way(tmp_path: Path) -> None:
    """Else they could end in a cluster that is somebody else's by then."""
    path = plain(tmp_path / "a.qcow2")
    image = opened(path)
    data = [memoryview(bytearray(b"x" * 65536))]
    assert done(image, Request(WRITE, 0, 65536, data)) == 0
    assert done(image, Request(WRITE, 0, 65536, data)) == 0  # in place now
    first = Request(WRITE, 0, 65536, data)
    assert image.submit(first) is False and image.in_flight == 1
    assert done(image, Request(DISCARD, 0, 65536)) == 0
    assert image.in_flight == 0
    image.close()
    qemu_img("check", "-q", path)


@needs_qemu_img
def test_a_chain_that_is_not_as_told_is_refused(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.qcow2")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError, match="nothing can lie below"):
        open_chain([(os.open(path, os.O_RDWR), "raw"), (os.open(path, os.O_RDONLY), "qcow2")], read_only=False)
    assert len(os.listdir("/proc/self/fd")) == before


LATE = """
import ast, os, socket, sys
from pathlib import Path
from kvik.vmm.blk import main
from kvik.vmm.confinement import import_all

listening, monitor = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
for sock in (listening, monitor):
    sock.bind("")
    sock.listen()
words = [f"--image={os.open(sys.argv[1], os.O_RDWR)},qcow2", f"--socket={listening.fileno()}"]
main.build(main.Options([*words, f"--monitor={monitor.fileno()}"]))
import_all(main.LATE)
source = Path(main.__file__).parents[3]
for name, module in sorted(sys.modules.items()):
    if not name.startswith("kvik"):
        continue
    for function in ast.walk(ast.parse(Path(module.__file__).read_text())):
        for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                below = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [node.module, *(item for item in below if (source / (item.replace(".", "/") + ".py")).exists())]
            for wanted in names:
                if wanted not in sys.modules:
                    print(name, function.name, wanted)
"""
# Functions that no request and no command of its monitor reaches, or that are over when the sandbox is entered.
NOT_REACHED = {
    "kvik.image.create parse_size fractions",
    "kvik.image.opening open_image kvik.image.luks",
    "kvik.image.opening probe_format kvik.image.ova",
    "kvik.image.qcow2.allocator _repair_refcounts kvik.image.qcow2.repair",
    "kvik.vmm.blk.main main kvik.vmm.sandbox",
    "kvik.vmm.blk.main main kvik.vmm.sandbox.isolation",
    "kvik.vmm.blk.main _confine kvik.vmm.sandbox",
    "kvik.vmm.monitor.introspect query_command_line_options kvik.vmm.options",
    "kvik.vmm.monitor.introspect query_cpu_definitions kvik.vmm.cpu.models",
    "kvik.vmm.monitor.server __init__ kvik.vmm.monitor.commands",
    "kvik.vmm.monitor.server hotplug kvik.vmm.monitor.hotplug",
    "kvik.vmm.virtio.device make_queues kvik.vmm.virtio.packed",
}


@needs_qemu_img
def test_whatever_is_imported_late_is_imported_before_the_sandbox(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.qcow2")
    found = subprocess.run([sys.executable, "-c", LATE, str(path)], capture_output=True, text=True, check=True)
    assert set(found.stdout.splitlines()) <= NOT_REACHED
