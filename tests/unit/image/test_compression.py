"""Bounded decompression: good data of each kind, bombs, truncation at every byte, random damage."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.errors import ImageError, KvikError, OperationUnsupported
from kvik.image import compression
from kvik.image.compression import decompress, detect, lz4_block

BODY = b"The quick brown fox. " * 400


def lz4_literals(data: bytes) -> bytes:
    """An LZ4 block that holds its data as literals only: valid, if useless, compression."""
    rest = len(data) - 15
    if rest < 0:
        return bytes([len(data) << 4]) + data
    return b"\xf0" + b"\xff" * (rest // 255) + bytes([rest % 255]) + data


def lz4_frame(*blocks: bytes, size: int | None = None) -> bytes:
    frame = compression.LZ4_LEGACY_MAGIC + b"".join(struct.pack("<I", len(block)) + block for block in blocks)
    return frame if size is None else frame + struct.pack("<I", size)


PACKED = {
    "gzip": gzip.compress(BODY),
    "bzip2": bz2.compress(BODY),
    "xz": lzma.compress(BODY),
    "lzma": lzma.compress(BODY, format=lzma.FORMAT_ALONE),
    "lz4": lz4_frame(lz4_literals(BODY[:5000]), lz4_literals(BODY[5000:])),
}


@pytest.mark.parametrize("kind", PACKED)
def test_each_kind_is_recognised_and_unpacked(kind: str) -> None:
    assert detect(PACKED[kind]) == kind
    assert decompress(PACKED[kind], limit=len(BODY)) == BODY


@pytest.mark.parametrize("kind", PACKED)
def test_what_follows_the_stream_is_ignored_as_the_kernels_size_word_must_be(kind: str) -> None:
    assert decompress(PACKED[kind] + struct.pack("<I", len(BODY)), limit=len(BODY)) == BODY


@pytest.mark.parametrize("kind", PACKED)
def test_more_than_the_limit_is_an_error_and_is_never_held(kind: str) -> None:
    with pytest.raises(ImageError):
        decompress(PACKED[kind], limit=len(BODY) - 1)


def test_a_bomb_stops_at_the_limit() -> None:
    bomb = gzip.compress(bytes(64 << 20), 9)
    assert len(bomb) < 100_000
    with pytest.raises(ImageError, match="more than 1000 bytes"):
        decompress(bomb, limit=1000)


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz"])
def test_truncation_anywhere_is_an_error(kind: str) -> None:
    packed = PACKED[kind]
    for length in range(len(packed) - 1):
        with pytest.raises(KvikError):
            decompress(packed[:length], limit=1 << 20)


@pytest.mark.parametrize(
    "block", [b"\xff", b"\xf0\xff", b"\x50abc", b"\x10a\x05\x00", b"\x10a\x00\x00", b"\x1fa\x01\x00\xff"]
)
def test_a_damaged_lz4_block_is_an_error(block: bytes) -> None:
    with pytest.raises(ImageError):
        lz4_block(block, 1 << 16)
    with pytest.raises(ImageError):
        decompress(lz4_frame(block), limit=1 << 16)


def test_lz4_matches_repeat_earlier_output_also_overlapping() -> None:
    # "ab", then a match of 10 at distance 2, then the literals "xyz12"
    block = b"\x26ab\x02\x00" + b"\x50xyz12"
    assert lz4_block(block, 100) == b"ab" * 6 + b"xyz12"
    assert decompress(lz4_frame(block), limit=100) == b"ab" * 6 + b"xyz12"


def test_lz4_in_python_bounds_its_output() -> None:
    block = b"\x1fa\x01\x00" + b"\xff" * 1000 + b"\x00" + b"\x00"
    with pytest.raises(ImageError):
        lz4_block(block, 1000)


def test_the_python_lz4_decoder_agrees_with_the_library() -> None:
    if compression._library("liblz4.so.1") is None:
        pytest.skip("liblz4.so.1 is not on this system")
    block = b"\x26ab\x02\x00" + b"\x50xyz12"
    assert compression._lz4_decoder()(block, 100) == lz4_block(block, 100)


def test_a_missing_decompressor_is_named() -> None:
    with pytest.raises(OperationUnsupported, match="lzo"):
        decompress(b"\x89LZO\x00\r\n\x1a\n" + bytes(20), limit=100)


def test_zstd_without_its_library_says_which_package_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_library", lambda name: None)
    with pytest.raises(OperationUnsupported, match="libzstd1"):
        decompress(b"\x28\xb5\x2f\xfd" + bytes(20), limit=100)


def zstd_raw(data: bytes, *, claimed: int | None = None) -> bytes:
    """A Zstandard frame with one raw block (RFC 8878, sections 3.1.1.1 and 3.1.1.2), single segment, 4-byte size."""
    size = len(data) if claimed is None else claimed
    block = (len(data) << 3 | 0 << 1 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd" + bytes([0b10100000]) + struct.pack("<I", size) + block + data


def test_zstd_frames_are_unpacked_and_bounded() -> None:
    if compression._library("libzstd.so.1") is None:
        pytest.skip("libzstd.so.1 is not on this system")
    assert decompress(zstd_raw(b"hello") + b"tail", limit=10) == b"hello"
    with pytest.raises(ImageError, match="more than"):
        decompress(zstd_raw(b"hello", claimed=1 << 31), limit=10)
    with pytest.raises(ImageError):
        decompress(zstd_raw(b"hello", claimed=3), limit=10)
    with pytest.raises(ImageError):
        decompress(zstd_raw(b"hello")[:-3], limit=10)


@given(st.sampled_from(sorted(PACKED)), st.data())
def test_damage_gives_an_error_or_other_bytes_but_never_a_crash(kind: str, data: st.DataObject) -> None:
    packed = bytearray(PACKED[kind])
    for _ in range(data.draw(st.integers(1, 5))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert len(decompress(bytes(packed), limit=1 << 20)) <= 1 << 20
    except (ImageError, OperationUnsupported):
        pass


@given(st.binary(max_size=300))
def test_random_bytes_never_crash_the_lz4_decoder(data: bytes) -> None:
    try:
        assert len(lz4_block(data, 1 << 16)) <= 1 << 16
    except ImageError:
        pass
