"""kvik-blk: bitmaps and backups of the disk that it serves, in the confined process."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import ResourceBusy
from kvik.image.create import create
from kvik.image.lock import lock_image
from kvik.image.opening import Opener
from kvik.vmm.blk.writer import ROOM, Writer
from kvik.vmm.loop import EventLoop
from kvik.vmm.virtio import blk

from . import blk_process
from .blk_process import SECONDS, BlkProcess, Served

MIB = 1 << 20
SIZE = 8 * MIB
needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img (apt install qemu-utils)")


def send(process: BlkProcess, name: str, path: Path, flags: int = os.O_RDWR) -> None:
    process.ask("query-version")  # its greeting is over
    fd = os.open(path, flags)
    socket.send_fds(process.monitor, [b'{"execute": "getfd", "arguments": {"fdname": "%s"}}' % name.encode()], [fd])
    os.close(fd)
    while "event" in (reply := json.loads(process._lines.readline())):
        process.events.append(reply)
    assert "return" in reply


def add(process: BlkProcess, target: Path, form: str = "qcow2", *, pull: bool = False, **more: Any) -> Any:
    send(process, "backup", target)
    wanted = {"job": "j", "image": "backup", "filename": str(target), "format": form, "pull": pull}
    return process.ask("x-kvik-backup-add", **wanted, **more)


def since(name: str, layers: int = 1) -> list[dict[str, Any]]:
    return [{"layer": layer, "name": name} for layer in range(layers)]


def begin(process: BlkProcess, *track: str) -> Any:
    return process.ask("x-kvik-backup-begin", job="j", track=list(track))


def over(process: BlkProcess) -> str:
    """Its error."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        (told,) = process.ask("x-kvik-query-backups")
        if told["state"] == "concluded":
            assert process.ask("x-kvik-backup-clear", job="j") == {}
            assert process.ask("x-kvik-query-backups") == []
            assert told["current"] <= told["total"] or not told["total"]
            return str(told["error"])
    raise TimeoutError(told)


def bitmaps(process: BlkProcess) -> list[dict[str, dict[str, Any]]]:
    return [{item["name"]: item for item in layer} for layer in process.ask("x-kvik-query-bitmaps")["layers"]]


def fresh(path: Path, form: str = "qcow2", size: int = SIZE, **options: Any) -> Path:
    create(str(path), form, size, **options)
    return path


def shown(path: Path, form: str = "qcow2") -> bytes:
    with Opener(share=True, lock=False).open(str(path), form) as image:
        return image.read(0, image.size)


def checked(path: Path) -> list[dict[str, Any]]:
    """The bitmaps that QEMU finds in a whole image."""
    subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)
    told = subprocess.run(["qemu-img", "info", "--output=json", str(path)], check=True, capture_output=True)
    found: list[dict[str, Any]] = json.loads(told.stdout)["format-specific"]["data"].get("bitmaps", [])
    return found


def rest(path: Path, below: Path) -> None:
    """As who restores puts increments on each other."""
    subprocess.run(["qemu-img", "rebase", "-q", "-u", "-F", "qcow2", "-b", str(below), str(path)], check=True)


class Holds:
    """What the disk holds, byte for byte."""

    def __init__(self, driver: Served, size: int = SIZE, seed: int = 5) -> None:
        self.driver, self.bytes, self.random = driver, bytearray(size), random.Random(seed)

    def write(self, offset: int, data: bytes) -> None:
        self.driver.write(offset, data)
        self.bytes[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        assert self.driver.segment(blk.T_WRITE_ZEROES, offset, length, flags) == blk.S_OK
        self.bytes[offset : offset + length] = bytes(length)

    def change(self, times: int) -> None:
        for _ in range(times):
            length = self.random.randrange(1, 64) * 512
            offset = self.random.randrange(0, (len(self.bytes) - length) // 512) * 512
            if self.random.random() < 0.25:
                self.zero(offset, length, self.random.randrange(2))
            else:
                self.write(offset, self.random.randbytes(length))


@needs_qemu_img
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_increments_on_a_full_backup_are_the_disk_as_it_was_each_time(
    cache: str, tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    path = fresh(tmp_path / "disk")
    process = running((path, "qcow2"), options=(f"--cache={cache}",))
    holds = Holds(process.start())
    holds.change(40)
    held, last = [], ""
    for number in range(4):
        target = fresh(tmp_path / f"backup{number}")
        assert add(process, target, **({"since": since(last)} if last else {})) == {}
        assert begin(process, f"c{number}") == {}
        held.append(bytes(holds.bytes))
        last = f"c{number}"
        holds.change(20)  # while it is copied
        assert over(process) == ""
        holds.change(10)
    known = bitmaps(process)[0]
    assert [item["recording"] and not item["inconsistent"] for item in known.values()] == [True] * 4
    assert known["c0"]["count"] >= known["c3"]["count"] > 0
    assert process.end() == (0, "")
    assert [item["name"] for item in checked(path)] == ["c0", "c1", "c2", "c3"]
    assert shown(path) == holds.bytes
    for number, then in enumerate(held):
        target = tmp_path / f"backup{number}"
        checked(target)
        if number:
            rest(target, tmp_path / f"backup{number - 1}")
        assert shown(target) == then, number


def test_an_increment_has_what_changed_and_no_more(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    path = fresh(tmp_path / "disk", size=SIZE + 512)
    process = running((path, "qcow2"))
    driver = process.start()
    driver.write(0, b"a" * MIB)
    assert process.ask("x-kvik-bitmap-add", names=["c"]) == {}
    driver.write(SIZE, b"e" * 512)
    driver.write(2 * MIB, b"b" * 512)
    assert process.ask("x-kvik-bitmap-count", since=since("c"), granularity=65536) == {"count": 2 * 65536}
    assert add(process, fresh(tmp_path / "target", size=SIZE + 512), since=since("c")) == begin(process) == {}
    (told,) = process.ask("x-kvik-query-backups")
    assert told["total"] == 65536 + 512
    assert over(process) == ""
    with Opener().open(str(tmp_path / "target"), "qcow2") as image:
        there = [(item.start, item.length) for item in image.map() if item.present]
    assert there == [(2 * MIB, 65536), (SIZE, 512)]


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_raw_disk_has_full_backups(form: str, tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    process = running((path, "raw"))
    holds = Holds(process.start())
    for number in range(2):
        holds.change(30)
        target = fresh(tmp_path / f"target{number}", form)
        assert "keep a bitmap" in process.ask("x-kvik-bitmap-add", names=["c"])["desc"]
        assert add(process, target, form) == begin(process) == {}
        then = bytes(holds.bytes)
        with path.open("r+b") as other, pytest.raises(ResourceBusy):
            lock_image(other.fileno(), "other", write=True)
        holds.change(30)
        assert over(process) == ""
        assert shown(target, form) == then
    assert process.ask("block_resize", device="disk0", size=2 * SIZE) == {}
    assert process.end() == (0, "")
    assert path.read_bytes()[:SIZE] == holds.bytes


def test_bitmaps_go_on_in_the_image_that_is_put_on_top(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    old = fresh(tmp_path / "old")
    process = running((old, "qcow2"))
    holds = Holds(process.start())
    assert process.ask("x-kvik-bitmap-add", names=["c", "d"]) == {}
    holds.write(0, b"a" * 65536)
    new = fresh(tmp_path / "new", backing_file=str(old), backing_format="qcow2")
    send(process, "image", new)
    send(process, "below", old, os.O_RDONLY)
    names = {"image": "image", "below": "below", "node-name": "new", "group": "g", "filename": str(new)}
    assert process.ask("x-kvik-overlay-add", **names) == process.ask("x-kvik-overlay-put") == {}
    holds.write(MIB, b"b" * 65536)
    top, below = bitmaps(process)
    assert top["c"]["count"] == below["c"]["count"] == 65536
    assert not below["c"]["inconsistent"]
    assert process.ask("x-kvik-bitmap-count", since=since("c", 2), granularity=65536) == {"count": 2 * 65536}
    target = fresh(tmp_path / "target")
    assert add(process, target, since=since("c", 2)) == begin(process) == {}
    assert over(process) == ""
    assert shown(target) == holds.bytes
    # one goes, from both
    assert process.ask("x-kvik-bitmap-remove", name="c") == {}
    assert "not found" in process.ask("x-kvik-bitmap-remove", name="c", layer=1, image="below")["desc"]
    send(process, "below", new)
    assert "another file" in process.ask("x-kvik-bitmap-remove", name="c", layer=1, image="below")["desc"]
    send(process, "below", old)
    assert process.ask("x-kvik-bitmap-remove", name="c", layer=1, image="below") == {}
    assert [list(layer) for layer in bitmaps(process)] == [["d"], ["d"]]
    assert process.end() == (0, "")
    assert shown(new) == holds.bytes
    if shutil.which("qemu-img"):
        assert [item["name"] for item in checked(new) + checked(old)] == ["d", "d"]


def test_a_bitmap_that_a_killed_process_did_not_write_is_inconsistent(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    path = fresh(tmp_path / "disk")
    process = running((path, "qcow2"))
    driver = process.start()
    assert process.ask("x-kvik-bitmap-add", names=["c"]) == {}
    driver.write(0, b"a" * 512)
    process.kill()
    process = running((path, "qcow2"))
    process.start()
    assert bitmaps(process)[0]["c"]["inconsistent"]
    assert add(process, fresh(tmp_path / "target"), since=since("c")) == {}
    assert "tells not all" in begin(process)["desc"]
    assert process.ask("x-kvik-backup-clear", job="j") == {}
    assert "exists" in process.ask("x-kvik-bitmap-add", names=["c"])["desc"]
    assert process.ask("x-kvik-bitmap-remove", name="c") == process.ask("x-kvik-bitmap-add", names=["c"]) == {}
    assert not bitmaps(process)[0]["c"]["inconsistent"]
    assert process.end() == (0, "")


def test_a_target_that_fails_ends_the_backup_and_not_the_guest(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    path = fresh(tmp_path / "disk")
    process = running((path, "qcow2"))
    holds = Holds(process.start())
    holds.write(0, b"a" * MIB)
    small = fresh(tmp_path / "small", size=SIZE // 2)
    assert add(process, small) == {}
    assert "under way" in add(process, small)["desc"]
    assert f"and the disk {SIZE}" in begin(process)["desc"]
    assert process.ask("x-kvik-backup-clear", job="j") == {}
    target = fresh(tmp_path / "target", "raw")
    resource_limit(process, 4096)
    assert add(process, target, "raw") == begin(process) == {}
    assert "large" in over(process)
    resource_limit(process, -1)
    holds.write(0, b"b" * 65536)
    assert process.ask("x-kvik-query-backups") == []
    assert process.end() == (0, "")
    assert shown(path) == holds.bytes


def test_images_that_cannot_be_targets_are_refused(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    process = running((fresh(tmp_path / "disk"), "qcow2"))
    process.start()
    held = len(list(Path(f"/proc/{process.process.pid}/fd").iterdir()))
    dirty = fresh(tmp_path / "dirty")
    with dirty.open("r+b") as file:
        file.seek(79)
        file.write(b"\1")
    (tmp_path / "none").write_bytes(bytes(4096))
    locked = fresh(tmp_path / "locked")
    with locked.open("r+b") as other:
        lock_image(other.fileno(), "other", write=True)
        for path, form, words in (
            (dirty, "qcow2", "check -r all"),
            (tmp_path / "none", "qcow2", "not a qcow2 image"),
            (locked, "qcow2", "lock"),
        ):
            assert words in add(process, path, form)["desc"], path
    assert "scratch image is a qcow2" in add(process, locked, "raw", pull=True)["desc"]
    assert "was not added" in begin(process)["desc"]
    assert process.ask("x-kvik-backup-silence", job="j") == process.ask("x-kvik-backup-clear", job="j") == {}
    assert len(list(Path(f"/proc/{process.process.pid}/fd").iterdir())) == held
    assert process.end() == (0, "")


@pytest.mark.parametrize("pulled", [False, True])
def test_the_copy_before_a_write_fails_and_the_write_does_not(
    pulled: bool, tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    """No file can be written to behind 3 MiB: there is the backup's cluster, and the disk's own is not."""
    path = fresh(tmp_path / "disk")
    process = running((path, "qcow2"))
    holds = Holds(process.start())
    holds.write(4 * MIB, b"a" * MIB)
    target = fresh(tmp_path / "target", preallocation="falloc")
    resource_limit(process, 3 * MIB)
    assert add(process, target, pull=pulled) == begin(process) == {}
    holds.write(4 * MIB, b"b" * 512)
    assert "large" in over(process)
    holds.write(4 * MIB + 512, b"c" * 512)
    assert process.end() == (0, "")
    assert shown(path) == holds.bytes


def test_a_push_that_is_given_up_leaves_the_disk_as_it_is(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    path = fresh(tmp_path / "disk", size=64 * MIB)
    process = running((path, "qcow2"))
    holds = Holds(process.start(), 64 * MIB)
    for at in range(64):
        holds.write(at * MIB, bytes([at + 1]) * MIB)
    assert add(process, fresh(tmp_path / "target", size=64 * MIB)) == begin(process) == {}
    assert process.ask("x-kvik-backup-cancel", job="j") == {}
    assert over(process) == ""
    holds.write(0, b"n" * 512)
    assert process.end() == (0, "")
    assert shown(path) == holds.bytes


def resource_limit(process: BlkProcess, size: int) -> None:
    """Of the files that it writes (prlimit(2)); what is larger is EFBIG, as SIGXFSZ is ignored by Python."""
    import resource

    limit = resource.RLIM_INFINITY if size < 0 else size
    resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def test_one_that_is_cancelled_leaves_the_disk_as_it_is(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    path = fresh(tmp_path / "disk")
    process = running((path, "qcow2"))
    holds = Holds(process.start())
    scratch = fresh(tmp_path / "scratch")
    assert add(process, scratch, pull=True) == begin(process) == {}
    (told,) = process.ask("x-kvik-query-backups")
    assert told["state"] == "running"
    holds.change(10)
    assert "under way" in process.ask("block_resize", device="disk0", size=2 * SIZE)["desc"]
    assert process.ask("x-kvik-backup-cancel", job="other") == {}
    assert process.ask("x-kvik-backup-cancel", job="j") == {}
    assert over(process) == ""
    assert process.events[-1]["data"] == {"id": "j", "status": "concluded"}
    holds.change(10)
    assert process.end() == (0, "")
    assert shown(path) == holds.bytes


def test_a_disk_is_held_no_longer_than_the_session(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    process = running((fresh(tmp_path / "disk"), "qcow2"))
    driver = process.start()
    driver.write(0, b"a" * 512)
    assert "not held" in process.ask("x-kvik-bitmap-add", names=["c"], held=True)["desc"]
    assert process.ask("x-kvik-hold") == {}
    assert "held already" in process.ask("x-kvik-hold")["desc"]
    with pytest.raises(TimeoutError):
        unanswered(driver)
    assert process.ask("x-kvik-bitmap-add", names=["c"], held=True) == process.ask("x-kvik-release") == {}
    driver.wait()
    assert bitmaps(process)[0]["c"]["count"] == 65536  # it was answered afterwards
    assert process.ask("x-kvik-hold") == {}
    with pytest.raises(TimeoutError):
        unanswered(driver)
    process.monitor.shutdown(socket.SHUT_RDWR)
    driver.wait()


def unanswered(driver: Served) -> None:
    """A write that nobody answers soon; `driver.wait` sees its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blk_process, "SECONDS", 0.3)
        driver.write(0, b"b" * 512)


# Pulled over NBD --------------------------------------------------------------------------------------------------


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def give(process: BlkProcess, name: str, sock: socket.socket) -> None:
    process.ask("query-version")
    text = b'{"execute": "getfd", "arguments": {"fdname": "%s"}}' % name.encode()
    socket.send_fds(process.monitor, [text], [sock.fileno()])
    while "event" in (reply := json.loads(process._lines.readline())):
        process.events.append(reply)
    assert "return" in reply


def pull(process: BlkProcess, tmp_path: Path, *, bitmap: str = "", **more: Any) -> str:
    """The address of the export."""
    assert add(process, fresh(tmp_path / "scratch"), pull=True, **more) == begin(process) == {}
    with listening(tmp_path / "nbd") as sock:
        give(process, "nbd", sock)
    wanted: dict[str, Any] = {"bitmap": bitmap} if bitmap else {}
    assert (
        process.ask("x-kvik-backup-serve", job="j", export="vda", exports=["vda"], socket="nbd", links=[], **wanted)
        == {}
    )
    return f"driver=nbd,server.type=unix,server.path={tmp_path / 'nbd'},export=vda"


def mapped(address: str) -> list[dict[str, Any]]:
    told = subprocess.run(
        ["qemu-img", "map", "--output=json", "--image-opts", address], check=True, capture_output=True, timeout=SECONDS
    )
    found: list[dict[str, Any]] = json.loads(told.stdout)
    return found


@needs_qemu_img
def test_what_is_pulled_is_the_disk_as_it_was_with_what_changed(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    process = running((fresh(tmp_path / "disk"), "qcow2"))
    holds = Holds(process.start())
    holds.change(30)
    assert process.ask("x-kvik-bitmap-add", names=["c"]) == {}
    holds.write(MIB, b"x" * 65536)
    holds.write(3 * MIB, b"y" * 512)
    address = pull(process, tmp_path, since=since("c"), bitmap="changed")
    then = bytes(holds.bytes)
    holds.change(40)
    target = tmp_path / "pulled"
    subprocess.run(["qemu-img", "convert", "-O", "raw", "--image-opts", address, target], check=True, timeout=SECONDS)
    assert target.read_bytes() == then
    dirty = [
        (item["start"], item["length"])
        for item in mapped(f"{address},x-dirty-bitmap=qemu:dirty-bitmap:changed")
        if not item["data"]
    ]
    assert dirty == [(MIB, 65536), (3 * MIB, 65536)]
    assert sum(item["length"] for item in mapped(address)) == SIZE
    holds.change(40)
    written = subprocess.run(
        ["qemu-io", "--image-opts", f"{address}", "-c", "write 0 512"], capture_output=True, check=False, text=True
    )
    assert "Permission denied" in written.stderr
    subprocess.run(["qemu-img", "convert", "-O", "raw", "--image-opts", address, target], check=True, timeout=SECONDS)
    assert target.read_bytes() == then
    assert process.ask("x-kvik-backup-silence", job="j") == {}
    with pytest.raises(subprocess.CalledProcessError):
        mapped(address)
    assert process.ask("x-kvik-backup-cancel", job="j") == {}
    assert over(process) == ""
    assert process.end() == (0, "")
    assert shown(tmp_path / "disk") == holds.bytes


class Slow:
    """A target that takes nothing until `go`."""

    def __init__(self) -> None:
        self.go, self.written, self.closed = threading.Event(), 0, False

    def write(self, offset: int, data: bytearray) -> None:
        assert self.go.wait(SECONDS)
        self.written += len(data)

    def close(self) -> None:
        self.closed = True

    def release(self) -> None:
        raise AssertionError("it was not given up")


def test_a_slow_target_holds_up_who_can_wait_and_others_when_much_is_held() -> None:
    loop, target = EventLoop(), Slow()
    told: list[str] = []

    def ended(words: str) -> None:
        told.append(words)
        loop.stop()

    writer = Writer(target, loop, told.append, ended)  # type: ignore[arg-type]  # quacks like an image
    for number in range(ROOM // MIB):
        assert writer.crowded == (number > ROOM // MIB // 2)
        writer.put(0, MIB, bytearray(MIB))  # nobody waits
    late = threading.Thread(target=lambda: writer.put(0, MIB, bytearray(MIB)))
    late.start()
    late.join(0.2)
    assert late.is_alive() and not target.written
    target.go.set()
    late.join()
    writer.finish()
    loop.run()
    loop.close()
    assert told == [""] and target.closed and target.written == ROOM + MIB


def test_a_disk_whose_writes_are_recorded_can_grow(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    path = fresh(tmp_path / "disk")
    process = running((path, "qcow2"))
    driver = process.start()
    assert process.ask("x-kvik-bitmap-add", names=["c"]) == {}
    driver.write(0, b"a" * 512)
    assert process.ask("block_resize", device="disk0", size=2 * SIZE) == {}
    driver.write(0, b"b" * 512)
    known = bitmaps(process)[0]["c"]
    assert known["count"] == 65536 and not known["inconsistent"]
    assert process.end() == (0, "")
    if shutil.which("qemu-img"):
        assert [item["name"] for item in checked(path)] == ["c"]
