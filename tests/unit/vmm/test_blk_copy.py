"""kvik-blk: copies of the disk that it serves, in the confined process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvik.image.lock import lock_image

from .blk_process import SECONDS, BlkProcess
from .test_blk_backup import MIB, SIZE, Holds, bitmaps, checked, fresh, resource_limit, send, shown
from .test_blk_jobs import chain, inodes, is_locked, on, over, put, serve, state, three, until_ready

needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img (apt install qemu-utils)")


def copy(process: BlkProcess, *images: tuple[Path, str], direct: bool = False, **more: Any) -> Any:
    wanted: dict[str, Any] = {"job": "j", "node-name": "node", "images": []}
    for number, (path, form) in enumerate(images):
        send(process, f"i{number}", path, os.O_RDONLY if number else os.O_RDWR)
        wanted["images"].append({"image": f"i{number}", "format": form})
    if direct:
        send(process, "data", images[0][0])
        wanted["data"] = "data"
    return process.ask("x-kvik-copy", **wanted, **more)


def complete(process: BlkProcess, holds: Holds | None = None) -> None:
    until_ready(process)
    if holds is not None:
        holds.change(30)
    assert process.ask("x-kvik-block-job-complete", job="j") == {}
    while state(process)["state"] != "concluded":
        if holds is not None:
            holds.change(1)
    assert over(process) == ""


def content(path: Path, form: str) -> bytes:
    return path.read_bytes() if form == "raw" else shown(path)


@needs_qemu_img
@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_the_guest_goes_on_in_the_copy_of_all_that_it_wrote(
    form: str, cache: str, tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    images, before = three(tmp_path)
    process, holds = serve(running, images, options=(f"--cache={cache}",))
    holds.bytes[:] = before
    new = fresh(tmp_path / "new", form)
    assert copy(process, (new, form), direct=cache == "none", blank=True, speed=65536) == {}
    assert is_locked(new, write=False)
    for _ in range(10):
        holds.change(5)
    assert "not ready" in process.ask("x-kvik-block-job-complete", job="j")["desc"]
    assert process.ask("x-kvik-block-job-speed", job="j", speed=0) == {}
    complete(process, holds)
    assert chain(process) == inodes(new) and process.ask("x-kvik-query-overlay")["top"] == "node"
    assert holds.driver.read(0, SIZE) == holds.bytes
    for path in images:
        assert not is_locked(path, write=True)
        path.unlink()
    assert is_locked(new, write=False)
    holds.change(30)
    assert process.end() == (0, "")
    if form == "qcow2":
        checked(new)
    assert content(new, form) == holds.bytes


@needs_qemu_img
@pytest.mark.parametrize("clusters", [{}, {"extended_l2": True}, {"cluster_size": 2 * MIB}, {"cluster_size": 4096}])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "its-own"])
def test_a_shallow_copy_has_what_the_top_image_had_and_rests_on_the_same(
    shared: bool, clusters: dict[str, Any], tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    images, before = three(tmp_path, short=1)
    process, holds = serve(running, images)
    holds.bytes[:] = before
    new = on(tmp_path / "new", images[1], **clusters)
    given = [(new, "qcow2")] if shared else [(path, "qcow2") for path in (new, *images[1:])]
    assert copy(process, *given, shallow=True, shared=shared, speed=65536) == {}
    holds.change(5)
    holds.zero(SIZE - MIB, MIB, 1)  # the image below has less
    assert process.ask("x-kvik-block-job-speed", job="j", speed=0) == {}
    complete(process, holds)
    assert chain(process) == inodes(new, *images[1:])
    assert holds.driver.read(0, SIZE) == holds.bytes
    assert is_locked(images[1], write=True) and not is_locked(images[0], write=True)
    images[0].unlink()
    holds.change(30)
    assert process.end() == (0, "")
    checked(new)
    assert shown(new) == holds.bytes


def test_what_only_images_below_have_is_not_copied_and_holes_stay_holes(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    base = fresh(tmp_path / "base")
    put(base, 0, b"b" * (SIZE // 2))
    top = on(tmp_path / "top", base)
    put(top, MIB, b"t" * 4096)
    process, _ = serve(running, [top, base])
    new = on(tmp_path / "new", base)
    assert copy(process, (new, "qcow2"), shallow=True, shared=True) == {}
    complete(process)
    assert new.stat().st_blocks * 512 < MIB
    raw = fresh(tmp_path / "raw", "raw")
    assert copy(process, (raw, "raw"), blank=True) == {}
    complete(process)
    assert raw.stat().st_blocks * 512 <= SIZE // 2 and raw.stat().st_size == SIZE
    assert process.end() == (0, "")
    assert raw.read_bytes() == b"b" * MIB + b"t" * 4096 + b"b" * (SIZE // 2 - MIB - 4096) + bytes(SIZE // 2)


def test_an_image_that_was_there_has_nothing_left_of_what_it_was(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    for form in ("raw", "qcow2"):
        disk, base, new = (tmp_path / f"{name}-{form}" for name in ("disk", "base", "new"))
        process = running((fresh(disk), "qcow2"))
        holds = Holds(process.start())
        holds.write(MIB, b"d" * MIB)
        if form == "raw":
            new.write_bytes(b"x" * (SIZE + MIB))  # and it is longer
            given = [(new, form)]
        else:
            put(fresh(base), 0, b"x" * SIZE)
            put(on(new, base), 2 * MIB, b"y" * MIB)
            given = [(new, form), (base, form)]
        assert copy(process, *given) == {}
        complete(process, holds)
        (told,) = process.ask("query-named-block-nodes")
        assert told["image"]["virtual-size"] == SIZE
        holds.change(5)
        assert process.end() == (0, "")
        assert content(new, form)[:SIZE] == holds.bytes


@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_a_copy_that_is_told_to_end_apart_is_whole_as_of_then(
    form: str, tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    images, before = three(tmp_path)
    process, holds = serve(running, images)
    holds.bytes[:] = before
    new = fresh(tmp_path / "new", form)
    assert copy(process, (new, form), blank=True) == {}
    until_ready(process)
    holds.change(30)
    assert process.ask("x-kvik-block-job-cancel", job="j", force=False) == {}
    assert over(process) == ""
    assert not is_locked(new, write=True) and chain(process) == inodes(*images)
    assert content(new, form) == holds.bytes
    now = bytes(holds.bytes)
    holds.change(30)
    assert content(new, form) == now and process.end() == (0, "")
    if form == "qcow2":
        checked(new)
    assert shown(images[0]) == holds.bytes


def test_a_copy_that_is_given_up_or_killed_leaves_the_disk_as_it_was(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    images, before = three(tmp_path)
    process, holds = serve(running, images)
    holds.bytes[:] = before
    new = fresh(tmp_path / "new")
    for ready in (False, True):
        assert copy(process, (new, "qcow2"), speed=0 if ready else 1) == {}
        if ready:
            until_ready(process)
        holds.change(5)
        assert "under way" in copy(process, (new, "qcow2"))["desc"]
        assert process.ask("x-kvik-block-job-cancel", job="j") == {} and over(process) == ""
        assert chain(process) == inodes(*images) and not is_locked(new, write=True)
    # without force, one that is not ready
    assert copy(process, (new, "qcow2"), speed=1) == {}
    assert process.ask("x-kvik-block-job-cancel", job="j", force=False) == {} and over(process) == ""
    assert copy(process, (new, "qcow2")) == {}
    until_ready(process)
    holds.change(5)
    holds.driver.flush()
    now = bytes(holds.bytes)
    process.kill()
    process, holds = serve(running, images)
    assert holds.driver.read(0, SIZE) == now and chain(process) == inodes(*images)
    assert process.end() == (0, "")
    checked(images[0])


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_raw_disk_is_copied_and_is_served_as_before_when_that_comes_to_nothing(
    cache: str, tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    old, new, last = tmp_path / "old", fresh(tmp_path / "new"), fresh(tmp_path / "last", "raw")
    old.write_bytes(bytes(SIZE))
    direct = cache == "none"
    process = running((old, "raw"), options=(f"--cache={cache}",))
    holds = Holds(process.start())
    holds.change(20)
    assert copy(process, (new, "qcow2"), direct=direct, speed=1) == {}
    holds.change(5)
    assert process.ask("x-kvik-block-job-cancel", job="j") == {} and over(process) == ""
    holds.change(5)
    assert chain(process) == inodes(old) and holds.driver.read(0, SIZE) == holds.bytes
    for path, form in ((new, "qcow2"), (last, "raw")):
        assert copy(process, (path, form), direct=direct) == {}
        complete(process, holds)
        assert chain(process) == inodes(path) and holds.driver.read(0, SIZE) == holds.bytes
        assert not is_locked(old, write=True) and is_locked(path, write=False)
    holds.change(20)
    assert process.end() == (0, "")
    checked(new)
    assert last.read_bytes() == holds.bytes


def test_storage_that_fails_ends_the_copy_and_not_the_guest(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    path = fresh(tmp_path / "disk")
    process = running((path, "qcow2"))
    holds = Holds(process.start())
    holds.write(0, b"a" * MIB)
    for form in ("raw", "qcow2"):
        target = fresh(tmp_path / f"target-{form}", form)
        limit = 4096 if form == "raw" else MIB  # bytes
        resource_limit(process, limit)
        assert copy(process, (target, form), blank=True) == {}
        assert "large" in over(process)
        resource_limit(process, -1)
        assert not is_locked(target, write=True)
        holds.write(MIB, b"b" * 65536)
    # at the very end: what was marked last does not fit
    target = fresh(tmp_path / "last", "raw")
    assert copy(process, (target, "raw"), blank=True) == {}
    until_ready(process)
    assert process.ask("x-kvik-block-job-speed", job="j", speed=1) == {}
    holds.write(4 * MIB, b"c" * 4 * 65536)
    resource_limit(process, 4 * MIB)
    assert process.ask("x-kvik-block-job-complete", job="j") == {}
    assert "large" in over(process)
    resource_limit(process, -1)
    assert chain(process) == inodes(path)
    holds.change(10)
    assert process.end() == (0, "")
    assert shown(path) == holds.bytes


def test_images_that_no_copy_can_go_to_are_refused(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    images, _ = three(tmp_path)
    process, holds = serve(running, images)
    held = len(list(Path(f"/proc/{process.process.pid}/fd").iterdir()))
    small, locked, raw = fresh(tmp_path / "small", size=SIZE // 2), fresh(tmp_path / "locked"), tmp_path / "raw"
    raw.write_bytes(bytes(SIZE))
    with locked.open("r+b") as other:
        lock_image(other.fileno(), "other", write=False)
        for given, more, words in (
            ([(small, "qcow2")], {}, f"and the disk {SIZE}"),
            ([(locked, "qcow2")], {}, "in use"),
            ([(images[1], "qcow2")], {}, "in use"),
            ([(raw, "qcow2")], {}, "not a qcow2 image"),
            ([(raw, "raw")], {"shallow": True, "shared": True}, "nothing can lie below"),
            ([(raw, "raw"), (images[2], "qcow2")], {}, "nothing can lie below"),
            ([(on(tmp_path / "above", images[0]), "qcow2")], {}, "was not passed"),
            ([(raw, "raw")], {"direct": True}, "do not agree"),
        ):
            assert words in copy(process, *given, **more)["desc"], words  # type: ignore[arg-type]
    assert len(list(Path(f"/proc/{process.process.pid}/fd").iterdir())) == held
    assert process.ask("x-kvik-query-block-jobs") == [] and not is_locked(raw, write=True)
    holds.change(5)


def test_bitmaps_go_into_the_copy_when_the_guest_does(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    process = running((fresh(tmp_path / "disk"), "qcow2"))
    holds = Holds(process.start())
    assert "not being copied" in process.ask("x-kvik-copy-carry", layers=[0])["desc"]
    assert process.ask("x-kvik-bitmap-add", names=["c"]) == {}
    holds.write(0, b"a" * 65536)
    raw = fresh(tmp_path / "raw", "raw")
    assert copy(process, (raw, "raw")) == {}
    assert "keeps no bitmaps" in process.ask("x-kvik-copy-carry", layers=[0])["desc"]
    assert process.ask("x-kvik-block-job-cancel", job="j") == {} and over(process) == ""
    new = fresh(tmp_path / "new")
    assert copy(process, (new, "qcow2")) == {}
    until_ready(process)
    assert process.ask("x-kvik-copy-carry", layers=[0]) == {}
    holds.write(MIB, b"b" * 65536)
    complete(process)
    holds.write(2 * MIB, b"c" * 65536)
    (layer,) = bitmaps(process)
    assert layer["c"]["count"] == 3 * 65536 and layer["c"]["recording"]
    assert process.end() == (0, "")
    assert [item["name"] for item in checked(new)] == ["c"]


@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_a_process_that_changed_over_is_followed_by_none_that_has_the_old_images(
    form: str, tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    images, before = three(tmp_path)
    new = fresh(tmp_path / "new", form)

    def start(*served: tuple[Path, str]) -> BlkProcess:
        redo = os.open(tmp_path / "redo", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            return running(*served, options=(f"--redo={redo}",), keep=(redo,))
        finally:
            os.close(redo)

    process = start(*((path, "qcow2") for path in images))
    holds = Holds(process.start())
    holds.bytes[:] = before
    assert copy(process, (new, form)) == {}
    complete(process, holds)
    holds.change(20)
    process.kill()
    old = start(*((path, "qcow2") for path in images))
    assert old.process.wait(SECONDS) == 1
    assert old.process.stderr is not None and "is not the image that the process before" in old.process.stderr.read()
    process = start((new, form))
    assert process.start().read(0, SIZE) == holds.bytes
    assert process.end() == (0, "")
