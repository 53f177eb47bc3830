"""`kvik img snapshot`: what a snapshot holds stays as it was, whoever made it and whatever is written since."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from functional.image.conftest import Done, assert_clean, kvik_img, qemu_img, qemu_io
from kvik.image.opening import Opener
from kvik.image.qcow2.reader import Qcow2Reader
from kvik.image.qcow2.writer import Qcow2Writer
from kvik.image.zstd import compress as zstd_compress

SIZE = 4 << 20
STEPS = int(os.environ.get("KVIK_TEST_STEPS", "8"))
KINDS = {
    "plain": "cluster_size=64k",
    "v2": "compat=0.10",
    "tiny-clusters": "cluster_size=512",
    "extended": "extended_l2=on,cluster_size=16k",
    "two-bits": "refcount_bits=2,cluster_size=4k",
    "wide": "refcount_bits=64,cluster_size=4k",
    "zstd": "compression_type=zstd",
    "metadata": "preallocation=metadata",
}


def contents(path: Path, key: str | None = None) -> bytes:
    """By QEMU: the disk, or a snapshot's."""
    out = path.with_suffix(".contents")
    words = ["-l", f"snapshot.id={key}"] if key is not None else []
    done = qemu_img("convert", *words, "-O", "raw", path, out)
    assert done.code == 0, done.err
    return out.read_bytes()


def our_contents(path: Path, key: str | None = None) -> bytes:
    with Opener().open(str(path), "qcow2") as image:
        assert isinstance(image, Qcow2Reader)
        if key is not None:
            image.use_snapshot(next(one for one in image.snapshots if one.id == key))
        return image.read(0, image.size)


def compress(image: Qcow2Writer, data: bytes) -> bytes:
    if image.header.compression:
        packed = zstd_compress(data)
        assert packed is not None
        return packed
    packer = zlib.compressobj(6, zlib.DEFLATED, -12, 9)
    return packer.compress(data) + packer.flush()


def change(path: Path, dice: random.Random, *, by_us: bool) -> None:
    """Some random writes, by QEMU or by us; compressed ones by us."""
    commands: list[str] = []
    with Opener().open(str(path), "qcow2", writable=by_us) as image:
        for _ in range(4):
            offset = dice.randrange(SIZE - 512) & -512
            length = min(SIZE - offset, dice.choice((512, 4096, 65536, 300 << 10)))
            what, pattern = dice.choice(("write", "write", "zero", "discard")), dice.randrange(1, 255)
            # Compressed clusters share clusters of the file, for which two bits are not enough.
            if dice.random() < 0.2 and isinstance(image, Qcow2Writer) and image.refcounts.maximum > 3:
                size = image.cluster_size
                data = (dice.randbytes(40) * size)[:size]
                image.write_compressed(offset & -size, compress(image, data))
            elif not by_us:
                text = {"write": f"write -P {pattern}", "zero": "write -z", "discard": "discard"}[what]
                commands.append(f"{text} {offset} {length}")
            elif what == "write":
                image.write(offset, bytes([pattern]) * length)
            else:
                image.write_zeroes(offset, length, discard=what == "discard")
    if not by_us:
        qemu_io(path, *commands)


@pytest.mark.parametrize("kind", KINDS)
def test_any_order_of_snapshots_and_writes(tmp_path: Path, kind: str) -> None:
    path, dice = tmp_path / "a.qcow2", random.Random(kind)
    assert qemu_img("create", "-f", "qcow2", "-o", KINDS[kind], path, str(SIZE)).code == 0
    kept: dict[str, bytes] = {}  # by id; names are n1, n2, ...
    limit = 2 if kind == "two-bits" else 4  # refcounts of two bits go up to 3
    for step in range(STEPS):
        by_us = dice.random() < 0.7
        tool: Callable[..., Done] = kvik_img if by_us else qemu_img
        change(path, dice, by_us=dice.random() < 0.5)
        what = "c" if not kept else dice.choice("ccad")
        if what == "c" and len(kept) >= limit:
            what = "d"
        if what == "c":
            now = our_contents(path)
            assert tool("snapshot", "-c", f"n{step}", path).code == 0
            with Opener().open(str(path), "qcow2") as image:
                assert isinstance(image, Qcow2Reader)
                kept[image.snapshots[-1].id] = now
        else:
            key = dice.choice(sorted(kept))
            with Opener().open(str(path), "qcow2") as image:
                assert isinstance(image, Qcow2Reader)
                name = next(one.name for one in image.snapshots if one.id == key)
            if kind == "two-bits" and what == "a":
                tool = kvik_img  # QEMU counts up before it counts down, and has no room for that
            done = tool("snapshot", f"-{what}", name, path)
            assert done.code == 0, done.err
            if what == "d":
                del kept[key]
            else:
                assert our_contents(path) == kept[key]
        ours = kvik_img("check", path)
        assert ours.code == 0, ours.err
        for key, data in kept.items():
            assert our_contents(path, key) == data
        if step % 4 == 3:
            assert_clean(path)
    assert contents(path) == our_contents(path)
    for key, data in kept.items():
        assert contents(path, key) == data
    for key in list(kept):
        assert kvik_img("snapshot", "-d", key, path).code == 0
    assert_clean(path)


def test_it_is_listed_as_qemu_lists_it(tmp_path: Path, same: Callable[..., Done]) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", path, "1M")
    assert same("snapshot", "-l", path).out == ""
    for name in ("first", "a name with blanks", "x" * 255, "first"):
        assert kvik_img("snapshot", "-c", name, path).code == 0
    assert qemu_img("snapshot", "-c", "theirs", path).code == 0
    assert "theirs" in same("snapshot", "-l", path).out
    same("info", path)
    same("info", "--output=json", path)
    assert [one["id"] for one in kvik_img("snapshot", "--json", path).json] == ["1", "2", "3", "4", "5"]


def test_what_qemu_refuses_is_refused(tmp_path: Path) -> None:
    path, raw, external = tmp_path / "a.qcow2", tmp_path / "a.raw", tmp_path / "external.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "refcount_bits=1", path, "1M")
    qemu_io(path, "write 0 64k")
    raw.write_bytes(bytes(512))
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", external, "1M")
    before = path.read_bytes()
    for words in (
        ("-c", "one", path),
        ("-a", "none", path),
        ("-d", "none", path),
        ("-l", "-c", "one", path),
        ("-c", "one", "-a", "one", path),
        ("-c", "one", raw),
        ("-c", "one", external),
    ):
        done = kvik_img("snapshot", *words)
        assert done.code == 1 and done.err, words
        assert path.read_bytes() == before
        assert qemu_img("snapshot", *words).code == 1
        path.write_bytes(before)
    assert kvik_img("snapshot", "-l", raw).code == 0
    done = kvik_img("snapshot", "-a", "nothing", path)
    assert "nothing" in done.err


def test_bitmaps_stay_and_forbid_to_apply(tmp_path: Path, same: Callable[..., Done]) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", path, "1M")
    qemu_img("bitmap", "--add", path, "b")
    qemu_io(path, "write 0 128k")
    assert kvik_img("snapshot", "-c", "one", path).code == 0
    assert_clean(path)
    same("info", path)
    assert qemu_img("snapshot", "-a", "one", path).code == 1
    done = kvik_img("snapshot", "-a", "one", path)
    assert done.code == 1 and "bitmap --remove" in done.err
    assert kvik_img("snapshot", "-d", "one", path).code == 0
    assert_clean(path)


def test_the_room_of_a_deleted_snapshot_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", path, "64M")
    qemu_io(path, "write -P 1 0 32M")
    assert kvik_img("snapshot", "-c", "one", path).code == 0
    qemu_io(path, "write -P 2 0 32M")
    assert path.stat().st_blocks * 512 > 64 << 20
    assert kvik_img("snapshot", "-d", "one", path).code == 0
    assert path.stat().st_blocks * 512 < 34 << 20
    qemu_io(path, "read -P 2 0 32M")
    assert_clean(path)


def test_a_disk_that_was_resized_goes_back_to_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -P 1 0 1M")
    assert kvik_img("snapshot", "-c", "small", path).code == 0
    assert qemu_img("resize", path, "900M").code == 0
    qemu_io(path, "write -P 2 800M 1M")
    assert kvik_img("snapshot", "-c", "big", path).code == 0
    for name, size in (("small", 1 << 20), ("big", 900 << 20), ("small", 1 << 20)):
        assert kvik_img("snapshot", "-a", name, path).code == 0
        assert qemu_img("info", "--output=json", path).json["virtual-size"] == size
        assert_clean(path)
    qemu_io(path, "read -P 1 0 1M")


def machine(path: Path, *commands: str) -> str:
    """What a stopped machine's monitor answers; its disk is the image."""
    done = subprocess.run(
        [
            *("qemu-system-x86_64", "-S", "-M", "pc,accel=tcg", "-m", "1", "-display", "none", "-nodefaults"),
            *("-drive", f"if=none,file={path},format=qcow2", "-monitor", "stdio"),
        ],
        input="".join(f"{line}\n" for line in (*commands, "quit")),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86")
@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on"])
def test_the_state_of_a_machine_survives(tmp_path: Path, same: Callable[..., Done], options: str) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", *(["-o", options] if options else []), path, "8M")
    qemu_io(path, "write -P 1 0 1M")
    machine(path, "savevm one", "savevm two")
    qemu_io(path, "write -P 2 0 1M")
    for words in (("-c", "disk"), ("-d", "two"), ("-a", "one"), ("-c", "again"), ("-a", "disk"), ("-d", "disk")):
        assert kvik_img("snapshot", *words, path).code == 0
        assert_clean(path)
        same("snapshot", "-l", path)
    qemu_io(path, "read -P 2 0 1M")
    assert "KiB" in kvik_img("snapshot", path).out
    said = machine(path, "loadvm one", "savevm three", "loadvm one")
    assert "rror" not in said, said
    assert_clean(path)
    qemu_io(path, "read -P 1 0 1M")
    # What an applied snapshot leaves behind the disk's end does not become part of a bigger disk.
    assert kvik_img("snapshot", "-a", "one", path).code == 0
    assert_clean(path)
