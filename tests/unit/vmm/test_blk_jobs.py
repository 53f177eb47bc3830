"""kvik-blk: block jobs on the images of the disk that it serves, in the confined process."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import ResourceBusy
from kvik.image.create import create
from kvik.image.lock import lock_image
from kvik.image.opening import Opener

from .blk_process import SECONDS, BlkProcess
from .test_blk_backup import MIB, SIZE, Holds, bitmaps, checked, fresh, send, shown

needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img (apt install qemu-utils)")


def on(path: Path, below: Path, form: str = "qcow2", **options: Any) -> Path:
    size = options.pop("size", SIZE)
    create(str(path), "qcow2", size, backing_file=str(below), backing_format=form, **options)
    return path


def put(path: Path, offset: int, data: bytes) -> None:
    with Opener().open(str(path), "qcow2", writable=True) as image:
        image.write(offset, data)


def state(process: BlkProcess) -> dict[str, Any]:
    (told,) = process.ask("x-kvik-query-block-jobs")
    return dict(told)


def over(process: BlkProcess) -> str:
    """Its error."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        told = state(process)
        if told["state"] == "concluded":
            assert process.ask("x-kvik-block-job-dismiss", job="j") == {}
            assert process.ask("x-kvik-query-block-jobs") == []
            return str(told["error"])
        time.sleep(0.01)
    raise TimeoutError(told)


def chain(process: BlkProcess) -> list[int]:
    return [item["inode"] for item in process.ask("x-kvik-query-chain")]


def inodes(*paths: Path) -> list[int]:
    return [path.stat().st_ino for path in paths]


def three(tmp_path: Path, *, short: int = 1, **options: Any) -> tuple[list[Path], bytearray]:
    """Images on each other, the top one first, and what a guest reads; number `short` is shorter than the others."""
    sizes = [SIZE - MIB // 2 * (number == short) for number in range(3)]
    base = fresh(tmp_path / "base", size=sizes[2])
    put(base, 0, b"b" * sizes[2])
    middle = on(tmp_path / "middle", base, size=sizes[1])
    put(middle, MIB + 512, b"m" * MIB)
    with Opener().open(str(middle), "qcow2", writable=True) as image:
        image.write_zeroes(3 * MIB, MIB)
    top = on(tmp_path / "top", middle, size=SIZE, **options)
    put(top, 2 * MIB, b"t" * 4096)
    holds = bytearray(b"b" * (SIZE - MIB // 2) + bytes(MIB // 2))
    holds[MIB + 512 : 2 * MIB + 512] = b"m" * MIB
    holds[2 * MIB : 2 * MIB + 4096] = b"t" * 4096
    holds[3 * MIB : 4 * MIB] = bytes(MIB)
    return [top, middle, base], holds


def raw_base(images: list[Path]) -> None:
    """The lowest image becomes a raw one."""
    raw = images[2].with_name("raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(images[2]), str(raw)], check=True)
    subprocess.run(["qemu-img", "rebase", "-q", "-u", "-F", "raw", "-b", str(raw), str(images[1])], check=True)
    images[2] = raw


def serve(running: Callable[..., BlkProcess], images: list[Path], **more: Any) -> tuple[BlkProcess, Holds]:
    process = running(*((path, "qcow2") for path in images), **more)
    return process, Holds(process.start())


@needs_qemu_img
@pytest.mark.parametrize("extended", [False, True], ids=["clusters", "subclusters"])
@pytest.mark.parametrize("base", [0, 2], ids=["all", "to-the-base"])
def test_the_top_image_gets_what_those_below_have(
    base: int, extended: bool, tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    images, before = three(tmp_path, extended_l2=extended)
    top, middle, lowest = images
    process, holds = serve(running, images)
    holds.bytes[:] = before
    wanted = {"base": base, "backing-file": str(lowest)} if base else {}
    assert process.ask("x-kvik-pull", job="j", speed=8 * MIB, **wanted) == {}
    assert chain(process) == inodes(*images)
    while state(process)["state"] == "running":
        holds.change(5)
    assert over(process) == ""
    assert "JOB_STATUS_CHANGE" in [item["event"] for item in process.events]
    left = [top, lowest] if base else [top]
    assert chain(process) == inodes(*left)
    assert holds.driver.read(0, SIZE) == holds.bytes
    for path in {*images} - {*left}:
        with path.open("r+b") as other:
            lock_image(other.fileno(), str(path), write=True)  # nobody has it
    holds.change(20)
    assert process.end() == (0, "")
    middle.unlink()
    if not base:
        lowest.unlink()
    checked(top)
    said = subprocess.run(["qemu-img", "info", str(top)], check=True, capture_output=True, text=True).stdout
    assert (f"backing file: {lowest}\nbacking file format: qcow2" in said) == bool(base)
    assert ("backing file" in said) == bool(base)
    assert shown(top) == holds.bytes


def test_speed_is_kept_and_changed_and_a_pull_can_be_given_up(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    images, before = three(tmp_path)
    process, holds = serve(running, images)
    assert process.ask("x-kvik-pull", job="j", speed=1) == {}
    for command, arguments in (
        ("x-kvik-pull", {"job": "k"}),
        ("block_resize", {"device": "disk0", "size": 2 * SIZE}),
    ):
        assert "block job under way" in process.ask(command, **arguments)["desc"]
    send(process, "image", on(tmp_path / "new", images[0]))
    send(process, "below", images[0], os.O_RDONLY)
    names = {"image": "image", "below": "below", "node-name": "new", "group": "g", "filename": "new"}
    assert "block job under way" in process.ask("x-kvik-overlay-add", **names)["desc"]
    assert holds.driver.read(0, SIZE) == before
    told = state(process)
    assert told["speed"] == 1 and told["state"] == "running" and told["current"] < told["total"] == SIZE
    assert "not over" in process.ask("x-kvik-block-job-dismiss", job="j")["desc"]
    assert process.ask("x-kvik-block-job-cancel", job="j") == {}
    assert over(process) == "" and chain(process) == inodes(*images)
    assert process.ask("x-kvik-pull", job="j", speed=1) == {}
    assert process.ask("x-kvik-block-job-speed", job="j", speed=0) == {}
    assert over(process) == "" and chain(process) == inodes(images[0])
    assert "1 images" in process.ask("x-kvik-pull", job="j")["desc"]
    assert process.end() == (0, "")
    assert shown(images[0]) == before


def test_the_next_process_has_the_chain_as_before_of_one_that_was_killed(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    images, before = three(tmp_path)
    process, holds = serve(running, images)
    assert process.ask("x-kvik-pull", job="j", speed=4 * MIB) == {}
    while not state(process)["current"]:
        pass
    holds.driver.flush()
    process.kill()
    process, holds = serve(running, images)
    assert process.ask("x-kvik-query-block-jobs") == [] and chain(process) == inodes(*images)
    assert holds.driver.read(0, SIZE) == before
    assert process.ask("x-kvik-pull", job="j") == {} and over(process) == ""
    # killed when it had changed over, and before anybody knew
    process.kill()
    process, holds = serve(running, images)
    assert chain(process) == inodes(*images) and holds.driver.read(0, SIZE) == before
    assert process.end() == (0, "")


def test_what_cannot_be_read_ends_a_pull_and_not_the_disk(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    images, before = three(tmp_path)
    os.truncate(images[2], images[2].stat().st_size - MIB)  # what was there is read as zeros
    with images[1].open("r+b") as file:
        file.seek(65536 * 3)  # its L2 table, or what lies behind it
        file.write(b"\xff" * 65536)
    process, _ = serve(running, images)
    assert process.ask("x-kvik-pull", job="j") == {}
    assert "middle" in over(process)
    assert chain(process) == inodes(*images)
    driver = process.driver
    assert driver is not None and driver.read(2 * MIB, 4096) == before[2 * MIB : 2 * MIB + 4096]


def test_bitmaps_below_are_told_by_those_on_top_which_record_no_pull(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    old = fresh(tmp_path / "old")
    process = running((old, "qcow2"))
    holds = Holds(process.start())
    assert process.ask("x-kvik-bitmap-add", names=["c"]) == {}
    holds.write(0, b"a" * 65536)
    new = on(tmp_path / "new", old)
    send(process, "image", new)
    send(process, "below", old, os.O_RDONLY)
    names = {"image": "image", "below": "below", "node-name": "new", "group": "g", "filename": str(new)}
    assert process.ask("x-kvik-overlay-add", **names) == process.ask("x-kvik-overlay-put") == {}
    holds.write(MIB, b"b" * 65536)
    assert process.ask("x-kvik-bitmap-merge", layers=[1]) == {}
    assert [layer["c"]["count"] for layer in bitmaps(process)] == [2 * 65536, 65536]
    assert process.ask("x-kvik-pull", job="j") == {} and over(process) == ""
    assert [layer["c"]["count"] for layer in bitmaps(process)] == [2 * 65536]
    holds.write(2 * MIB, b"c" * 512)
    assert process.end() == (0, "")
    assert [item["name"] for item in checked(new)] == ["c"]
    assert shown(new) == holds.bytes


def commit(process: BlkProcess, images: list[Path], top: int, base: int, **more: Any) -> Any:
    send(process, "image", images[base])
    wanted = {"job": "j", "top": top, "base": base, "image": "image", "backing-file": str(images[base]), **more}
    if top > 1:
        send(process, "above", images[top - 1])
        wanted["above"] = "above"
    return process.ask("x-kvik-commit", **wanted)


def is_locked(path: Path, *, write: bool) -> bool:
    with path.open("r+b") as other:
        try:
            lock_image(other.fileno(), str(path), write=write)
        except ResourceBusy:
            return True
    return False


@needs_qemu_img
@pytest.mark.parametrize("top", [1, 2], ids=["under-the-top", "deeper"])
@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_images_of_the_middle_go_into_the_one_below(
    form: str, top: int, tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    images, before = three(tmp_path, short=2)
    if form == "raw":
        raw_base(images)
    if top == 2:
        images.insert(0, on(tmp_path / "newest", images[0]))
    forms = [*["qcow2"] * (top + 1), form]
    process = running(*zip(images, forms, strict=True))
    holds = Holds(process.start())
    holds.bytes[:] = before
    assert not is_locked(images[-1], write=False)
    assert commit(process, images, top, top + 1, speed=2 * MIB) == {}
    assert is_locked(images[-1], write=False)
    while state(process)["state"] == "running":
        holds.change(5)
    assert over(process) == "" and not is_locked(images[-1], write=False) and is_locked(images[-1], write=True)
    assert not is_locked(images[top], write=True)
    left = [*images[:top], images[-1]]
    assert chain(process) == inodes(*left)
    assert holds.driver.read(0, SIZE) == holds.bytes
    holds.change(20)
    assert process.end() == (0, "")
    images[top].unlink()
    for path in left[:-1]:
        checked(path)
    assert shown(images[0]) == holds.bytes
    said = subprocess.run(["qemu-img", "info", str(images[top - 1])], check=True, capture_output=True, text=True)
    assert f"backing file: {images[-1]}\nbacking file format: {form}" in said.stdout


def test_a_commit_that_is_given_up_or_killed_leaves_the_disk_as_it_was(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    images, before = three(tmp_path, short=2)
    process, holds = serve(running, images)
    with images[2].open("r+b") as other:
        lock_image(other.fileno(), "other", write=False)
        assert "in use" in commit(process, images, 1, 2)["desc"]
    assert chain(process) == inodes(*images) and holds.driver.read(0, SIZE) == before
    assert commit(process, images, 1, 2, speed=1) == {}
    assert process.ask("x-kvik-block-job-cancel", job="j") == {} and over(process) == ""
    assert chain(process) == inodes(*images) and holds.driver.read(0, SIZE) == before
    assert not is_locked(images[2], write=False) and is_locked(images[2], write=True)
    assert commit(process, images, 1, 2, speed=1) == {}
    while not state(process)["current"]:
        pass
    process.kill()
    checked(images[2])
    process, holds = serve(running, images)
    assert holds.driver.read(0, SIZE) == before
    assert commit(process, images, 1, 2) == {} and over(process) == ""
    process.kill()
    # killed when it had changed over, and before anybody knew
    process, holds = serve(running, images)
    assert chain(process) == inodes(*images) and holds.driver.read(0, SIZE) == before
    assert process.end() == (0, "")


def test_what_ends_the_disk_before_the_base_does_is_not_committed(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    images, before = three(tmp_path)
    process, holds = serve(running, images)
    assert "is longer than" in commit(process, images, 1, 2)["desc"]
    assert "cannot go into" in commit(process, images, 2, 2)["desc"]
    assert chain(process) == inodes(*images) and holds.driver.read(0, SIZE) == before
    assert process.ask("x-kvik-query-block-jobs") == [] and is_locked(images[2], write=True)


def test_bitmaps_of_the_middle_go_along_with_its_data(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    base = fresh(tmp_path / "base")
    images = [base]
    process = running((base, "qcow2"))
    holds = Holds(process.start())
    for number in range(2):
        assert process.ask("x-kvik-bitmap-add", names=[f"c{number}"]) == {}
        holds.write(number * MIB, b"a" * 65536)
        images.insert(0, on(tmp_path / f"new{number}", images[0]))
        send(process, "image", images[0])
        send(process, "below", images[1], os.O_RDONLY)
        names = {"image": "image", "below": "below", "node-name": "new", "group": "g", "filename": str(images[0])}
        assert process.ask("x-kvik-overlay-add", **names) == process.ask("x-kvik-overlay-put") == {}
    holds.write(2 * MIB, b"a" * 65536)
    send(process, "below", base)
    assert process.ask("x-kvik-bitmap-merge", layers=[1], into=2, image="below") == {}
    assert commit(process, images, 1, 2) == {} and over(process) == ""
    told = [{name: item["count"] for name, item in layer.items()} for layer in bitmaps(process)]
    assert told == [{"c0": 65536, "c1": 65536}, {"c0": 2 * 65536, "c1": 65536}]
    assert process.end() == (0, "")
    assert [item["name"] for item in checked(base)] == ["c0", "c1"]


def until_ready(process: BlkProcess) -> None:
    end = time.monotonic() + SECONDS
    while state(process)["state"] != "ready":
        assert time.monotonic() < end


@needs_qemu_img
@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize(("base", "form"), [(1, "qcow2"), (2, "qcow2"), (2, "raw")])
def test_the_guest_changes_over_to_the_base_that_its_image_went_into(
    base: int, form: str, cache: str, tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    images, before = three(tmp_path, short=2)
    if form == "raw":
        raw_base(images)
    process = running(*zip(images, ("qcow2", "qcow2", form), strict=True), options=(f"--cache={cache}",))
    holds = Holds(process.start())
    holds.bytes[:] = before
    send(process, "image", images[base])
    more: dict[str, Any] = {}
    if cache == "none":
        send(process, "data", images[base], os.O_RDWR)
        more["data"] = "data"
    wanted = {"job": "j", "top": 0, "base": base, "image": "image", "node-name": "node", **more}
    assert process.ask("x-kvik-commit", speed=65536, **wanted) == {}
    assert base == 1 or "not ready" in process.ask("x-kvik-block-job-complete", job="j")["desc"]
    for _ in range(10):
        holds.change(5)
    assert process.ask("x-kvik-block-job-speed", job="j", speed=0) == {}
    until_ready(process)
    holds.change(30)
    assert process.ask("x-kvik-block-job-complete", job="j") == {}
    while state(process)["state"] != "concluded":
        holds.change(1)
    assert over(process) == "" and chain(process) == inodes(*images[base:])
    assert process.ask("x-kvik-query-overlay")["top"] == "node"
    assert holds.driver.read(0, SIZE) == holds.bytes
    for path in images[:base]:
        assert not is_locked(path, write=True)
        path.unlink()
    assert is_locked(images[base], write=False)
    holds.change(30)
    assert process.end() == (0, "")
    if form == "qcow2":
        checked(images[base])
    assert shown(images[base], form) == holds.bytes


def test_a_commit_of_the_top_that_is_given_up_or_killed_leaves_the_disk_as_it_was(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    images, before = three(tmp_path, short=2)
    process, holds = serve(running, images)
    wanted = {"job": "j", "top": 0, "base": 2, "image": "image"}
    send(process, "image", images[2])
    assert process.ask("x-kvik-commit", **wanted) == {}
    until_ready(process)
    holds.bytes[:] = before
    holds.change(5)
    assert process.ask("x-kvik-block-job-cancel", job="j") == {} and over(process) == ""
    assert chain(process) == inodes(*images) and holds.driver.read(0, SIZE) == holds.bytes
    send(process, "image", images[2])
    assert process.ask("x-kvik-commit", **wanted) == {}
    until_ready(process)
    holds.change(5)
    holds.driver.flush()
    now = bytes(holds.bytes)
    process.kill()
    process, holds = serve(running, images)
    assert holds.driver.read(0, SIZE) == now and chain(process) == inodes(*images)


def test_a_process_that_changed_over_is_followed_by_none_that_would_hide_what_was_written_since(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    images, before = three(tmp_path, short=2)

    def start(served: list[Path]) -> BlkProcess:
        redo = os.open(tmp_path / "redo", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            return BlkProcess(*((path, "qcow2") for path in served), options=(f"--redo={redo}",), keep=(redo,))
        finally:
            os.close(redo)

    process = start(images)
    holds = Holds(process.start())
    holds.bytes[:] = before
    send(process, "image", images[1])
    assert process.ask("x-kvik-commit", job="j", top=0, base=1, image="image") == {}
    until_ready(process)
    assert process.ask("x-kvik-block-job-complete", job="j") == {} and over(process) == ""
    holds.change(5)
    holds.driver.flush()  # no change of a table waits
    process.kill()
    old = start(images)
    assert old.process.wait(SECONDS) == 1
    assert old.process.stderr is not None and "is not the image that the process before" in old.process.stderr.read()
    old.close()
    process = start(images[1:])
    assert process.start().read(0, SIZE) == holds.bytes
    assert process.end() == (0, "")
