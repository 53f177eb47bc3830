"""Images named by options, and parts of them copied: as qemu-img does it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from functional.image.conftest import Done, kvik_img, qemu_img
from kvik.cli.img import COMMANDS_OF_IMG

SIZE = 3 << 20


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """a.raw and a.qcow2, the same disk; what is on it."""
    monkeypatch.chdir(tmp_path)
    data = random.Random(5).randbytes(SIZE // 2) + bytes(SIZE // 2 - 500) + b"end" + bytes(497)
    Path("a.raw").write_bytes(data)
    assert qemu_img("convert", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2").code == 0
    return data


QCOW2, RAW = "driver=qcow2,file.filename=a.qcow2", "driver=raw,file.driver=file,file.filename=a.raw"


@pytest.mark.parametrize(
    "words",
    [
        ["info", QCOW2],
        ["info", "file.filename=a.qcow2"],
        ["info", "--backing-chain", RAW],
        ["check", QCOW2],
        ["map", RAW],
        ["compare", QCOW2, RAW],
        ["measure", "-O", "qcow2", RAW],
        ["snapshot", "-c", "one", QCOW2],
        ["bitmap", "--clear", QCOW2, "b"],
        ["amend", "-o", "lazy_refcounts=on", QCOW2],
        ["resize", QCOW2, "+1M"],
        ["rebase", "-u", "-b", "", QCOW2],
        ["convert", "-O", "raw", QCOW2, "out"],
        ["convert", "-O", "raw", RAW, RAW, "out"],
        ["compare", "-f", "raw", QCOW2, RAW],
        ["convert", "--target-image-opts", RAW, RAW],
        ["info", "driver=nbd,host=localhost"],
        ["info", "driver=qcow2,file.driver=http,file.filename=http://localhost/"],
        ["info", "driver=raw"],
        ["info", "a.raw"],
    ],
    ids=" ".join,
)
def test_images_are_named_by_options(images: bytes, same: Callable[..., Done], words: list[str]) -> None:
    words = [words[0], "--image-opts", *words[1:]]
    before = Path("a.qcow2").read_bytes()
    same(*words)
    after = Path("a.qcow2").read_bytes()
    if words[0] in ("resize", "snapshot"):  # qemu-img was the first
        Path("a.qcow2").write_bytes(before)
        assert kvik_img(*words).code == 0
        assert Path("a.qcow2").read_bytes() != before != after


def test_a_name_with_a_comma_and_a_target_by_options(images: bytes) -> None:
    Path("a.raw").rename("a,b")
    Path("target").write_bytes(bytes(SIZE))
    words = ["--image-opts", "-n", "--target-image-opts", "driver=raw,file.filename=a,,b"]
    done = kvik_img("convert", *words, "driver=raw,file.filename=target")
    assert done.code == 0 and Path("target").read_bytes() == images, done.err


@pytest.mark.parametrize(
    "words",
    [
        ["if=a.raw"],
        ["-f", "qcow2", "bs=1M", "skip=1", "if=a.qcow2"],
        ["-O", "qcow2", "bs=64k", "count=30", "if=a.raw"],
        ["--image-opts", "bs=512", "count=9", f"if={QCOW2}"],
        ["bs=1000", "count=7", "if=a.raw"],
        ["bs=1M", "skip=100", "if=a.raw"],
        ["bs=0", "if=a.raw"],
        ["count=x", "if=a.raw"],
        ["conv=sync", "if=a.raw"],
        ["if=absent"],
        ["-f", "raw", "--image-opts", f"if={RAW}"],
    ],
    ids=" ".join,
)
def test_parts_are_copied(images: bytes, words: list[str]) -> None:
    theirs, ours = qemu_img("dd", *words, "of=theirs"), kvik_img("dd", *words, "of=ours")
    assert ours.code == theirs.code, (ours.err, theirs.err)
    if ours.code:
        assert not Path("ours").exists() and ours.err
        return
    assert qemu_img("compare", "ours", "theirs").code == 0
    assert qemu_img("info", "ours").out.split("\n")[1:3] == qemu_img("info", "theirs").out.split("\n")[1:3]


def test_count_is_the_number_of_blocks_that_are_copied(images: bytes) -> None:
    """As dd(1) and qemu-img's manual have it; qemu-img 7.2 counts those that it skips, too."""
    assert kvik_img("dd", "bs=4k", "skip=2", "count=3", "if=a.raw", "of=out").code == 0
    assert Path("out").read_bytes() == images[8192:20480]
    assert kvik_img("dd", "if=a.raw").code == 1


@pytest.mark.parametrize("verb", COMMANDS_OF_IMG)
def test_every_command_tells_its_options_within_80_columns(verb: str) -> None:
    """And qemu-img's options are among them."""
    done = kvik_img(verb, "--help")
    assert done.code == 0 and all(len(line) <= 80 for line in done.out.splitlines()), done.out
    (theirs,) = (line for line in qemu_img("--help").out.splitlines() if line.startswith(f"  {verb} "))
    for option in re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", theirs):
        assert re.search(rf"(?<![\w-]){option}\b", done.out), option


def test_what_scripts_ask_first(images: bytes) -> None:
    """The version, in qemu-img's words, and the formats; and -T, which may come before any command."""
    for word in ("-V", "--version"):
        assert re.match(r"qemu-img version 7\.2\.\d+ \(", kvik_img(word).out)
        assert re.match(r"qemu-img version 7\.2\.\d+ \(", qemu_img(word).out)
    (line,) = (line for line in kvik_img("--help").out.splitlines() if line.startswith("Supported formats: "))
    assert {"raw", "qcow2", "luks", "vmdk"} <= {*line.split()} <= {*qemu_img("--help").out.split(), "ova"}
    for words in (["-T", "nothing"], ["-Tnothing"], ["--trace", "nothing"], ["--trace=nothing"]):
        theirs, ours = qemu_img(*words, "info", "a.qcow2"), kvik_img(*words, "info", "a.qcow2")
        assert (ours.code, ours.out) == (theirs.code, theirs.out)
        assert (
            "trace event 'nothing' does not exist" in ours.err and "trace event 'nothing' does not exist" in theirs.err
        )
