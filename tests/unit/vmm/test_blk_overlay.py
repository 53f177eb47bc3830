"""kvik-blk: a new image on top of the disk that it serves, in the confined process."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import ResourceBusy
from kvik.image.create import create
from kvik.image.lock import lock_image
from kvik.image.opening import Opener

from .blk_process import BlkProcess

MIB = 1 << 20
SIZE = 8 * MIB
A, B, C = (letter * 65536 for letter in (b"a", b"b", b"c"))
needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img (apt install qemu-utils)")


def first(path: Path, form: str) -> Path:
    if form == "raw":
        path.write_bytes(bytes(SIZE))
    else:
        create(str(path), form, SIZE)
    return path


def overlay(path: Path, below: Path, form: str, size: int = SIZE) -> Path:
    create(str(path), "qcow2", size, backing_file=str(below), backing_format=form)
    return path


def add(process: BlkProcess, new: Path, below: Path, *, direct: bool = False, group: str = "g") -> Any:
    process.ask("query-version")  # its greeting is over
    fds = {"image": os.open(new, os.O_RDWR), "below": os.open(below, os.O_RDONLY)}
    if direct:
        fds["data"] = os.open(new, os.O_RDWR)
    for name, fd in fds.items():
        socket.send_fds(process.monitor, [b'{"execute": "getfd", "arguments": {"fdname": "%s"}}' % name.encode()], [fd])
        assert "return" in process._lines.readline()
        os.close(fd)
    names = {name: name for name in fds}
    return process.ask("x-kvik-overlay-add", **names, **{"node-name": new.name, "group": group, "filename": str(new)})


def shown(path: Path, form: str = "qcow2") -> bytes:
    with Opener().open(str(path), form) as image:
        return image.read(0, SIZE)


@needs_qemu_img
@pytest.mark.parametrize(("form", "cache"), [("qcow2", "writeback"), ("raw", "writeback"), ("qcow2", "none")])
def test_what_is_written_from_then_on_is_in_the_new_image(
    form: str, cache: str, tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    old = first(tmp_path / "old", form)
    process = running((old, form), options=(f"--cache={cache}",))
    driver = process.start()
    driver.write(0, A)
    driver.write(MIB, A)  # not flushed
    for number, letter in enumerate((B, C)):
        new = overlay(tmp_path / f"new{number}", old, form)
        assert add(process, new, old, direct=cache == "none") == {}
        assert process.ask("x-kvik-query-overlay")["state"] == "added"
        driver.write(2 * MIB, letter)  # still into the old one
        process.ours_device.pause()
        assert process.ask("x-kvik-overlay-put") == {}
        assert process.ask("x-kvik-query-overlay")["state"] == "on-top"
        process.ours_device.resume()
        assert driver.read(MIB, 65536) == A
        assert process.ask("x-kvik-query-overlay") == {"state": "none", "top": new.name}  # a ring runs: kept
        before = old.read_bytes()
        driver.write(0, letter)
        assert driver.read(0, 65536) == letter
        assert old.read_bytes() == before
        held = [item for item in Path(f"/proc/{process.process.pid}/fd").iterdir() if item.exists()]
        modes = {
            int((item.parents[1] / "fdinfo" / item.name).read_text().split("flags:")[1].split()[0], 8) & os.O_ACCMODE
            for item in held
            if item.samefile(old)
        }
        assert modes == {os.O_RDONLY}  # nobody there can write to it any more
        with old.open("r+b") as other, pytest.raises(ResourceBusy):
            lock_image(other.fileno(), "other", write=True)
        with old.open("rb") as other:
            lock_image(other.fileno(), "other", write=False)
        driver.flush()
        old, form = new, "qcow2"
    assert process.end() == (0, "")
    assert shown(tmp_path / "new0")[: 3 * MIB : MIB] == b"bac"
    assert shown(tmp_path / "new1")[: 3 * MIB : MIB] == b"cac"
    for name in ("new0", "new1"):
        subprocess.run(["qemu-img", "check", "-q", str(tmp_path / name)], check=True)


def test_until_a_ring_runs_it_can_be_dropped(tmp_path: Path, running: Callable[..., BlkProcess]) -> None:
    old = first(tmp_path / "old", "qcow2")
    process = running((old, "qcow2"))
    driver = process.start()
    driver.write(0, A)
    new = overlay(tmp_path / "new", old, "qcow2")
    assert add(process, new, old) == {}
    assert "waits" in add(process, new, old)["desc"]
    process.ours_device.pause()
    assert process.ask("x-kvik-overlay-put") == process.ask("x-kvik-overlay-drop") == {}
    assert process.ask("x-kvik-query-overlay") == {"state": "none", "top": ""}
    process.ours_device.resume()
    driver.write(MIB, B)
    assert driver.read(0, 65536) == A
    assert process.ask("x-kvik-overlay-drop") == {}  # nothing to drop
    assert add(process, new, old) == process.ask("x-kvik-overlay-drop") == {}
    # while rings run: nobody may take it back
    assert add(process, new, old) == process.ask("x-kvik-overlay-put") == process.ask("x-kvik-overlay-drop") == {}
    driver.write(0, C)
    assert process.end() == (0, "")
    assert shown(old)[: 2 * MIB : MIB] == b"ab" and shown(new)[: 2 * MIB : MIB] == b"cb"


def test_what_does_not_fit_is_refused_and_nothing_has_changed(
    tmp_path: Path, running: Callable[..., BlkProcess]
) -> None:
    old, other = first(tmp_path / "old", "qcow2"), first(tmp_path / "other", "qcow2")
    process = running((old, "qcow2"))
    driver = process.start()
    driver.write(0, A)
    small = overlay(tmp_path / "small", old, "qcow2", SIZE // 2)
    new = overlay(tmp_path / "new", old, "qcow2")
    before = len(list(Path(f"/proc/{process.process.pid}/fd").iterdir()))
    assert "bytes, and the disk" in add(process, small, old)["desc"]
    assert "rests on no other image" in add(process, other, old)["desc"]
    assert "another file by now" in add(process, new, other)["desc"]
    assert "do not agree" in add(process, new, old, direct=True)["desc"]
    assert "no image was added" in process.ask("x-kvik-overlay-put")["desc"]
    assert "not found" in process.ask(
        "x-kvik-overlay-add", image="x", below="y", **{"node-name": "n", "group": "g", "filename": "f"}
    )["desc"]  # fmt: skip
    assert len(list(Path(f"/proc/{process.process.pid}/fd").iterdir())) == before
    driver.write(MIB, B)
    assert process.end() == (0, "")
    assert shown(old)[: 2 * MIB : MIB] == b"ab"
