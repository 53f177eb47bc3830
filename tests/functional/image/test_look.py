"""`kvik img info`, `check` and `map` print what qemu-img prints, byte for byte."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from functional.image.conftest import Done, assert_clean, kvik_img, qemu_img, qemu_io
from kvik.image.qcow2.header import parse

KINDS: dict[str, list[str]] = {
    "plain": [],
    "v2": ["-o", "compat=0.10"],
    "lazy": ["-o", "lazy_refcounts=on"],
    "small-clusters": ["-o", "cluster_size=512"],
    "big-clusters": ["-o", "cluster_size=2M"],
    "one-bit": ["-o", "refcount_bits=1"],
    "four-bits": ["-o", "refcount_bits=4"],
    "wide": ["-o", "refcount_bits=64"],
    "zstd": ["-o", "compression_type=zstd"],
    "extended": ["-o", "extended_l2=on"],
    "extended-zstd": ["-o", "extended_l2=on,compression_type=zstd,cluster_size=16k"],
    "metadata": ["-o", "preallocation=metadata"],
    "falloc": ["-o", "preallocation=falloc"],
}
WRITES = (
    "write -P 1 0 1M",
    "write -P 2 1536k 300k",
    "write -P 3 4M 5000",
    "write -z 5M 1M",
    "write -z 6000000 70000",
    "write -c -P 4 8M 64k",
    "write -P 5 16000k 3k",
    "discard 256k 192k",
)


@pytest.fixture(params=KINDS)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "a.qcow2"
    assert qemu_img("create", "-f", "qcow2", *KINDS[request.param], path, "20M").code == 0
    no_compression = {"small-clusters", "big-clusters", "extended-zstd", "metadata", "falloc"}  # of 64 KiB, or at all
    writes = [one for one in WRITES if "-c" not in one or request.param not in no_compression]
    qemu_io(path, *writes)
    return path


def test_all_kinds_of_images(image: Path, same: Callable[..., Done]) -> None:
    for output in ("human", "json"):
        same("info", "--output", output, image)
        same("check", f"--output={output}", image)
    same("map", "--output=json", image)
    same("map", "--output=json", "-s", "1M", "-l", "3M", image)


def test_maps_as_text(tmp_path: Path, same: Callable[..., Done]) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", base, "5M")
    qemu_io(base, "write 0 2M", "write -z 1M 64k")
    qemu_img("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top, "8M")
    qemu_io(top, "write 128k 64k", "write -z 256k 64k")
    same("map", top)
    same("map", "--output=json", top)
    same("info", "--backing-chain", top)
    same("info", "--backing-chain", "--output=json", top)
    qemu_io(top, "write -c 3M 64k")
    assert same("map", top).code == 1


def test_a_backing_image_that_is_shorter(tmp_path: Path, same: Callable[..., Done]) -> None:
    for size, bottom in (("1M", "raw"), ("1000k", "qcow2"), ("65k", "qcow2")):
        base, top = tmp_path / "base", tmp_path / "top.qcow2"
        qemu_img("create", "-f", bottom, base, size)
        qemu_io(base, "write 3k 20k", format=bottom)
        qemu_img("create", "-f", "qcow2", "-b", base, "-F", bottom, top, "4M")
        qemu_io(top, "write 2M 64k")
        same("map", "--output=json", top)


def test_raw_images_and_external_data_files(
    tmp_path: Path, same: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where QEMU looks for a data file of a relative name
    raw = tmp_path / "a.raw"
    with raw.open("wb") as stream:
        stream.truncate(10 << 20)
        os.pwrite(stream.fileno(), b"x" * 9000, 1 << 20)
        stream.truncate((10 << 20) + 77)
    for words in (["info"], ["info", "--output=json"], ["map"], ["map", "--output=json"]):
        same(*words, "-f", "raw", raw)
    assert kvik_img("check", "-f", "raw", raw).code == qemu_img("check", "-f", "raw", raw).code == 63
    for kind in ("off", "on"):
        image = tmp_path / f"data-{kind}.qcow2"
        qemu_img("create", "-f", "qcow2", "-o", f"data_file=data-{kind}.raw,data_file_raw={kind}", image, "5M")
        qemu_io(image, "write 1M 100k", "write -z 2M 1M", "write 3M 64k")
        for words in (["info"], ["info", "--output=json"], ["check"], ["map"], ["map", "--output=json"]):
            same(*words, image)


def test_snapshots_and_bitmaps_are_listed(tmp_path: Path, same: Callable[..., Done]) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", image, "20M")
    qemu_io(image, "write 0 3M")
    qemu_img("snapshot", "-c", "first of all", image)
    qemu_io(image, "write 1M 3M")
    qemu_img("snapshot", "-c", "second", image)
    qemu_img("bitmap", "--add", image, "changes")
    qemu_img("bitmap", "--add", "--disable", "-g", "4k", image, "still")
    for words in (["info"], ["info", "--output=json"], ["check"], ["check", "--output=json"], ["map", "--output=json"]):
        same(*words, image)


def test_what_is_dirty_corrupt_or_encrypted_is_told(tmp_path: Path, same: Callable[..., Done]) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "lazy_refcounts=on", image, "20M")
    with image.open("r+b") as stream:
        os.pwrite(stream.fileno(), b"\3", 79)
    assert "cleanly shut down: no" in same("info", image).out
    same("info", "--output=json", image)
    with image.open("r+b") as stream:
        os.pwrite(stream.fileno(), b"\0", 79)
        os.pwrite(stream.fileno(), b"\2", 35)  # crypt_method: LUKS
    assert "encrypted: yes" in kvik_img("info", image).out
    assert "is encrypted" in kvik_img("map", image).err


def damaged(tmp_path: Path) -> Path:
    """Wrong refcounts: of data too high and too low, and of nothing."""
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", image, "20M")
    qemu_io(image, "write 0 3M")
    with image.open("r+b") as stream:
        for cluster, refcount in ((9, 0), (11, 5), (70, 1)):
            os.pwrite(stream.fileno(), refcount.to_bytes(2, "big"), 0x20000 + 2 * cluster)
    return image


def test_damage_is_counted_as_qemu_counts_it(tmp_path: Path, same: Callable[..., Done]) -> None:
    image = damaged(tmp_path)
    done = same("check", image)
    assert done.code == 2 and "ERROR cluster 9 refcount=0 reference=1" in done.err
    assert same("check", "--output=json", image).json["corruptions"] == 3


def test_leaks_are_repaired_and_nothing_else(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", image, "20M")
    with image.open("r+b") as stream:
        os.pwrite(stream.fileno(), b"\0\1" * 40, 0x20000 + 8)
        stream.truncate(44 << 16)
    assert kvik_img("check", image).code == 3
    done = kvik_img("check", "-r", "leaks", image)
    assert done.code == 0 and "    40 leaked clusters\n    0 corruptions\n" in done.out
    assert_clean(image)


def test_damage_is_repaired(tmp_path: Path) -> None:
    image = damaged(tmp_path)
    before = qemu_img("map", "--output=json", image).out
    done = kvik_img("check", "-r", "all", image)
    assert done.code == 0 and "No errors were found" in done.out
    assert_clean(image)
    assert qemu_img("map", "--output=json", image).out == before


@pytest.mark.parametrize("bits", [1, 2, 8, 16, 32, 64])
def test_a_lost_refcount_table_is_made_anew(tmp_path: Path, bits: int) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", f"refcount_bits={bits},cluster_size=4k", image, "20M")
    qemu_io(image, "write -P 7 0 3M", "write -P 8 10M 1M")
    with image.open("r+b") as stream:
        os.pwrite(stream.fileno(), bytes(4096), 4096)
    assert kvik_img("check", image).code == 2
    assert kvik_img("check", "-r", "all", image).code == 0
    assert_clean(image)
    qemu_io(image, "read -P 7 0 3M", "read -P 8 10M 1M", "write -P 9 12M 1M")
    assert_clean(image)


def test_an_image_that_was_not_closed_is_repaired_when_it_is_opened_for_writing(tmp_path: Path) -> None:
    image = damaged(tmp_path)
    with image.open("r+b") as stream:
        os.pwrite(stream.fileno(), b"\1", 79)
    from kvik.image.opening import Opener

    with Opener().open(str(image), "qcow2", writable=True) as opened:
        opened.write(0, b"x" * 512)
    assert "cleanly shut down" not in qemu_img("info", image).out
    assert_clean(image)


def luks_header(cipher: bytes, mode: bytes, key_bytes: int) -> bytes:
    """As cryptsetup writes it, with one key; made by hand, for real ones take a second of hashing each."""
    uuid = b"69bbe2b1-e73a-4e89-a191-efeddb5d46a2"
    header = struct.pack(">6sH32s32s32sII", b"LUKS\xba\xbe", 1, cipher, mode, b"sha256", 4040, key_bytes)
    header += struct.pack(">20s32sI40s", b"digest", b"salt", 9921, uuid)
    for number in range(8):
        active, iters = (0x00AC71F3, 39815) if number == 0 else (0xDEAD, 0)
        header += struct.pack(">II32sII", active, iters, b"salt", 8 + 504 * number, 4000)
    return header


@pytest.mark.parametrize("kind", ["luks", "luks-essiv", "qcow2", "qcow2-aes"])
def test_encrypted_images_are_told_and_not_read(tmp_path: Path, same: Callable[..., Done], kind: str) -> None:
    image, format = tmp_path / "a", kind.partition("-")[0]
    luks = luks_header(b"aes", b"xts-plain64", 64)
    if kind == "luks-essiv":
        luks = luks_header(b"aes", b"cbc-essiv:sha256", 32)
    if format == "luks":
        image.write_bytes(luks + bytes(4040 * 512 + (1 << 20) - len(luks)))
    else:
        assert kvik_img("create", "-q", "-f", "qcow2", image, "1M").code == 0
        with image.open("r+b") as file:
            header = parse(file.fileno(), "")
            header.crypt_method = 1 if kind == "qcow2-aes" else 2
            if header.crypt_method == 2:
                header.encryption = struct.pack(">QQ", 1 << 20, 4040 * 512)
            file.write(header.pack())
            file.seek(1 << 20)
            file.write(luks + bytes(4040 * 512 - len(luks)))
    for output in ("human", "json"):
        same("info", "--output", output, image)
    for words in (["convert", "-f", format, "-O", "raw", image, tmp_path / "out"], ["map", "-f", format, image]):
        done = kvik_img(*words)
        assert done.code == 1 and "is encrypted" in done.err
    assert kvik_img("snapshot", "-f", format, "-c", "one", image).code == 1
    image.write_bytes(image.read_bytes()[:500])
    assert kvik_img("info", "-f", format, image).code == 1
