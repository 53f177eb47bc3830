"""Loading kernels: what lands where in guest memory, and what damaged files are told."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvik.errors import HostError, ImageError, InvalidArgument, KvikError, NotFound, OperationUnsupported
from kvik.vmm import acpi, boot
from kvik.vmm.acpi.description import Cpu, Description
from kvik.vmm.boot.memory_map import ACPI_TABLES, RAM, RESERVED, memory_map
from kvik.vmm.config import BootConfig
from kvik.vmm.layout import (
    BOOT_GDT,
    BOOT_PAGE_TABLES,
    CMDLINE,
    EBDA,
    ECAM,
    ECAM_SIZE,
    GIB,
    HIGH_MEMORY,
    HVM_START_INFO,
    KERNEL,
    MIB,
    RAM_HIGH,
    RSDP,
    ZERO_PAGE,
)
from kvik.vmm.memory import GuestMemory, HostMemory

TEXT = bytes(range(256)) * 20  # 5120 bytes: a page and a bit
ENTRY = KERNEL + 0x850


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory.allocate(64 * MIB)
    yield made
    made.close()


def elf(
    *, entry: int | None = ENTRY, address: int = KERNEL, text: bytes = TEXT, size: int | None = None, machine: int = 62
) -> bytes:
    """A 64-bit ELF with one PT_LOAD and, if it has an entry, the PVH note."""
    note = struct.pack("<III", 4, 4, 18) + b"Xen\0" + struct.pack("<I", entry or 0)
    offset = 4096
    at_note = offset + len(text)
    headers = struct.pack(
        "<IIQQQQQQ", 1, 5, offset, 0, address, len(text), len(text) + 8192 if size is None else size, 4096
    )
    if entry is not None:
        headers += struct.pack("<IIQQQQQQ", 4, 4, at_note, 0, 0, len(note), len(note), 4)
    ident = b"\x7fELF\2\1\1" + bytes(9)
    rest = (2, machine, 1, 0, 64, 0, 0, 64, 56, len(headers) // 56, 0, 0, 0)
    head = ident + struct.pack("<HHIQQQIHHHHHH", *rest)
    return (head + headers).ljust(offset, b"\0") + text + note


def bzimage(
    *,
    body: bytes = TEXT * 4,
    protocol: int = 0x20F,
    flags: int = 1,
    pref: int = KERNEL,
    init: int = 1 * MIB,
    sects: int = 3,
) -> bytes:
    header = bytearray((sects + 1) * 512)
    header[0x1F1] = sects
    struct.pack_into("<I", header, 0x1F4, len(body) // 16)
    header[0x1FE:0x200] = b"\x55\xaa"
    header[0x201] = 0x6A
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", header, 0x206, protocol)
    struct.pack_into("<I", header, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<IBBH", header, 0x230, 0x200000, 1, 21, flags)
    struct.pack_into("<I", header, 0x238, 2047)
    struct.pack_into("<II", header, 0x248, 0, len(body))
    struct.pack_into("<QI", header, 0x258, pref, init)
    return bytes(header) + body


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def test_an_elf_kernel_is_placed_and_entered_by_pvh(memory: GuestMemory, tmp_path: Path) -> None:
    initrd = os.urandom(5000)
    config = BootConfig(
        kernel=write(tmp_path / "k", elf()), initrd=write(tmp_path / "i", initrd), cmdline="console=ttyS0 ä"
    )
    entry = boot.load_kernel(memory, config)
    assert (entry.mode, entry.rip, entry.info) == ("pvh32", ENTRY, HVM_START_INFO)
    assert memory.read(KERNEL, len(TEXT)) == TEXT
    fields = struct.unpack("<IIIIQQQQII", memory.read(HVM_START_INFO, 56))
    magic, version, _, modules, modlist, cmdline, rsdp, table, count, _ = fields
    assert (magic, version, modules, cmdline, rsdp) == (0x336EC578, 1, 1, CMDLINE, RSDP)
    assert memory.read(CMDLINE, 18) == "console=ttyS0 ä\0".encode() + b"\0"
    address, size, *_ = struct.unpack("<4Q", memory.read(modlist, 32))
    assert memory.read(address, size) == initrd and address % 4096 == 0 and address + size > 63 * MIB
    listed = [struct.unpack("<QQII", memory.read(table + 24 * n, 24))[:3] for n in range(count)]
    assert listed == memory_map(memory)
    assert memory.u64(BOOT_GDT + 0x10) == 0x00CF9B000000FFFF
    assert memory.read(0xFFFF0, 9) == bytes.fromhex("ba0206 b001 ee f4 ebfd")  # a BIOS that resets


def test_after_a_reset_what_must_be_zero_is_made_zero(memory: GuestMemory, tmp_path: Path) -> None:
    config = BootConfig(kernel=write(tmp_path / "k", elf()))
    memory.write(KERNEL + len(TEXT), b"\xee" * 100)
    boot.load_kernel(memory, config, fresh=False)
    assert memory.read(KERNEL + len(TEXT), 8192) == bytes(8192)


def test_kernel_and_initrd_may_come_as_descriptors_and_stay_open(memory: GuestMemory, tmp_path: Path) -> None:
    kernel = os.open(write(tmp_path / "k", elf()), os.O_RDONLY)
    initrd = os.open(write(tmp_path / "i", b"cpio" * 100), os.O_RDONLY)
    try:
        for _ in range(2):  # at power-on and at a reset
            entry = boot.load_kernel(memory, BootConfig(kernel_fd=kernel, initrd_fd=initrd))
            assert entry.rip == ENTRY
            os.fstat(kernel)
            os.fstat(initrd)
    finally:
        os.close(kernel)
        os.close(initrd)


def test_only_what_is_said_to_be_stable_is_mapped(memory: GuestMemory, tmp_path: Path) -> None:
    text = os.urandom(3 * 4096)
    kernel, initrd = write(tmp_path / "stable-k", elf(text=text)), write(tmp_path / "stable-i", bytes(8192))
    config = BootConfig(kernel=kernel, initrd=initrd)
    boot.load_kernel(memory, config)
    assert "stable-" not in Path("/proc/self/maps").read_text()
    config.stable_kernel = True
    boot.load_kernel(memory, config)
    maps = Path("/proc/self/maps").read_text()
    assert "stable-k" in maps
    assert "stable-i" not in maps
    assert memory.read(KERNEL, len(text)) == text
    memory.write(KERNEL, b"written")  # copy-on-write
    assert Path(kernel).read_bytes()[4096:4103] == text[:7]


def test_a_bzimage_is_entered_in_64_bit_mode(memory: GuestMemory, tmp_path: Path) -> None:
    body = TEXT * 4
    config = BootConfig(
        kernel=write(tmp_path / "k", bzimage(body=body)), cmdline="quiet", initrd=write(tmp_path / "i", b"x" * 10)
    )
    entry = boot.load_kernel(memory, config)
    assert (entry.mode, entry.rip, entry.info) == ("long64", KERNEL + 0x200, ZERO_PAGE)
    assert memory.read(KERNEL, len(body)) == body
    page = memory.read(ZERO_PAGE, 4096)
    assert page[0x202:0x206] == b"HdrS" and page[0x210] == 0xFF
    assert struct.unpack_from("<I", page, 0x228)[0] == CMDLINE and memory.read(CMDLINE, 6) == b"quiet\0"
    assert struct.unpack_from("<Q", page, 0x70)[0] == RSDP
    image, size = struct.unpack_from("<II", page, 0x218)
    assert memory.read(image, size) == b"x" * 10 and image >= KERNEL + MIB
    listed = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(page[0x1E8])]
    assert listed == memory_map(memory)
    seed = struct.unpack_from("<Q", page, 0x250)[0]
    assert struct.unpack("<QII", memory.read(seed, 16)) == (0, 9, 32) and memory.read(seed + 16, 32) != bytes(32)


def test_the_page_tables_map_four_gib_onto_themselves(memory: GuestMemory, tmp_path: Path) -> None:
    boot.load_kernel(memory, BootConfig(kernel=write(tmp_path / "k", bzimage())))
    for address in (0, KERNEL, 0xFEE0_0000, 4 * GIB - 1):
        pointers = memory.u64(BOOT_PAGE_TABLES) & ~0xFFF
        directory = memory.u64(pointers + 8 * (address >> 30)) & ~0xFFF
        entry = memory.u64(directory + 8 * (address >> 21 & 511))
        assert entry & 0x83 == 0x83 and (entry & ~0x1FFFFF) | address & 0x1FFFFF == address


def test_a_file_in_the_cache_is_entered_by_pvh_and_found_again(
    memory: GuestMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    inner = elf(text=os.urandom(9000))
    packed = gzip.compress(inner)
    packed += struct.pack("<I", len(inner)) + bytes(-(len(packed) + 4) % 16)
    path = write(tmp_path / "k", b"")
    image = bytearray(bzimage(body=packed))
    struct.pack_into("<II", image, 0x248, 0, len(packed) - (-(len(gzip.compress(inner)) + 4) % 16))
    Path(path).write_bytes(image)
    config = BootConfig(kernel=path, cache=str(tmp_path / "cache"))
    assert boot.load_kernel(memory, config).mode == "pvh32"
    assert memory.read(KERNEL, 9000) == inner[4096 : 4096 + 9000]
    # The second time nothing is unpacked, and nothing that unpacks is imported.
    monkeypatch.setattr("kvik.image.kernel.uncompressed_kernel", lambda *_: pytest.fail("unpacked again"))
    assert boot.load_kernel(memory, config).mode == "pvh32"
    # The guest's writes never reach the cached file.
    cached = next((tmp_path / "cache").glob("*.vmlinux"))
    memory.write(KERNEL, b"overwritten")
    assert b"overwritten" not in cached.read_bytes()
    config.protocol = "bzimage"
    assert boot.load_kernel(memory, config).mode == "long64"


def test_the_memory_map_has_a_hole_below_4_gib_and_none_in_the_tables() -> None:
    memory = GuestMemory.allocate(5 * GIB)
    try:
        tables = acpi.build(Description(memory.layout, [Cpu(n) for n in range(1024)], cpu_hotplug=True))
        kept = [(address, len(data)) for address, data in tables]
        found = memory_map(memory, kept)
        assert found[:3] == [
            (0, EBDA, RAM),
            (EBDA, HIGH_MEMORY - EBDA, RESERVED),
            (HIGH_MEMORY, kept[1][0] - HIGH_MEMORY, RAM),
        ]
        assert (ECAM, ECAM_SIZE, RESERVED) in found and (RAM_HIGH, 2 * GIB, RAM) in found
        for address, size in kept[1:]:
            assert (address, size, ACPI_TABLES) in found
        assert all(a + size <= b for (a, size, _), (b, _, _) in itertools.pairwise(found))
    finally:
        memory.close()


def test_memory_that_a_device_brings_is_not_in_the_map() -> None:
    memory = GuestMemory.allocate(64 * MIB, hotplug=GIB)
    before = memory_map(memory)
    memory.add_ram(memory.layout.hotplug[0], 128 * MIB, HostMemory())
    assert memory_map(memory) == before
    memory.close()


def test_a_map_of_256_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = GuestMemory.allocate(256 * GIB)
    try:
        assert sum(size for _, size, kind in memory_map(memory) if kind == RAM) == 256 * GIB - (HIGH_MEMORY - EBDA)
    finally:
        memory.close()


def broken_elf(offset: int, data: bytes) -> bytes:
    made = bytearray(elf())
    made[offset : offset + len(data)] = data
    return bytes(made)


DAMAGED = {
    "empty": (b"", "is empty"),
    "text": (b"#!/bin/sh\n" * 100, "neither a bzImage nor an ELF"),
    "header only": (elf()[:60], "cut off"),
    "wrong processor": (elf(machine=183), "another processor"),
    "no note": (elf(entry=None), "no PVH entry"),
    "truncated": (elf()[:5000], "lies outside the file"),
    "headers outside": (broken_elf(32, struct.pack("<Q", 1 << 40)), "outside the file"),
    "header offset overflow": (broken_elf(32, b"\xff" * 8), "outside the file"),
    "many headers": (broken_elf(56, b"\xff\xff"), "program headers"),
    "segment offset overflow": (broken_elf(64 + 8, b"\xff" * 8), "outside the file"),
    "below 1 MiB": (elf(address=0x7000), "below 1 MiB"),
    "file larger than memory": (elf(size=10), "larger in the file"),
    "bzimage cut": (bzimage()[:9000], "cut off"),
    "bzimage alignment": (bzimage().replace(struct.pack("<I", 0x200000), struct.pack("<I", 3)), "nonsense"),
    "bzimage address": (bzimage(pref=0x1000), "nonsense"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_kernel_is_a_clear_error(memory: GuestMemory, tmp_path: Path, name: str) -> None:
    data, words = DAMAGED[name]
    with pytest.raises(ImageError, match=words) as caught:
        boot.load_kernel(memory, BootConfig(kernel=write(tmp_path / "k", data)))
    assert "kernel" in caught.value.message


def test_a_random_change_of_a_kernel_never_does_worse(memory: GuestMemory, tmp_path: Path) -> None:
    import random

    chance = random.Random(1)
    for sample in (elf(), bzimage()):
        for _ in range(400):
            data = bytearray(sample)
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(1024 if chance.random() < 0.9 else len(data))] = chance.randrange(256)
            del data[chance.randint(len(data) // 2, len(data)) if chance.random() < 0.3 else len(data) :]
            try:
                boot.load_kernel(memory, BootConfig(kernel=write(tmp_path / "k", bytes(data))))
            except KvikError:
                pass


def test_what_does_not_fit_is_said_with_how_much_would(memory: GuestMemory, tmp_path: Path) -> None:
    big = write(tmp_path / "k", elf(size=100 * MIB))
    with pytest.raises(
        InvalidArgument, match=r"needs memory up to 116 MiB, the machine has 64 MiB; .*at least 148 MiB"
    ):
        boot.load_kernel(memory, BootConfig(kernel=big))
    with pytest.raises(InvalidArgument, match="at least"):
        boot.load_kernel(memory, BootConfig(kernel=write(tmp_path / "b", bzimage(init=100 * MIB))))
    with open(tmp_path / "i", "wb") as stream:
        stream.truncate(60 * MIB)
    with pytest.raises(InvalidArgument, match=r"initrd .* \(60 MiB\) does not fit .*at least"):
        boot.load_kernel(memory, BootConfig(kernel=write(tmp_path / "k", elf()), initrd=str(tmp_path / "i")))
    with pytest.raises(InvalidArgument, match="2048 bytes, this kernel takes 2047"):
        boot.load_kernel(memory, BootConfig(kernel=write(tmp_path / "k", elf()), cmdline="x" * 2048))
    with pytest.raises(InvalidArgument, match="zero byte"):
        boot.load_kernel(memory, BootConfig(kernel=write(tmp_path / "k", elf()), cmdline="a\0b"))


def test_files_that_are_not_there_or_no_files(memory: GuestMemory, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="kernel"):
        boot.load_kernel(memory, BootConfig(kernel=str(tmp_path / "none")))
    with pytest.raises(ImageError, match="no regular file"):
        boot.load_kernel(memory, BootConfig(kernel=str(tmp_path)))
    with pytest.raises(HostError, match="cannot be opened"):
        boot.load_kernel(memory, BootConfig(kernel_fd=987))
    with pytest.raises(NotFound, match="initrd"):
        boot.load_kernel(memory, BootConfig(kernel=write(tmp_path / "k", elf()), initrd=str(tmp_path / "none")))
    with pytest.raises(InvalidArgument, match="no kernel"):
        boot.load_kernel(memory, BootConfig())


def test_a_protocol_that_the_kernel_has_not(memory: GuestMemory, tmp_path: Path) -> None:
    with pytest.raises(OperationUnsupported, match=r"no 64-bit entry.*2\.06"):
        boot.load_kernel(memory, BootConfig(kernel=write(tmp_path / "k", bzimage(protocol=0x206))))
    with pytest.raises(OperationUnsupported, match="64-bit kernel"):
        boot.load_kernel(memory, BootConfig(kernel=write(tmp_path / "k", bzimage(flags=0))))
    with pytest.raises(ImageError, match="cannot be entered by PVH"):
        boot.load_kernel(memory, BootConfig(kernel=write(tmp_path / "k", bzimage()), protocol="pvh"))
    with pytest.raises(ImageError, match="no bzImage"):
        boot.load_kernel(memory, BootConfig(kernel=write(tmp_path / "k", elf()), protocol="bzimage"))
    with pytest.raises(InvalidArgument, match="unknown boot protocol"):
        boot.load_kernel(memory, BootConfig(kernel="x", protocol="grub"))
