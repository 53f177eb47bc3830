"""qcow2 without QEMU: what is written is read back, tables stay consistent, and no bytes are anything but an error."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvik.errors import ImageError, KvikError
from kvik.image.base import Image
from kvik.image.create import create
from kvik.image.opening import Opener, open_image, probe_format
from kvik.image.qcow2.check import check
from kvik.image.qcow2.header import parse
from kvik.image.qcow2.reader import Qcow2Reader
from kvik.image.qcow2.refcount import pack_block, unpack_block
from kvik.image.qcow2.writer import Qcow2Writer

SIZE = 1 << 20
OPTIONS = [
    {},
    {"compat": "0.10"},
    {"cluster_size": 512},
    {"cluster_size": 4096, "refcount_bits": 1},
    {"cluster_size": 4096, "refcount_bits": 64, "compression_type": "zstd"},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 4096, "preallocation": "metadata"},
]


def memory_image(tmp_path: Path, **options: object) -> int:
    fd = os.memfd_create("image")
    create(fd, "qcow2", SIZE, **options)
    return fd


@pytest.fixture(params=OPTIONS, ids=str)
def fd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    fd = memory_image(tmp_path, **request.param)
    yield fd
    os.close(fd)


def writer(fd: int) -> Qcow2Writer:
    return Qcow2Writer(os.dup(fd), "image", barriers=False)


def reader(fd: int) -> Qcow2Reader:
    return Qcow2Reader(os.dup(fd), "image")


def assert_clean(fd: int) -> None:
    with reader(fd) as image:
        result = check(image)
        assert result.clean, result.messages


def compressed(image: Qcow2Writer, data: bytes) -> bytes:
    import zlib

    from kvik.image.zstd import compress

    if image.header.compression:
        packed = compress(data)
        assert packed is not None
        return packed
    packer = zlib.compressobj(6, zlib.DEFLATED, -12, 9)
    return packer.compress(data) + packer.flush()


def steps(image: Qcow2Writer, model: bytearray, dice: random.Random, count: int) -> None:
    """Random changes, to the image and to plain bytes alike."""
    for _ in range(count):
        offset = dice.randrange(SIZE)
        length = min(SIZE - offset, dice.choice((1, 511, 4096, 20000, 200000)))
        what = dice.randrange(6)
        if what <= 2:
            data = dice.randbytes(length)
            image.write(offset, data)
            model[offset : offset + length] = data
        elif what == 3:
            image.write_zeroes(offset, length, discard=dice.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        elif what == 4:
            at = offset & -image.cluster_size
            data = (dice.randbytes(50) * image.cluster_size)[: image.cluster_size]
            if at + len(data) <= SIZE:
                image.write_compressed(at, compressed(image, data))
                model[at : at + len(data)] = data
        else:
            image.write_back()


@pytest.mark.parametrize("seed", range(4))
def test_random_writes_are_read_back_and_leave_the_tables_whole(fd: int, seed: int) -> None:
    dice = random.Random(seed)
    model = bytearray(SIZE)
    for _ in range(4):
        with writer(fd) as image:
            steps(image, model, dice, 12)
            assert image.read(0, SIZE) == model
        with reader(fd) as image:
            assert image.read(0, SIZE) == model
            extents = list(image.map())
            assert sum(extent.length for extent in extents) == SIZE
            assert all(not any(model[e.start : e.start + e.length]) for e in extents if e.zero)
        assert_clean(fd)


def test_what_is_discarded_reads_as_zero_and_is_used_again(fd: int) -> None:
    with writer(fd) as image:
        image.write(0, b"\1" * SIZE)
    size = os.fstat(fd).st_size
    for _ in range(5):
        with writer(fd) as image:
            image.discard(0, SIZE)
            if image.header.version > 2:
                assert image.read(0, SIZE) == bytes(SIZE)
            image.flush()
            image.write(0, b"\1" * SIZE)
    assert os.fstat(fd).st_size < size * 2.5
    assert_clean(fd)


@pytest.mark.parametrize("order", range(7))
def test_refcount_blocks_of_every_width(order: int) -> None:
    data = random.Random(order).randbytes(512)
    block = unpack_block(data, order)
    assert len(block) == 512 * 8 >> order
    assert pack_block(block, order) == data
    if order < 3:  # bit 0 of a byte is the first cluster's
        assert block[0] == data[0] & ((1 << (1 << order)) - 1)
    elif order > 3:
        width = 1 << order >> 3
        assert block[1] == int.from_bytes(data[width : 2 * width], "big")


def test_the_refcount_table_grows_and_moves() -> None:
    """With clusters of 512 bytes and refcounts of 64 bits a table of one cluster is for 2 MiB."""
    fd = os.memfd_create("image")
    create(fd, "qcow2", 8 << 20, cluster_size=512, refcount_bits=64)
    before = parse(fd, "").refcount_table_offset
    with writer(fd) as image:
        for at in range(0, 8 << 20, 1 << 20):
            image.write(at, b"\7" * (1 << 20))
    assert parse(fd, "").refcount_table_offset != before
    assert_clean(fd)
    with reader(fd) as image:
        assert image.read(0, 8 << 20) == b"\7" * (8 << 20)
    os.close(fd)


def test_a_chain_is_read_and_copied_on_write(tmp_path: Path) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    below = random.Random(1).randbytes(SIZE // 2)
    base.write_bytes(below)
    for options in ({}, {"extended_l2": True}):
        create(str(top), "qcow2", SIZE, backing_file="base.raw", backing_format="raw", **options)
        model = bytearray(below + bytes(SIZE // 2))
        with Opener().open(str(top), "qcow2", writable=True) as image:
            assert image.read(0, SIZE) == model
            for offset, length in ((1000, 10), (SIZE // 2 - 100, 3000), (70000, 90000), (300000, 1)):
                image.write(offset, b"\xaa" * length)
                model[offset : offset + length] = b"\xaa" * length
            image.write_zeroes(200000, 50000)
            model[200000:250000] = bytes(50000)
        with Opener().open(str(top), "qcow2") as image:
            assert image.read(0, SIZE) == model
    assert base.read_bytes() == below


def test_an_external_data_file(tmp_path: Path) -> None:
    for raw in (False, True):
        path = tmp_path / f"{raw}.qcow2"
        data = tmp_path / f"{raw}.raw"
        data.write_bytes(bytes(SIZE))
        create(str(path), "qcow2", SIZE, data_file=data.name, data_file_raw=raw)
        model = bytearray(SIZE)
        with Opener().open(str(path), "qcow2", writable=True) as image:
            image.write(100, b"\1" * 200000)
            model[100:200100] = b"\1" * 200000
            image.write_zeroes(65536, 65536)
            model[65536:131072] = bytes(65536)
            assert image.read(0, SIZE) == model
        with Opener().open(str(path), "qcow2") as image:
            assert image.read(0, SIZE) == model
        assert not raw or data.read_bytes() == model
        with reader(os.open(path, os.O_RDONLY)) as image:
            assert check(image).clean
            with pytest.raises(ImageError, match="which was not opened"):
                image.read(0, 1)


def test_what_a_header_refers_to_is_opened_only_by_the_callers_leave() -> None:
    fd = os.memfd_create("image")
    create(fd, "qcow2", SIZE, backing_file="/etc/passwd", backing_format="raw")
    with open_image(os.dup(fd), format="qcow2") as image:
        with pytest.raises(ImageError, match="was not opened"):
            image.read(0, 512)
        with pytest.raises(ImageError, match="was not opened"):
            list(image.map())
    asked: list[tuple[str, str | None]] = []

    def refuse(name: str, format: str | None) -> Image:
        asked.append((name, format))
        raise ImageError("no")

    with pytest.raises(ImageError, match="no"):
        open_image(fd, format="qcow2", backing=refuse)
    assert asked == [("/etc/passwd", "raw")]
    os.close(fd)


@pytest.mark.parametrize("name", ["json:{}", "nbd://host/x", "nbd:host:1", "http://x/y", "ssh://h/f", "fd:3"])
def test_references_that_are_no_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a"
    create(str(path), "qcow2", SIZE, backing_file=name, backing_format="raw")
    with pytest.raises(ImageError, match="no plain file"):
        Opener().open(str(path))
    Opener().open(str(path), chain=False).close()


def test_loops_and_deep_chains_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create("a", "qcow2", SIZE, backing_file="b", backing_format="qcow2")
    create("b", "qcow2", SIZE, backing_file="./a", backing_format="qcow2")
    with pytest.raises(ImageError, match="loop"):
        Opener().open("a")
    for number in range(300):
        create(f"c{number}", "qcow2", SIZE, backing_file=f"c{number + 1}", backing_format="qcow2")
    create("c300", "qcow2", SIZE)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError, match="deeper than 128"):
        Opener().open("c0")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_fifo_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="neither a file nor a block device"):
        Opener().open(str(tmp_path / "fifo"))
    with pytest.raises(ImageError, match="neither"):
        Opener().open(str(tmp_path))


def test_a_decompression_bomb_gives_one_cluster(tmp_path: Path) -> None:
    import zlib

    fd = memory_image(tmp_path)
    with writer(fd) as image:
        packer = zlib.compressobj(9, zlib.DEFLATED, -12)
        bomb = packer.compress(bytes(50 << 20)) + packer.flush()
        image.write_compressed(0, bomb[:65536])
    with reader(fd) as image:
        assert image.read(0, SIZE) == bytes(SIZE)
    os.close(fd)


def test_two_tables_that_lead_to_the_same_cluster_are_found(tmp_path: Path) -> None:
    fd = memory_image(tmp_path)
    with writer(fd) as image:
        image.write(0, b"\1" * 131072)
        table = next(iter(image.l2._tables))
    os.pwrite(fd, os.pread(fd, 8, table), table + 8)
    with reader(fd) as image:
        result = check(image)
    assert result.corruptions and result.leaks == 1
    assert "refcount=1 reference=2" in result.messages[0]
    os.close(fd)


def test_nothing_is_written_over_a_table(tmp_path: Path) -> None:
    """An entry that leads to the header: the write is refused, as QEMU refuses it."""
    for place in (0, 1, 2, 3):
        fd = memory_image(tmp_path)
        with writer(fd) as image:
            image.write(0, b"\1")
            table = next(iter(image.l2._tables))
        before = os.pread(fd, 1 << 20, 0)
        os.pwrite(fd, (1 << 63 | place << 16).to_bytes(8, "big"), table)
        if place == 0:
            continue
        with pytest.raises(ImageError, match="leads to a table"), writer(fd) as image:
            image.write(0, b"evil" * 100)
        assert os.pread(fd, table, 0) == before[:table]
        os.close(fd)


def flipped(data: bytes, dice: random.Random) -> bytes:
    """A few bytes of the tables changed, or cut off."""
    broken = bytearray(data)
    for _ in range(dice.randrange(1, 6)):
        area = dice.choice(((0, 128), (0, 600), (0x10000, 64), (0x20000, 64), (0x30000, 32), (0x40000, 256)))
        at = area[0] + dice.randrange(area[1])
        if at < len(broken):
            broken[at] = dice.choice((0, 1, 255, 128, dice.randrange(256)))
    return bytes(broken[: dice.randrange(len(broken))]) if dice.random() < 0.1 else bytes(broken)


@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}, {"extended_l2": True}], ids=str)
def test_damaged_images_are_an_error_or_read_and_nothing_else(tmp_path: Path, options: dict[str, object]) -> None:
    dice = random.Random(7)
    original = memory_image(tmp_path, **options)
    with writer(original) as image:
        steps(image, bytearray(SIZE), dice, 10)
    data = os.pread(original, 64 << 20, 0)
    attempts: list[Callable[[int], object]] = [
        lambda fd: Qcow2Reader(fd, "x").read(0, SIZE),
        lambda fd: list(Qcow2Reader(fd, "x").map()),
        lambda fd: check(Qcow2Reader(fd, "x")),
        lambda fd: Qcow2Reader(fd, "x").snapshots,
        lambda fd: Qcow2Reader(fd, "x").bitmaps,
        lambda fd: _write_and_close(fd),
    ]
    for _ in range(150):
        broken = flipped(data, dice)
        fd = os.memfd_create("broken")
        os.write(fd, broken)
        for attempt in attempts:
            try:
                attempt(fd)
            except KvikError as error:
                assert str(error)
        assert os.fstat(fd).st_size < len(data) * 3 + (8 << 20)
        os.close(fd)
    os.close(original)


def _write_and_close(fd: int) -> None:
    image = Qcow2Writer(os.dup(fd), "x", barriers=False)
    try:
        image.write(5000, b"\5" * 90000)
        image.write_zeroes(200000, 100000)
        image.finish()
    finally:
        image.release()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_any_bytes_are_an_image_or_an_error(tail: bytes) -> None:
    fd = os.memfd_create("any")
    os.write(fd, b"QFI\xfb" + tail)
    try:
        with Qcow2Reader(os.dup(fd), "any") as image:
            image.read(0, min(image.size, 4096))
    except KvikError:
        pass
    assert probe_format(fd) == "qcow2"
    os.close(fd)


def test_features_that_are_not_known_are_named(tmp_path: Path) -> None:
    fd = memory_image(tmp_path)
    os.pwrite(fd, (1 << 7 | 1 << 40).to_bytes(8, "big"), 72)
    with pytest.raises(ImageError, match="not supported: bit 7, bit 40"):
        reader(fd)
    os.close(fd)


def test_opening_imports_little() -> None:
    """`kvik img info` must not wait for what only other commands need."""
    import subprocess
    import sys

    code = "import kvik.cli.img_look, kvik.image.info, sys; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"typing", "ctypes", "dataclasses", "argparse", "asyncio", "threading", "fractions"}
