"""A file that is too big to be counted at once is checked part by part, with the same result."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from kvik.errors import ImageError
from kvik.image.create import create
from kvik.image.opening import open_image
from kvik.image.qcow2 import check as module
from kvik.image.qcow2.check import CheckResult, check
from kvik.image.qcow2.reader import Qcow2Reader
from kvik.image.qcow2.repair import repair
from kvik.image.qcow2.snapshotting import create_snapshot
from kvik.image.qcow2.writer import Qcow2Writer

CLUSTER = 512
PER_BLOCK = 256  # refcounts of 16 bits in a cluster


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Some 2000 clusters in no order, two snapshots, compressed data."""
    path = tmp_path / "image"

    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    create(fd, "qcow2", 4 << 20, cluster_size=CLUSTER)
    chance = random.Random(5)
    with open_image(fd, format="qcow2", path=str(path), writable=True) as opened:
        assert isinstance(opened, Qcow2Writer)
        for turn in range(3):
            for _ in range(400):
                opened.write(chance.randrange(8000) * CLUSTER, chance.randbytes(CLUSTER))
            if turn < 2:
                create_snapshot(opened, f"s{turn}")
    return path


def looked_at(path: Path) -> CheckResult:
    with open_image(os.open(path, os.O_RDONLY), format="qcow2", path=str(path)) as opened:
        assert isinstance(opened, Qcow2Reader)
        return check(opened)


def figures(result: CheckResult) -> dict[str, object]:
    found = {name: getattr(result, name) for name in CheckResult.__slots__}
    return {**found, "messages": sorted(result.messages)}


def damage(path: Path) -> None:
    """Refcounts all over the file, one to 0, one to 300, and a block that is not there."""
    with open_image(os.open(path, os.O_RDWR), format="qcow2", path=str(path)) as opened:
        assert isinstance(opened, Qcow2Reader)
        refcounts = opened.refcounts
        blocks = [entry for entry in refcounts.table if entry]
        assert len(blocks) >= 6
        for number, block in enumerate(blocks[1:]):
            for place in (3, 77, 201):
                os.pwrite(opened.fd, (0, 300, 2)[number % 3].to_bytes(2, "big"), block + 2 * place)


def test_part_by_part_is_the_same(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = figures(looked_at(image))
    assert sound["corruptions"] == sound["leaks"] == 0
    damage(image)
    whole = figures(looked_at(image))
    assert whole["corruptions"] and whole["leaks"]
    monkeypatch.setattr(module, "WINDOW", PER_BLOCK)
    told: list[tuple[int, int]] = []
    with open_image(os.open(image, os.O_RDONLY), format="qcow2", path=str(image)) as opened:
        assert isinstance(opened, Qcow2Reader)
        parts = figures(check(opened, lambda done, of: told.append((done, of))))
    assert parts == whole
    assert told == sorted(told) and told[-1][0] < told[-1][1]
    assert (image.stat().st_size // CLUSTER) // PER_BLOCK > 5  # as many parts


def test_a_big_file_is_repaired_part_by_part(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(image)
    monkeypatch.setattr(module, "WINDOW", PER_BLOCK)
    with open_image(os.open(image, os.O_RDWR), format="qcow2", path=str(image), writable=True) as opened:
        assert isinstance(opened, Qcow2Writer)
        assert min(repair(opened, everything=True)) > 0
    assert looked_at(image).clean
    monkeypatch.undo()
    assert looked_at(image).clean


def test_what_cannot_be_bounded_is_refused(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", PER_BLOCK)
    monkeypatch.setattr(module, "MAX_WINDOWS", 3)
    with pytest.raises(ImageError, match="clusters, more than can be checked"):
        looked_at(image)
    monkeypatch.undo()
    monkeypatch.setattr(module, "MAX_TABLES", 3)
    with pytest.raises(ImageError, match="L2 tables, more than can be checked"):
        looked_at(image)
