"""Random combinations of options, valid and not: both programs print the same, end the same and leave the same images.

`KVIK_TEST_EXAMPLES` sets how many are tried.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from functional.image.conftest import Done, kvik_img, qemu_img, qemu_io
from kvik.errors import KvikError
from kvik.image.info import info
from kvik.image.opening import Opener

EXAMPLES = 10 * int(os.environ.get("KVIK_TEST_EXAMPLES", "12"))
SIZE = 1 << 20

# images that are there: how they were made
IMAGES = ("a.raw", "plain.qcow2", "full.qcow2", "top.qcow2", "old.qcow2", "small.qcow2")
FORMATS = ("raw", "qcow2", "luks", "foo")
CACHES = ("none", "writeback", "unsafe", "writethrough", "directsync", "foo")
SIZES = ("1M", "2M", "512", "1000", "0", "1.5M", "64k", "x", "-1")
CREATE = (
    "cluster_size=4k", "cluster_size=64k", "cluster_size=2M", "cluster_size=3k", "cluster_size=256", "compat=0.10",
    "compat=1.1", "compat=v3", "compat=foo", "refcount_bits=1", "refcount_bits=64", "refcount_bits=3",
    "lazy_refcounts=on", "lazy_refcounts=off", "lazy_refcounts=maybe", "extended_l2=on", "extended_l2=off",
    "compression_type=zstd", "compression_type=zlib", "compression_type=foo", "preallocation=off",
    "preallocation=metadata", "preallocation=falloc", "preallocation=full", "preallocation=foo", "size=1M", "size=3M",
    "foo=on", "foo", "data_file=data", "data_file_raw=on", "backing_file=a.raw", "backing_fmt=raw",
)  # fmt: skip
AMEND = (
    "compat=0.10", "compat=1.1", "lazy_refcounts=on", "lazy_refcounts=off", "refcount_bits=8", "refcount_bits=32",
    "size=2M", "cluster_size=4k", "backing_file=a.raw", "foo=1",
)  # fmt: skip
SNAPSHOTS = ("one", "1", "nine", "snapshot.name=one", "snapshot.id=1", "snapshot.id=1,snapshot.name=two", "")

Words = st.SearchStrategy[list[str]]


def option(letter: str, *values: str) -> Words:
    """Given or not, with one of the values where it takes one."""
    if not values:
        return st.sampled_from([[], [letter]])
    return st.one_of(st.just([]), st.sampled_from(values).map(lambda value: [letter, value]))


def listed(*values: str) -> Words:
    return st.lists(st.sampled_from(values), max_size=3, unique=True).map(
        lambda words: ["-o", ",".join(words)] * bool(words)
    )


def command(name: str, *parts: Words) -> Words:
    return st.tuples(*parts).map(lambda found: [name, *(word for words in found for word in words)])


def words(*values: str) -> Words:
    return st.sampled_from(values).map(lambda value: [value])


image = words(*IMAGES, "missing")
format_ = option("-f", *FORMATS)
quiet, share, json = option("-q"), option("-U"), option("--output=json")
commands = st.one_of(
    command("info", format_, share, json, option("--backing-chain"), option("--output", "human", "foo"), image),
    command("check", format_, share, json, quiet, option("-r", "leaks", "all", "foo"), option("-T", *CACHES), image),
    command("map", format_, share, json, option("-s", *SIZES), option("-l", *SIZES), image),
    command("create", quiet, format_, listed(*CREATE), option("-b", "a.raw", "plain.qcow2", "missing"),
            option("-F", "raw", "qcow2", "foo"), option("-u"), words("new", "a.raw"),
            st.one_of(st.just([]), words(*SIZES))),
    command("convert", quiet, format_, share, option("-O", *FORMATS), listed(*CREATE), option("-c"), option("-n"),
            option("-S", "0", "4k", "64k", "100", "x"), option("-m", "1", "4", "0", "17"), option("-W"), option("-C"),
            option("-t", *CACHES), option("-T", *CACHES), option("-l", *SNAPSHOTS), option("--salvage"),
            option("--target-is-zero"), image, words("new", "small.qcow2", "a.raw")),
    command("convert", option("-O", "raw", "qcow2"), option("-B", "a.raw"), option("-F", "raw"), option("--bitmaps"),
            option("--skip-broken-bitmaps"), option("-r", "100M", "x"), image, image, words("new")),
    command("convert", option("-O", "raw", "qcow2"), option("-B", "a.raw"), option("-F", "raw"), option("--bitmaps"),
            option("--skip-broken-bitmaps"), option("-p"), listed(*CREATE), image, words("new")),
    command("compare", quiet, format_, option("-F", *FORMATS), share, option("-s"), option("-T", *CACHES), image,
            image),
    command("measure", json, format_, share, option("-O", "raw", "qcow2", "foo"), listed(*CREATE),
            option("-l", *SNAPSHOTS), option("--size", *SIZES), st.one_of(st.just([]), image)),
    command("resize", quiet, format_, option("--shrink"), option("--preallocation=falloc"),
            option("--preallocation", "off", "metadata", "full", "foo"), image,
            words("2M", "+1M", "-512k", "1M", "+0", "512", "x", "+x", "1000", "16M")),
    command("snapshot", quiet, share, option("-l"), option("-c", "two", ""), image),
    command("snapshot", quiet, option("-a", *SNAPSHOTS), option("-d", "one", "nine", ""), image),
    command("amend", quiet, format_, option("--force"), option("-t", *CACHES), listed(*AMEND), image),
    command("rebase", quiet, format_, share, option("-u"), option("-b", "a.raw", "plain.qcow2", "", "missing"),
            option("-F", "raw", "qcow2", "foo"), option("-t", *CACHES), option("-T", *CACHES), image),
    command("commit", quiet, format_, option("-d"), option("-b", "a.raw", "plain.qcow2"), option("-t", *CACHES),
            option("-r", "100M", "x"), option("-p"), image),
    command("bitmap", format_, option("--add"), option("-g", "64k", "1", "x"), option("--clear"), option("--disable"),
            option("--enable"), option("--merge", "b", "nine"), option("--remove"), option("-b", "full.qcow2"),
            option("-F", "qcow2"), image, words("b", "c")),
    command("dd", format_, share, option("-O", *FORMATS), option("bs=4k"), option("bs=1000"), option("count=3"),
            option("count=x"), option("foo=1"), option("if=a.raw"), option("if=top.qcow2"), option("of=new")),
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    with contextlib.chdir(directory):
        Path("a.raw").write_bytes(bytes(65536) + b"raw" * 40000 + bytes(SIZE - 65536 - 120000))
        for name, made in (
            ("plain.qcow2", ["-o", "cluster_size=64k"]),
            ("full.qcow2", ["-o", "cluster_size=16k,extended_l2=on,compression_type=zstd"]),
            ("top.qcow2", ["-b", "a.raw", "-F", "raw"]),
            ("old.qcow2", ["-o", "compat=0.10,cluster_size=4k"]),
        ):
            assert qemu_img("create", "-f", "qcow2", *made, name, str(SIZE)).code == 0
            qemu_io(Path(name), "write -P 7 128k 70k", "write -z 256k 64k", "discard 128k 4k")
        for words_ in (["snapshot", "-c", "one", "full.qcow2"], ["bitmap", "--add", "full.qcow2", "b"]):
            assert qemu_img(*words_).code == 0
        qemu_io(Path("full.qcow2"), "write -P 8 0 20k")
        assert qemu_img("convert", "-c", "-O", "qcow2", "a.raw", "small.qcow2").code == 0
    return directory


def left() -> dict[str, Any]:
    """What the images of this directory are: their facts, and their disks."""
    found: dict[str, Any] = {}
    for path in sorted(Path().iterdir()):
        try:
            with Opener().open(path.name) as opened:
                facts = info(opened).as_dict()
                facts.pop("actual-size")
                for snapshot in facts.get("snapshots", []):
                    for name in ("date-sec", "date-nsec", "icount"):  # QEMU says 0 where there is none
                        snapshot.pop(name, None)
                found[path.name] = facts, opened.read(0, min(opened.size, 4 << 20))
        except (KvikError, OSError) as error:
            found[path.name] = type(error)
    return found


def normal(done: Done) -> str:
    """What is printed, without what depends on the moment and the file system."""
    text = re.sub(
        r"(disk size: ).*|(\"actual-size\": )\d+|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|\"date-n?sec\": \d+", r"\1", done.out
    )
    return re.sub(r" {4}\([\d.]+/100%\)[\r\n]", "", text).strip("\n")


def run(images: Path, directory: Path, program: Any, words: list[str]) -> tuple[Done, dict[str, Any]]:
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(images, directory)
    with contextlib.chdir(directory):
        return program(*words), left()


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(command=commands)
def test_random_options(images: Path, tmp_path_factory: pytest.TempPathFactory, command: list[str]) -> None:
    place = tmp_path_factory.getbasetemp() / "options"
    ours, our_images = run(images, place, kvik_img, command)
    if ours.code:
        assert ours.err or command[0] in ("check", "compare"), command
        assert "new" not in our_images, command
        if command[0] not in ("convert", "create", "dd"):  # which may have begun with an image that was there
            with contextlib.chdir(images):
                assert our_images == left(), command
    if has_its_own_way(command):
        return
    theirs, their_images = run(images, place, qemu_img, command)
    assert ours.code == theirs.code, (command, ours.err, theirs.err)
    if not ours.code:
        assert our_images == their_images, command
    if not ours.code or command[0] not in ("create", "convert"):  # QEMU may have said what it was about to do
        assert normal(ours) == normal(theirs), command


def has_its_own_way(command: list[str]) -> bool:
    """Where kvik is not to do what qemu-img 7.2 does."""
    name, given = command[0], set(command)
    return (
        # of an image with a bitmap QEMU loses the snapshots
        (name == "check" and {"-r", "full.qcow2"} <= given)
        # QEMU opens the image for writing, and does nothing
        or (name == "snapshot" and not {"-l", "-c", "-a", "-d"} & given)
        # QEMU cannot compress into clusters that have data
        or (name == "convert" and {"-c", "-n"} <= given)
        # what is said of the target is not so
        or (name == "convert" and "--target-is-zero" in given)
        # QEMU makes an image its own backing file
        or (name == "rebase" and command.count(command[-1]) > 1)
    )
