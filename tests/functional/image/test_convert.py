"""`kvik img convert`, `compare`, `measure` and `resize` do and print what qemu-img does and prints."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from functional.image.conftest import Done, assert_clean, kvik_img, qemu_img, qemu_io
from functional.image.test_look import KINDS
from kvik.image.opening import open_image
from kvik.image.qcow2.bitmaps import read_bits
from kvik.image.qcow2.reader import Qcow2Reader

SIZE = 20 << 20


def mixed(path: Path, size: int = SIZE, seed: int = 5) -> Path:
    """Random, compressible and zero stretches, and holes; odd offsets and lengths among them."""
    chance = random.Random(seed)
    with path.open("wb") as stream:
        stream.truncate(size)
        at = 0
        while at < size - (600 << 10):
            length = chance.choice([3000, 4096, 65536, 200_000, 512_000])
            data = chance.choice([chance.randbytes(length), b"compressible " * (length // 13), bytes(length)])
            os.pwrite(stream.fileno(), data, at)
            at += length + chance.choice([0, 0, 512, 70_000, 1 << 20])
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return mixed(tmp_path / "source.raw")


def assert_same_data(one: Path, other: Path) -> None:
    done = qemu_img("compare", one, other)
    assert done.code == 0, done.out + done.err


def used(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("kind", KINDS)
def test_raw_into_every_kind_and_back(tmp_path: Path, raw: Path, kind: str) -> None:
    ours, theirs, back = tmp_path / "ours", tmp_path / "theirs", tmp_path / "back"
    words = ["-f", "raw", "-O", "qcow2", *KINDS[kind], raw]
    done = kvik_img("convert", *words, ours)
    assert (done.code, done.out, done.err) == (0, "", "")
    qemu_img("convert", *words, theirs)
    assert_same_data(ours, raw)
    assert_clean(ours)
    if "preallocation" not in "".join(KINDS[kind]):
        data = [
            sum(one["length"] for one in qemu_img("map", "--output=json", path).json if one["data"])
            for path in (ours, theirs)
        ]
        assert data[0] == data[1]
    assert kvik_img("convert", "-f", "qcow2", ours, back).code == 0
    assert back.read_bytes() == raw.read_bytes()
    assert used(back) <= used(raw)


@pytest.mark.parametrize("kind", ["plain", "zstd", "small-clusters", "big-clusters", "extended", "one-bit"])
def test_compressed(tmp_path: Path, raw: Path, kind: str) -> None:
    ours, theirs, back = tmp_path / "ours", tmp_path / "theirs", tmp_path / "back"
    words = ["-c", "-f", "raw", "-O", "qcow2", *KINDS[kind], raw]
    assert kvik_img("convert", *words, ours).code == 0
    qemu_img("convert", *words, theirs)
    assert_same_data(ours, raw)
    assert_clean(ours)
    assert ours.stat().st_size < theirs.stat().st_size * 1.03 + 65536
    assert kvik_img("convert", "-m", "2", ours, back).code == 0
    assert back.read_bytes() == raw.read_bytes()
    assert kvik_img("compare", "-s", ours, theirs).code == qemu_img("compare", "-s", ours, theirs).code


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """An image on a shorter one on a raw one."""
    base = mixed(tmp_path / "base.raw", 8 << 20, 1)
    middle, top = tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "raw", middle, "12M")
    qemu_io(middle, "write -P 7 1M 300k", "write -z 3M 1M", "write -P 8 10M 5000")
    qemu_img("create", "-f", "qcow2", "-b", middle, "-F", "qcow2", top, "20M")
    qemu_io(
        top,
        "write -P 9 1100k 70k",
        "write -z 1536k 256k",
        "write -P 3 15M 100k",
        "write -z 16M 1M",
        "write -c -P 4 18M 64k",
    )
    return top


@pytest.mark.parametrize("words", [[], ["-c"]], ids=["plain", "compressed"])
def test_chains(tmp_path: Path, chain: Path, words: list[str]) -> None:
    flat, over = tmp_path / "flat.qcow2", tmp_path / "over.qcow2"
    assert kvik_img("convert", *words, "-O", "qcow2", chain, flat).code == 0
    assert "backing file" not in qemu_img("info", flat).out
    assert_same_data(flat, chain)
    assert_clean(flat)
    on = ["-B", tmp_path / "middle.qcow2", "-F", "qcow2"]
    assert kvik_img("convert", *words, "-O", "qcow2", *on, chain, over).code == 0
    assert_same_data(over, chain)
    assert_clean(over)
    theirs = tmp_path / "theirs.qcow2"
    qemu_img("convert", *words, "-O", "qcow2", *on, chain, theirs)
    if not words:
        depth = [qemu_img("map", "--output=json", path).json for path in (over, theirs)]
        assert [{**one, "offset": 0} for one in depth[0]] == [{**one, "offset": 0} for one in depth[1]]


def test_an_overlay_where_there_was_none_hides_what_is_below(tmp_path: Path, raw: Path) -> None:
    base, over = mixed(tmp_path / "other.raw", SIZE, 9), tmp_path / "over.qcow2"
    assert kvik_img("convert", "-O", "qcow2", "-B", base, "-F", "raw", raw, over).code == 0
    assert_same_data(over, raw)
    assert_clean(over)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_into_a_target_that_exists(tmp_path: Path, raw: Path, format: str) -> None:
    target = tmp_path / "target"
    qemu_img("create", "-f", format, target, SIZE + (1 << 20))
    qemu_io(target, "write -P 5 0 21M", format=format)
    assert kvik_img("convert", "-n", "-O", format, raw, target).code == 0
    assert qemu_img("compare", "-f", "raw", "-F", format, raw, target).code == 1  # what is behind the source's end
    qemu_io(target, "read -P 5 20M 1M", "write -z 20M 1M", format=format)
    assert qemu_img("compare", "-f", "raw", "-F", format, raw, target).code == 0
    qemu_img("create", "-f", format, target, SIZE - 512)
    before = target.read_bytes()
    done = kvik_img("convert", "-n", "-O", format, raw, target)
    assert done.code == 1 and "smaller than" in done.err
    assert target.read_bytes() == before
    empty = tmp_path / "empty"
    qemu_img("create", "-f", format, empty, SIZE)
    assert kvik_img("convert", "-n", "--target-is-zero", "-O", format, raw, empty).code == 0
    assert qemu_img("compare", "-f", "raw", "-F", format, raw, empty).code == 0
    assert used(empty) < used(raw) + (1 << 20)


def test_sources_one_after_the_other(tmp_path: Path) -> None:
    one, two = mixed(tmp_path / "one", 3_000_320, 1), mixed(tmp_path / "two", 5 << 20, 2)
    two_qcow2 = tmp_path / "two.qcow2"
    kvik_img("convert", "-O", "qcow2", two, two_qcow2)
    for words in (["-O", "qcow2"], ["-O", "qcow2", "-c"], ["-O", "raw"]):
        target = tmp_path / "target"
        assert kvik_img("convert", *words, one, two_qcow2, one, target).code == 0
        both = tmp_path / "both"
        both.write_bytes(one.read_bytes() + two.read_bytes() + one.read_bytes())
        assert qemu_img("compare", "-F", words[1], both, target).code == 0


@pytest.mark.parametrize("sparse", ["0", "512", "64k", "1M"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_how_many_zeros_are_a_hole(tmp_path: Path, raw: Path, sparse: str, format: str) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for run, target in ((kvik_img, ours), (qemu_img, theirs)):
        assert run("convert", "-S", sparse, "-O", format, raw, target).code == 0
    assert qemu_img("compare", "-F", format, raw, ours).code == 0
    if sparse == "0":
        assert used(ours) >= SIZE and used(theirs) >= SIZE
    else:
        assert used(ours) <= used(theirs) * 1.2


@pytest.mark.parametrize("word", ["1", "second", "snapshot.name=first of all", "snapshot.id=2,snapshot.name=second"])
def test_an_internal_snapshot(tmp_path: Path, word: str) -> None:
    image, ours, theirs = tmp_path / "a.qcow2", tmp_path / "ours", tmp_path / "theirs"
    qemu_img("create", "-f", "qcow2", image, "5M")
    qemu_io(image, "write -P 1 0 3M")
    qemu_img("snapshot", "-c", "first of all", image)
    qemu_io(image, "write -P 2 1M 3M")
    qemu_img("snapshot", "-c", "second", image)
    qemu_io(image, "write -P 3 2M 3M")
    assert kvik_img("convert", "-l", word, image, ours).code == 0
    qemu_img("convert", "-l", word, image, theirs)
    assert ours.read_bytes() == theirs.read_bytes()
    assert "has no snapshot 'third'" in kvik_img("convert", "-l", "third", image, ours).err


def test_other_options(tmp_path: Path, raw: Path) -> None:
    target = tmp_path / "target"
    for words in (
        ["-W", "-m", "4", "-t", "none", "-T", "none"],
        ["-C"],
        ["-q", "-p", "-r", "1G", "-t", "writeback"],
        ["-O", "qcow2", "-o", "data_file=" + str(tmp_path / "data"), "-C"],
        ["-O", "qcow2", "-o", "data_file=" + str(tmp_path / "data") + ",data_file_raw=on"],
    ):
        done = kvik_img("convert", *words, raw, target)
        assert (done.code, done.out) == (0, ""), done.err
        assert ("converting" in done.err) == ("-p" in words and "-q" not in words)
        assert qemu_img("compare", "-f", "raw", "-F", "qcow2" if "qcow2" in words else "raw", raw, target).code == 0
    assert (tmp_path / "data").read_bytes() == raw.read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ["-C", "-S", "4k"],
        ["-C", "-c", "-O", "qcow2"],
        ["--target-is-zero"],
        ["-O", "qcow2", "-B", "source.raw"],
        ["-O", "qcow2", "-c", "-o", "preallocation=full"],
        ["-c"],
        ["-S", "1000"],
        ["-S", "32M"],
        ["-m", "17"],
        ["-t", "sometimes"],
        ["-O", "qcow2", "-o", "cluster_size=3000"],
        ["-l", "absent"],
        ["-f", "qcow2"],
        ["absent"],
        ["-O", "qcow2", "-B", "source.raw", "-F", "raw", "source.raw"],
    ],
    ids=" ".join,
)
def test_what_qemu_refuses_is_refused_and_leaves_nothing(
    tmp_path: Path, raw: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in (qemu_img, kvik_img):
        done = run("convert", *words, "source.raw", "target")
        assert done.code == 1 and done.err
        if run is kvik_img:
            assert not Path("target").exists()
        Path("target").unlink(missing_ok=True)
    # One that exists stays as it was.
    Path("target").write_bytes(b"precious")
    assert kvik_img("convert", *words, "source.raw", "target").code == 1
    assert Path("target").read_bytes() == b"precious"


def test_an_image_is_not_its_own_target(raw: Path) -> None:
    before = raw.read_bytes()
    done = kvik_img("convert", "-O", "qcow2", raw, raw)
    assert done.code == 1 and "in use" in done.err
    assert raw.read_bytes() == before


def bits_of(path: Path) -> dict[str, bytes]:
    with open_image(os.open(path, os.O_RDONLY), format="qcow2", path=str(path)) as image:
        assert isinstance(image, Qcow2Reader)
        return {one.name: bytes(read_bits(image, one)) for one in image.bitmaps}


def test_bitmaps_come_along(tmp_path: Path, same: Callable[..., Done]) -> None:
    image, ours, theirs = tmp_path / "a.qcow2", tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    qemu_img("create", "-f", "qcow2", image, "20M")
    qemu_img("bitmap", "--add", image, "changes")
    qemu_img("bitmap", "--add", "-g", "4k", image, "fine")
    qemu_io(image, "write 1M 300k", "write 15M 4k")
    qemu_img("bitmap", "--disable", image, "fine")
    for run, target in ((kvik_img, ours), (qemu_img, theirs)):
        assert run("convert", "--bitmaps", "-O", "qcow2", image, target).code == 0
    assert_clean(ours)
    assert_same_data(ours, image)
    bitmaps = [
        qemu_img("info", "--output=json", path).json["format-specific"]["data"]["bitmaps"] for path in (ours, theirs)
    ]
    assert sorted(bitmaps[0], key=str) == sorted(bitmaps[1], key=str)
    assert [bits_of(path) for path in (ours, theirs)] == [bits_of(image)] * 2
    with image.open("r+b") as stream:  # the flag "in use" of the first entry of the directory
        place = int.from_bytes(os.pread(stream.fileno(), 4096, 0).partition(b"\x23\x85\x28\x75")[2][20:28], "big")
        flags = os.pread(stream.fileno(), 4, place + 12)
        os.pwrite(stream.fileno(), (int.from_bytes(flags, "big") | 1).to_bytes(4, "big"), place + 12)
    done = kvik_img("convert", "--bitmaps", "-O", "qcow2", image, tmp_path / "other")
    assert done.code == 1 and "inconsistent" in done.err and not (tmp_path / "other").exists()
    words = ["convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", image]
    assert kvik_img(*words, tmp_path / "other").code == qemu_img(*words, theirs).code == 0
    assert kvik_img("convert", "--bitmaps", image, tmp_path / "raw").code == 1


# -- compare


def test_compare(tmp_path: Path, raw: Path, chain: Path, same: Callable[..., Done]) -> None:
    image = tmp_path / "a.qcow2"
    kvik_img("convert", "-O", "qcow2", raw, image)
    assert same("compare", raw, image).code == 0
    assert same("compare", "-f", "raw", "-F", "qcow2", "-q", raw, image).out == ""
    assert same("compare", image, image).code == 0
    assert same("compare", "-s", image, image).code == 0
    assert same("compare", "-s", chain, chain).code == 0
    assert same("compare", "-s", raw, image).code == 1
    for offset in (0, 5 << 20, (1 << 20) - 1, SIZE - 1):
        other = tmp_path / "b.raw"
        other.write_bytes(raw.read_bytes())
        with other.open("r+b") as stream:
            byte = os.pread(stream.fileno(), 1, offset)[0]
            os.pwrite(stream.fileno(), bytes([byte ^ 1]), offset)
        for words in ([raw, other], [other, image], ["-s", raw, other], [chain, other]):
            assert same("compare", *words).code == 1


def test_compare_images_of_different_size(tmp_path: Path, raw: Path, same: Callable[..., Done]) -> None:
    longer = tmp_path / "longer.raw"
    longer.write_bytes(raw.read_bytes() + bytes(1 << 20))
    assert "Warning" in same("compare", raw, longer).out
    assert same("compare", longer, raw).code == 0
    assert same("compare", "-s", longer, raw).code == 1
    longer.write_bytes(raw.read_bytes() + bytes(1 << 19) + b"\1" * 512)
    assert same("compare", longer, raw).code == 1
    assert same("compare", "-p", raw, longer, "-q").code == 1


def test_compare_of_what_cannot_be_read(tmp_path: Path, raw: Path, same: Callable[..., Done]) -> None:
    assert same("compare", raw, tmp_path / "absent").code == 2
    assert same("compare", "-f", "qcow2", raw, raw).code == 2
    image = tmp_path / "a.qcow2"
    raw.write_bytes(b"compressible " * 100_000)
    kvik_img("convert", "-c", "-O", "qcow2", raw, image)
    with image.open("r+b") as stream:
        os.pwrite(stream.fileno(), b"\xff" * 4096, image.stat().st_size - 4096)
    assert same("compare", raw, image).code == 4


# -- measure


@pytest.mark.parametrize("output", ["human", "json"])
def test_measure(tmp_path: Path, raw: Path, chain: Path, output: str, same: Callable[..., Done]) -> None:
    qemu_img("bitmap", "--add", chain, "changes")
    qemu_img("bitmap", "--add", "--disable", "-g", "4k", chain, "still")
    form = f"--output={output}"
    for options in (
        [],
        ["-O", "raw"],
        ["-O", "qcow2"],
        ["-O", "qcow2", "-o", "compat=0.10"],
        ["-O", "qcow2", "-o", "cluster_size=4k,refcount_bits=64"],
        ["-O", "qcow2", "-o", "cluster_size=2M,extended_l2=on"],
        ["-O", "qcow2", "-o", "preallocation=full"],
        ["-O", "qcow2", "-o", "backing_file=base,backing_fmt=raw"],
    ):
        for source in ([raw], [chain], ["--size", "1"], ["--size", "3T"], ["-f", "raw", chain]):
            same("measure", form, *options, *source)
    for wrong in ([], ["--size", "1G", raw], ["--size", "1G", "-f", "raw"], ["-O", "qcow2", "--size", "7E"]):
        assert same("measure", *wrong).code == 1


def test_what_is_measured_is_what_is_made(tmp_path: Path, raw: Path) -> None:
    figure = kvik_img("measure", "--output=json", "-O", "qcow2", raw).json["required"]
    assert kvik_img("convert", "-O", "qcow2", raw, tmp_path / "a").code == 0
    assert (tmp_path / "a").stat().st_size <= figure


# -- resize


@pytest.mark.parametrize("kind", [*KINDS, "raw"])
def test_grow_and_shrink(tmp_path: Path, raw: Path, kind: str, same: Callable[..., Done]) -> None:
    format = "raw" if kind == "raw" else "qcow2"
    image = tmp_path / "image"
    kvik_img("convert", "-O", format, *KINDS.get(kind, []), raw, image)
    for size, shrink in (("+13M", False), ("70000k", False), ("-60M", True), ("3000320", True), ("5G", False)):
        done = kvik_img("resize", "-f", format, *(["--shrink"] if shrink else []), image, size)
        assert (done.code, done.out) == (0, "Image resized.\n"), done.err
        if format == "qcow2":
            assert_clean(image)
        same("info", "--output=json", image)
    # What was cut off is gone for good, up to the byte.
    expected = tmp_path / "expected"
    with expected.open("wb") as stream:
        stream.write(raw.read_bytes()[:3000320])
        stream.truncate(5 << 30)
    assert qemu_img("compare", "-F", format, expected, image).code == 0


def test_shrinking_gives_room_back(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", image, "60M")
    qemu_io(image, "write -P 1 0 50M")
    assert kvik_img("resize", "-q", "--shrink", image, "5M").out == ""
    assert used(image) < 6 << 20 and image.stat().st_size < 6 << 20
    assert_clean(image)
    qemu_io(image, "read -P 1 0 5M")


def test_growing_shows_nothing_of_what_is_below(tmp_path: Path) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(b"\7" * (8 << 20))
    for version in ("0.10", "1.1"):
        qemu_img("create", "-f", "qcow2", "-o", f"compat={version}", "-b", base, "-F", "raw", top, "1000k")
        assert kvik_img("resize", top, "9M").code == 0
        qemu_io(top, "read -P 7 0 1000k", "read -P 0 1000k 8216k")
        assert_clean(top)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocation_of_the_new_part(tmp_path: Path, mode: str) -> None:
    image, file = tmp_path / "a.qcow2", tmp_path / "a.raw"
    qemu_img("create", "-f", "qcow2", image, "1M")
    assert kvik_img("resize", f"--preallocation={mode}", image, "9M").code == 0
    assert_clean(image)
    mapped = qemu_img("map", "--output=json", image).json
    assert sum(one["length"] for one in mapped if one["start"] >= 1 << 20 and "offset" in one) == 8 << 20
    file.write_bytes(bytes(1 << 20))
    assert kvik_img("resize", "-f", "raw", f"--preallocation={mode}", file, "9M").code == (
        1 if mode == "metadata" else 0
    )
    if mode != "metadata":
        assert used(image) >= 8 << 20 and used(file) >= 9 << 20
    assert kvik_img("resize", f"--preallocation={mode}", "--shrink", image, "2M").code == 1


def test_bitmaps_and_snapshots_stay_true(tmp_path: Path, same: Callable[..., Done]) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", image, "20M")
    qemu_img("bitmap", "--add", "-g", "512", image, "fine")
    qemu_img("bitmap", "--add", "--disable", image, "still")
    qemu_io(image, "write -P 1 0 15M")
    qemu_img("snapshot", "-c", "first", image)
    for size in ("600M", "10M", "2G"):
        assert kvik_img("resize", "--shrink", image, size).code == 0
        assert_clean(image)
        same("info", "--output=json", image)
        flags = [
            one["flags"] for one in qemu_img("info", "--output=json", image).json["format-specific"]["data"]["bitmaps"]
        ]
        assert flags == [["auto"], []]
    qemu_io(image, "read -P 1 0 10M", "read -P 0 10M 500M")
    assert kvik_img("convert", "-l", "first", image, tmp_path / "first").code == 0
    assert (tmp_path / "first").read_bytes() == b"\1" * (15 << 20) + bytes(5 << 20)


def test_what_qemu_refuses_to_resize(tmp_path: Path, raw: Path) -> None:
    image = tmp_path / "a.qcow2"
    kvik_img("create", "-f", "qcow2", "-o", "compat=0.10", image, "5M")
    words = (
        ["1M"],
        ["+1M", "--preallocation=maybe"],
        ["1M", "--shrink", "--preallocation=full"],
        ["-5M", "--shrink"],
        ["0"],
        ["1000001"],
        ["9E"],
    )
    for word in words:
        for run in (qemu_img, kvik_img):
            done = run("resize", image, *word)
            assert done.code == 1 and done.err, (run, word)
    qemu_img("snapshot", "-c", "one", image)
    assert "snapshots" in kvik_img("resize", image, "+1M").err
    assert "--shrink" in kvik_img("resize", "-f", "raw", raw, "1M").err
