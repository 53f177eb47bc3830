"""bzImage headers and PVH notes, from files made here: right ones, and ones that lie."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.errors import ImageError, KvikError, NotFound
from kvik.image import kernel
from kvik.image.elf import ElfFile
from kvik.image.kernel import has_pvh_entry, parse_bzimage, uncompressed_kernel, unpack_bzimage


def elf(*, pvh: bool = True, machine: int = 62, filler: int = 256) -> bytes:
    """A 64-bit ELF file with one PT_NOTE segment holding Xen's 32-bit entry point, or somebody else's note."""
    name = b"Xen\0" if pvh else b"GNU\0"
    note = struct.pack("<III", 4, 8, 18) + name + struct.pack("<Q", 0x1000000)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    program = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    return header + program + note + bytes(filler)


def bzimage(payload: bytes, *, sectors: int = 1, protocol: int = 0x020F, length: int | None = None) -> bytes:
    setup = bytearray((sectors + 1) * 512)
    setup[0x1F1] = sectors
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, protocol)
    struct.pack_into("<H", setup, 0x20E, 0x300 - 0x200)
    setup[0x300:0x310] = b"6.1.0-test (x)\0\0"
    struct.pack_into("<II", setup, 0x248, 16, len(payload) if length is None else length)
    return bytes(setup) + bytes(16) + payload


def packed(body: bytes) -> bytes:
    return gzip.compress(body) + struct.pack("<I", len(body))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "kernels"


def test_the_header_says_where_the_payload_lies() -> None:
    image = parse_bzimage(bzimage(b"payload!", sectors=3))
    assert image is not None
    assert (image.payload_offset, image.payload_length) == (4 * 512 + 16, 8)
    assert image.version == "6.1.0-test"


def test_other_files_are_no_bzimage() -> None:
    assert parse_bzimage(b"") is None
    assert parse_bzimage(bytes(4096)) is None
    assert parse_bzimage(elf()) is None


@pytest.mark.parametrize("length", [0, 9, 0xFFFFFFFF])
def test_a_payload_outside_the_file_is_an_error(length: int) -> None:
    with pytest.raises(ImageError, match="outside the file"):
        parse_bzimage(bzimage(b"payload!", length=length))


def test_the_kernel_comes_out_as_it_was() -> None:
    assert unpack_bzimage(bzimage(packed(elf()))) == elf()
    assert unpack_bzimage(bzimage(elf())) == elf()  # a kernel built without compression


def test_an_unknown_or_damaged_payload_is_an_error() -> None:
    with pytest.raises(ImageError, match="unknown compression"):
        unpack_bzimage(bzimage(b"no such compression"))
    with pytest.raises(ImageError):
        unpack_bzimage(bzimage(packed(elf())[:40]))


def test_a_payload_that_unpacks_to_too_much_is_an_error() -> None:
    with pytest.raises(ImageError, match="more than"):
        unpack_bzimage(bzimage(packed(elf(filler=100_000))), limit=50_000)


def test_only_xens_note_of_an_x86_kernel_is_a_pvh_entry() -> None:
    assert has_pvh_entry(elf())
    assert not has_pvh_entry(elf(pvh=False))
    assert not has_pvh_entry(elf(machine=183))  # aarch64


@given(st.data())
def test_a_damaged_elf_file_never_crashes_the_reader(data: st.DataObject) -> None:
    body = bytearray(elf())
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, 143))] = data.draw(st.integers(0, 255))
    try:
        has_pvh_entry(bytes(body))
        ElfFile(bytes(body)).sections()
        ElfFile(bytes(body)).needed()
        ElfFile(bytes(body)).modinfo()
        ElfFile(bytes(body)).interpreter()
    except ImageError:
        pass


@given(st.binary(min_size=0x250 - 0x1F1, max_size=0x250 - 0x1F1))
def test_any_setup_header_is_read_or_refused(header: bytes) -> None:
    data = bytearray(bzimage(packed(elf())))
    data[0x1F1:0x250] = header
    data[0x202:0x206], data[0x1FE:0x200] = b"HdrS", b"\x55\xaa"
    try:
        unpack_bzimage(bytes(data))
    except KvikError:
        pass


def test_a_pvh_kernel_is_unpacked_once_and_found_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(packed(elf())))
    first = uncompressed_kernel(path, cache)
    assert first is not None
    assert first.read_bytes() == elf()

    def never(*args: object, **kwargs: object) -> bytes:
        raise AssertionError("unpacked twice")

    monkeypatch.setattr(kernel, "unpack_bzimage", never)
    assert uncompressed_kernel(path, cache) == first
    copy = tmp_path / "copy"  # the same contents elsewhere share the entry
    copy.write_bytes(path.read_bytes())
    assert uncompressed_kernel(copy, cache) == first


def test_a_changed_kernel_is_noticed(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(packed(elf())))
    first = uncompressed_kernel(path, cache)
    path.write_bytes(bzimage(packed(elf(filler=512))))
    second = uncompressed_kernel(path, cache)
    assert second is not None and second != first
    assert second.read_bytes() == elf(filler=512)


def test_a_lost_cache_entry_is_made_again(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(packed(elf())))
    first = uncompressed_kernel(path, cache)
    assert first is not None
    first.unlink()
    assert uncompressed_kernel(path, cache) == first
    assert first.exists()


def test_what_qemu_must_boot_itself_gives_none(tmp_path: Path, cache: Path) -> None:
    for number, contents in enumerate(
        (
            bzimage(packed(elf(pvh=False))),
            bzimage(b"\x89LZO\x00\r\n\x1a\n" + bytes(64)),  # nothing here unpacks lzo
            bzimage(packed(elf()), protocol=0x0204),  # too old to say where its payload is
            elf(pvh=False, filler=1024),
            bytes(4096),
            b"",
        )
    ):
        path = tmp_path / str(number)
        path.write_bytes(contents)
        assert uncompressed_kernel(path, cache) is None
        assert uncompressed_kernel(path, cache) is None  # also from the cache


def test_an_uncompressed_pvh_kernel_is_used_as_it_is(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(elf(filler=1024))
    assert uncompressed_kernel(path, cache) == path
    assert uncompressed_kernel(path, cache) == path


def test_a_damaged_kernel_is_an_error_and_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(packed(elf())[:40]))
    with pytest.raises(ImageError):
        uncompressed_kernel(path, cache)
    assert not list(tmp_path.rglob("*.vmlinux"))


def test_a_missing_kernel_is_named(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(NotFound, match="no-such"):
        uncompressed_kernel(tmp_path / "no-such", cache)


def test_the_cache_keeps_the_most_recently_used(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CACHED_KERNELS", 2)
    results = []
    for number in range(4):
        path = tmp_path / f"vmlinuz{number}"
        path.write_bytes(bzimage(packed(elf(filler=256 + number))))
        result = uncompressed_kernel(path, cache)
        assert result is not None
        os.utime(result, (number, number))
        results.append(result)
    assert [result.exists() for result in results] == [False, False, True, True]
    assert not list(cache.rglob(".*"))
