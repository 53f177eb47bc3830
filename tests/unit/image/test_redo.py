"""Changes of qcow2 tables that outlive the process that made them: killed anywhere, nothing answered is lost."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import HostError, ImageError
from kvik.image.create import create
from kvik.image.opening import Opener, open_image
from kvik.image.qcow2 import redo as redo_module
from kvik.image.qcow2.check import Checker
from kvik.image.qcow2.redo import Redo
from kvik.image.qcow2.snapshotting import create_snapshot
from kvik.image.qcow2.writer import Qcow2Writer

SIZE = 1 << 20
SECTOR = 512
KILLS = 40
Step = tuple[str, int, int, int]


def opened(path: Path, notes: Path, below: Path | None) -> Qcow2Writer:
    redo = Redo(os.open(notes, os.O_RDWR | os.O_CREAT, 0o600))
    fd = os.open(path, os.O_RDWR)
    image = open_image(fd, format="qcow2", writable=True, path=str(path), redo=redo)
    assert isinstance(image, Qcow2Writer)
    if below is not None:
        image.backing = open_image(os.open(below, os.O_RDONLY), format="raw", path=str(below))
    redo.begin(image.fd)
    return image


def plan(seed: int, unit: int) -> list[Step]:
    dice = random.Random(seed)
    steps = []
    for number in range(14):
        kind = dice.choice(["write"] * 6 + ["zero", "discard", "flush"])
        start = dice.randrange(SIZE // SECTOR)
        length = min(SIZE // SECTOR - start, dice.choice([1, 3, unit // SECTOR, 9 * unit // SECTOR]))
        steps.append((kind, start * SECTOR, max(length, 1) * SECTOR, number + 1))
    return steps


def take(image: Qcow2Writer, step: Step) -> None:
    kind, offset, length, number = step
    if kind == "write":
        image.writev(offset, [memoryview(bytes([number]) * length)])
    elif kind == "zero":
        image.write_zeroes(offset, length)
    elif kind == "discard":
        image.discard(offset, length)
    else:
        image.flush()


def model(content: bytearray, step: Step, unit: int) -> None:
    kind, offset, length, number = step
    if kind == "discard":  # whole clusters
        offset, end = -(-offset // unit) * unit, (offset + length) // unit * unit
        content[offset:end] = bytes(max(0, end - offset))
    if kind in ("write", "zero"):
        content[offset : offset + length] = bytes([number if kind == "write" else 0]) * length


def killed(path: Path, notes: Path, below: Path | None, steps: list[Step], line: int) -> tuple[int, int]:
    """Runs all of it in a process that ends before the `line`-th line of kvik.image's: how many steps were done, and
    how many lines there were."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        lines = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lines
            if "/kvik/image/" not in frame.f_code.co_filename:
                return None
            if event == "line":
                lines += 1
                if lines == line:
                    os._exit(0)
            return trace

        try:
            image = opened(path, notes, below)
            sys.settrace(trace)
            for step in steps:
                take(image, step)
                os.write(writer, b".")
            sys.settrace(None)
            os.write(writer, b"%d" % lines)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    done = said.count(b".")
    return done, int(said[done:] or b"0")


KINDS: dict[str, dict[str, Any]] = {
    "v3": {"cluster_size": 4096},
    "v2": {"cluster_size": 4096, "compat": "0.10"},
    "subclusters": {"cluster_size": 16384, "extended_l2": True},
    "small tables, many of them": {"cluster_size": 512},
    "on a raw image": {"cluster_size": 4096},
    "with a snapshot": {"cluster_size": 4096},
}


@pytest.mark.parametrize("most", [redo_module.MOST, 3], ids=["enough notes", "three notes"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_killed_anywhere_what_was_answered_is_there(
    kind: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redo_module, "MOST", most)
    options = KINDS[kind]
    unit = int(str(options["cluster_size"]))
    first, path, notes = tmp_path / "first", tmp_path / "image", tmp_path / "notes"
    below: Path | None = None
    content = bytearray(SIZE)
    more: dict[str, Any] = {}
    if kind == "on a raw image":
        below = tmp_path / "below"
        content[:] = b"\xbb" * SIZE
        below.write_bytes(content)
        more = {"backing_file": str(below), "backing_format": "raw"}
    create(str(first), "qcow2", SIZE, **options, **more)
    if kind == "with a snapshot":
        with Opener().open(str(first), "qcow2", writable=True) as image:
            assert isinstance(image, Qcow2Writer)
            for offset in range(0, SIZE, 8 * unit):
                image.write(offset, b"\xaa" * unit)
                content[offset : offset + unit] = b"\xaa" * unit
            create_snapshot(image, "s")
    dice = random.Random(kind)
    lost = 0
    for seed in range(4):
        steps = plan(seed, unit)
        shutil.copy(first, path)
        notes.unlink(missing_ok=True)
        done, lines = killed(path, notes, below, steps, 0)
        assert done == len(steps) and lines > 100
        for line in sorted(dice.sample(range(1, lines), KILLS // 4)):
            shutil.copy(first, path)
            notes.unlink(missing_ok=True)
            done, _ = killed(path, notes, below, steps, line)
            before = bytearray(content)
            for step in steps[:done]:
                model(before, step, unit)
            after = bytearray(before)
            if done < len(steps):
                model(after, steps[done], unit)
            image = opened(path, notes, below)
            lost += image.redo is not None and done > 0
            seen = image.read(0, SIZE)
            for at in range(0, SIZE, SECTOR):
                either = (before[at : at + SECTOR], after[at : at + SECTOR])
                assert seen[at : at + SECTOR] in either, f"{at:#x}, killed at line {line} of seed {seed}"
            image.close()
            with Opener().open(str(path), "qcow2", chain=False) as whole:
                result = Checker(whole).run()
                assert result.clean or (kind == "v2" and not result.corruptions), result.messages
    assert lost
    if shutil.which("qemu-img"):
        said = subprocess.run(["qemu-img", "check", "-f", "qcow2", path], capture_output=True, text=True, check=False)
        assert said.returncode in (0, 3) if kind == "v2" else not said.returncode, said.stdout


def noted(tmp_path: Path) -> Redo:
    return Redo(os.open(tmp_path / "notes", os.O_RDWR | os.O_CREAT, 0o600))


@pytest.mark.parametrize(
    ("cluster", "count", "entry"),
    [
        (1 << 40, 1, 1 << 63),  # behind the disk's end
        (0, 1 << 31, 1 << 63),
        (0, 1, 1 << 63 | 1 << 40),  # outside the file
        (0, 1, 1 << 63 | 512),  # in the middle of a cluster
        (0, 1, 1 << 62),  # compressed
        (0, 1, 1 << 63 | 65536),  # the refcount table
        (0, 1, 2),  # reserved
    ],
    ids=lambda value: f"{value:#x}",
)
def test_notes_that_cannot_be_are_refused(cluster: int, count: int, entry: int, tmp_path: Path) -> None:
    path = tmp_path / "image"
    create(str(path), "qcow2", SIZE)
    before = path.read_bytes()
    redo = noted(tmp_path)
    redo.add(cluster, count, entry)
    with pytest.raises(ImageError, match="change noted"):
        open_image(os.open(path, os.O_RDWR), format="qcow2", writable=True, path=str(path), redo=redo)
    assert path.read_bytes() == before
    redo.close()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_bytes(b"\xff" * redo_module.SIZE)
    with pytest.raises(HostError, match="damaged"):
        noted(tmp_path)
    (tmp_path / "notes").write_bytes(b"short")
    with pytest.raises(HostError, match="cannot be used"):
        noted(tmp_path)
