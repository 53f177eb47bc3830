"""`kvik img amend` and `bitmap`: the image is what qemu-img would have made of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from functional.image.conftest import Done, assert_clean, kvik_img, qemu_img, qemu_io
from kvik.image.opening import Opener


def create(path: Path, *words: str, size: str = "4M") -> Path:
    assert qemu_img("create", "-f", "qcow2", *words, path, size).code == 0
    return path


def facts(path: Path) -> object:
    found = qemu_img("info", "--output=json", path).json
    found.pop("actual-size")
    found.pop("filename")
    return found


CHANGES = [
    ["compat=0.10"],
    ["compat=0.10", "compat=1.1"],
    ["refcount_bits=64", "refcount_bits=1", "refcount_bits=16"],
    ["refcount_bits=8", "compat=0.10,refcount_bits=16", "compat=1.1,refcount_bits=32"],
    ["lazy_refcounts=on", "lazy_refcounts=off", "lazy_refcounts=on", "compat=0.10,lazy_refcounts=off"],
    ["size=9M", "size=5M"],
]


@pytest.mark.parametrize("changes", CHANGES, ids=" ".join)
@pytest.mark.parametrize("below", [False, True], ids=["alone", "overlay"])
def test_options_are_changed(tmp_path: Path, changes: list[str], below: bool) -> None:
    base, ours = create(tmp_path / "base"), tmp_path / "ours"
    qemu_io(base, "write -P 7 0 4M")
    create(ours, "-o", "cluster_size=4k", *(["-b", "base", "-F", "qcow2"] if below else []))
    qemu_io(ours, "write -P 1 0 300k", "write -z 1M 1M", "write -P 2 3M 5000", "write -z 100k 50k", "discard 200k 8k")
    theirs = tmp_path / "theirs"
    theirs.write_bytes(ours.read_bytes())
    for change in changes:
        done = kvik_img("amend", "-f", "qcow2", "-o", change, ours)
        assert done.code == 0, done.err
        assert qemu_img("amend", "-o", change, theirs).code == 0
        assert facts(ours) == facts(theirs)
        assert_clean(ours)
        assert kvik_img("compare", ours, theirs).code == 0
    assert qemu_img("compare", ours, theirs).code == 0


def test_snapshots_of_version_2_get_their_size(tmp_path: Path) -> None:
    path = create(tmp_path / "a", "-o", "compat=0.10")
    qemu_io(path, "write -P 1 0 64k")
    qemu_img("snapshot", "-c", "one", path)
    data = bytearray(path.read_bytes())
    place = int.from_bytes(data[64:72], "big")
    data[place + 36 : place + 40] = bytes(4)  # no extra data: what QEMU before 1.1 wrote
    entry = data[place : place + 40] + b"1one"
    data[place : place + 80] = entry + bytes(80 - len(entry))
    path.write_bytes(data)
    assert kvik_img("snapshot", "--json", path).json[0]["name"] == "one"
    assert kvik_img("amend", "-o", "compat=1.1", path).code == 0
    assert_clean(path)
    qemu_io(path, "write -P 2 0 64k")
    assert qemu_img("snapshot", "-a", "one", path).code == 0
    qemu_io(path, "read -P 1 0 64k")


@pytest.mark.parametrize(
    "option",
    [
        "refcount_bits=3",
        "refcount_bits=1",
        "cluster_size=4k",
        "backing_file=b",
        "backing_fmt=raw",
        "data_file=x",
        "data_file_raw=on",
        "compression_type=zstd",
        "compat=5",
        "nonsense=1",
        "lazy_refcounts=on,compat=0.10",
        "refcount_bits=8,compat=0.10",
        "compat=0.10",
    ],
)
def test_what_cannot_be_leaves_the_image(tmp_path: Path, option: str) -> None:
    path = create(tmp_path / "a")
    qemu_io(path, "write -P 1 0 64k", "write -z 1M 64k")
    qemu_img("snapshot", "-c", "one", path)  # a refcount of 2, zeros that a snapshot needs
    qemu_img("bitmap", "--add", path, "b")
    before = path.read_bytes()
    done = kvik_img("amend", "-o", option, path)
    assert done.code == 1 and done.err
    assert path.read_bytes() == before
    assert qemu_img("amend", "-o", option, path).code == 1 or option == "compat=0.10"


def test_help_and_other_formats(tmp_path: Path) -> None:
    listed = kvik_img("amend", "-o", "help").out
    theirs = qemu_img("amend", "-f", "qcow2", "-o", "help").out
    assert [line.split("=")[0] for line in listed.splitlines()] == [line.split("=")[0] for line in theirs.splitlines()]
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(512))
    assert kvik_img("amend", "-f", "raw", "-o", "size=1M", raw).code == 1
    assert kvik_img("amend", raw).code == 1


def test_the_data_files_name(tmp_path: Path) -> None:
    path = create(tmp_path / "a", "-o", f"data_file={tmp_path}/data,data_file_raw=on")
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "data").symlink_to("moved")
    assert kvik_img("amend", "-o", f"data_file={tmp_path}/moved,data_file_raw=off", path).code == 0
    found = qemu_img("info", "--output=json", path).json["format-specific"]["data"]
    assert (found["data-file"], found["data-file-raw"]) == (f"{tmp_path}/moved", False)
    assert_clean(path)


# -- bitmaps

ACTIONS: list[list[str]] = [
    ["--add", "b"],
    ["--add", "-g", "4k", "fine"],
    ["--add", "--disable", "-g", "512", "finest"],
    ["--merge", "b", "fine"],
    ["--disable", "b"],
    ["--add", "-g", "1M", "coarse"],
    ["--merge", "fine", "--merge", "b", "coarse"],
    ["--merge", "coarse", "finest"],
    ["--clear", "fine"],
    ["--enable", "b"],
    ["--remove", "b"],
    ["--merge", "finest", "fine"],
    ["--add", "x" * 1023],
    ["--remove", "x" * 1023],
    ["--add", "-g", "2G", "whole"],
]


def test_bitmaps_as_qemu_changes_them(tmp_path: Path, same: Callable[..., Done]) -> None:
    dice = random.Random(5)
    ours, theirs = create(tmp_path / "ours", "-o", "cluster_size=4k"), tmp_path / "theirs"
    theirs.write_bytes(ours.read_bytes())
    for words in ACTIONS:
        *actions, name = words
        assert qemu_img("bitmap", *actions, theirs, name).code == 0
        done = kvik_img("bitmap", *actions, ours, name)
        assert done.code == 0, done.err
        writes = [f"write {dice.randrange(8000) * 512} {dice.choice((512, 8192))}" for _ in range(2)]
        qemu_io(ours, *writes)
        qemu_io(theirs, *writes)
        assert facts(ours) == facts(theirs)
    assert_clean(ours)
    assert bits(ours) == bits(theirs)
    assert kvik_img("bitmap", "--remove", ours, "whole").code == 0
    for name in ("fine", "finest", "coarse"):
        assert kvik_img("bitmap", "--remove", ours, name).code == 0
    assert "bitmaps" not in json.dumps(facts(ours))
    assert_clean(ours)


def bits(path: Path) -> dict[str, bytes]:
    """Each bitmap's bits, read by us from a file that QEMU has written last."""
    from kvik.image.qcow2.bitmaps import read_bits
    from kvik.image.qcow2.reader import Qcow2Reader

    with Opener().open(str(path), "qcow2") as image:
        assert isinstance(image, Qcow2Reader)
        return {bitmap.name: bytes(read_bits(image, bitmap)) for bitmap in image.bitmaps}


def test_writes_are_recorded_as_qemu_records_them(tmp_path: Path) -> None:
    """The same writes by both, into equal images: the same bits."""
    dice = random.Random(9)
    ours, theirs = create(tmp_path / "ours"), tmp_path / "theirs"
    for granularity in ("512", "4k", "64k", "1M"):
        assert kvik_img("bitmap", "--add", "-g", granularity, ours, granularity).code == 0
    assert kvik_img("bitmap", "--add", "--disable", ours, "off").code == 0
    theirs.write_bytes(ours.read_bytes())
    for _ in range(3):
        commands = []
        with Opener().open(str(ours), "qcow2", writable=True) as image:
            for _ in range(5):
                offset, length = dice.randrange(7000) * 512, dice.choice((512, 4096, 70000 & -512))
                if dice.random() < 0.7:
                    image.write(offset, b"\1" * length)
                    commands.append(f"write -P 1 {offset} {length}")
                elif dice.random() < 0.5:
                    image.write_zeroes(offset, length)
                    commands.append(f"write -z {offset} {length}")
                else:
                    image.discard(offset, length)
                    commands.append(f"discard {offset} {length}")
        qemu_io(theirs, *commands)
        assert bits(ours) == bits(theirs)
        assert_clean(ours)


def test_bitmaps_of_another_image_are_merged(tmp_path: Path) -> None:
    one, two = create(tmp_path / "one"), create(tmp_path / "two")
    other = create(tmp_path / "other", size="8M")
    for path in (one, two, other):
        assert kvik_img("bitmap", "--add", path, "b").code == 0
    qemu_io(one, "write 1M 64k")
    qemu_io(two, "write 2M 64k")
    assert kvik_img("bitmap", "--merge", "b", "-b", two, "-F", "qcow2", one, "b").code == 0
    assert bits(one)["b"] == bytes([0, 0, 1, 0, 1, 0, 0, 0])
    assert kvik_img("bitmap", "--merge", "b", "-b", other, one, "b").code == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--add", "b"],
        ["--add", "-g", "3k", "c"],
        ["--add", "-g", "256", "c"],
        ["--add", "-g", "4G", "c"],
        ["--remove", "c"],
        ["--merge", "none", "b"],
        ["b"],
        ["-g", "4k", "--clear", "b"],
        ["--merge", "b", "-F", "qcow2", "b"],
        ["-b", "a", "--clear", "b"],
        ["--add", ""],
        ["--add", "x" * 1024],
        ["--add"],
    ],
    ids=lambda words: " ".join(words)[:30],
)
def test_what_cannot_be_done_with_bitmaps(tmp_path: Path, words: list[str]) -> None:
    path = create(tmp_path / "a")
    qemu_img("bitmap", "--add", path, "b")
    before = path.read_bytes()
    *actions, name = words
    command = ["bitmap", *actions, str(path), name] if len(words) > 1 or name == "b" else ["bitmap", name, str(path)]
    assert qemu_img(*command).code == 1
    path.write_bytes(before)
    done = kvik_img(*command)
    assert done.code == 1 and done.err
    assert path.read_bytes() == before
