"""A bzImage, entered in 64-bit mode: its own decompressor unpacks it, and moves it (KASLR).

Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header" and "64-bit Boot Protocol"; zero-page.rst. The file is
hostile: what the header says is checked against the file's size and guest RAM.
"""

from __future__ import annotations

import os
import struct

from kvik.errors import ImageError, InvalidArgument, OperationUnsupported
from kvik.named import NamedTuple
from kvik.vmm.boot.entry import Entry
from kvik.vmm.layout import CMDLINE, HIGH_MEMORY, HVM_START_INFO, RSDP, ZERO_PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.boot.source import Source
    from kvik.vmm.memory import GuestMemory

# Offsets in the file, and the same in the zero page
SETUP_SECTS, SYSSIZE, VID_MODE, BOOT_FLAG, JUMP, MAGIC, VERSION = 0x1F1, 0x1F4, 0x1FA, 0x1FE, 0x201, 0x202, 0x206
TYPE_OF_LOADER, RAMDISK_IMAGE, RAMDISK_SIZE, CMD_LINE_PTR = 0x210, 0x218, 0x21C, 0x228
INITRD_ADDR_MAX, KERNEL_ALIGNMENT, RELOCATABLE, XLOADFLAGS, CMDLINE_SIZE = 0x22C, 0x230, 0x234, 0x236, 0x238
SETUP_DATA, PREF_ADDRESS, INIT_SIZE = 0x250, 0x258, 0x260
# Offsets in the zero page only
ACPI_RSDP_ADDR, E820_ENTRIES, E820_TABLE, ZERO_PAGE_SIZE = 0x70, 0x1E8, 0x2D0, 4096

SECTOR = 512
HEADER_END = 0x268
PROTOCOL_64BIT = 0x020C  # 2.12: xloadflags
XLF_KERNEL_64 = 1
ENTRY_64 = 0x200  # behind the start of the protected-mode kernel
UNDEFINED_LOADER = 0xFF
NORMAL_MODE = 0xFFFF
E820_MAX = 128
SETUP_RNG_SEED = 9
SEED_SIZE = 32


class BzImage(NamedTuple):
    """The header, checked. Offsets and sizes are bytes."""

    header: bytes  # the file from 0 on, as far as the setup header goes
    offset: int  # of the protected-mode kernel in the file
    size: int
    pref_address: int
    init_size: int  # memory that it needs from its load address on, before it reads the memory map
    alignment: int
    relocatable: bool
    cmdline_size: int
    initrd_addr_max: int


def is_bzimage(start: bytes) -> bool:
    """From the first KiB of a file."""
    return start[MAGIC : MAGIC + 4] == b"HdrS" and start[BOOT_FLAG : BOOT_FLAG + 2] == b"\x55\xaa"


def parse(source: Source) -> BzImage:
    """Raises `ImageError` for a damaged file, `OperationUnsupported` for a kernel with no 64-bit entry."""
    start = source.read(0, 1024)
    if len(start) < HEADER_END or not is_bzimage(start):
        raise ImageError(f"the kernel {source.name} is no bzImage", remedy="give a bzImage or an ELF kernel")
    (version,) = struct.unpack_from("<H", start, VERSION)
    (flags,) = struct.unpack_from("<H", start, XLOADFLAGS)
    if version < PROTOCOL_64BIT or not flags & XLF_KERNEL_64:
        raise OperationUnsupported(
            f"the kernel {source.name} has no 64-bit entry (boot protocol {version >> 8}.{version & 255:02})",
            remedy="give a 64-bit kernel of Linux 3.8 or later",
        )
    offset = ((start[SETUP_SECTS] or 4) + 1) * SECTOR
    (paragraphs,) = struct.unpack_from("<I", start, SYSSIZE)
    pref, init = struct.unpack_from("<QI", start, PREF_ADDRESS)
    alignment, relocatable = struct.unpack_from("<IB", start, KERNEL_ALIGNMENT)
    size = source.size - offset
    if size <= ENTRY_64 or paragraphs * 16 > size + 15:
        raise ImageError(
            f"the kernel {source.name} is cut off: {source.size} bytes of {offset + paragraphs * 16}",
            remedy="fetch or build it again",
        )
    size = min(size, paragraphs * 16)  # what is behind it (a signature) is not loaded
    if alignment & alignment - 1 or not alignment or pref < HIGH_MEMORY or init < size:
        raise ImageError(f"the kernel {source.name} is damaged: nonsense in its header")
    (cmdline_size,) = struct.unpack_from("<I", start, CMDLINE_SIZE)
    (initrd_max,) = struct.unpack_from("<I", start, INITRD_ADDR_MAX)
    end = min(MAGIC + start[JUMP], HEADER_END)
    return BzImage(
        start[:end], offset, size, pref, init, alignment, bool(relocatable), min(cmdline_size, 0xFFFF), initrd_max
    )


def load(memory: GuestMemory, source: Source, kernel: BzImage) -> tuple[int, int]:
    """Read it to where it likes to be; its (address, end of what it needs)."""
    low = memory.regions[0]
    address = kernel.pref_address
    end = address + kernel.init_size
    if end > low.end:
        raise InvalidArgument(
            f"the kernel {source.name} needs memory up to {end >> 20} MiB, the machine has {low.end >> 20} MiB",
            remedy=f"give the machine at least {(end >> 20) + 32} MiB",
        )
    if kernel.relocatable and address % kernel.alignment:
        raise ImageError(f"the kernel {source.name} is damaged: its address {address:#x} is not aligned")
    source.load(memory, address, kernel.offset, kernel.size)
    return address, end


def write_zero_page(
    memory: GuestMemory,
    kernel: BzImage,
    entries: list[tuple[int, int, int]],
    *,
    cmdline: bytes,
    initrd: tuple[int, int] | None,
) -> None:
    """struct boot_params, with the file's setup header in it, and random bytes for the kernel's generator."""
    if len(entries) > E820_MAX:
        raise InvalidArgument(f"a memory map of {len(entries)} entries is too long for the zero page")
    page = bytearray(ZERO_PAGE_SIZE)
    page[SETUP_SECTS : len(kernel.header)] = kernel.header[SETUP_SECTS:]

    def put(offset: int, layout: str, value: int) -> None:
        struct.pack_into(layout, page, offset, value)

    put(VID_MODE, "<H", NORMAL_MODE)
    put(TYPE_OF_LOADER, "<B", UNDEFINED_LOADER)
    put(CMD_LINE_PTR, "<I", CMDLINE)
    put(ACPI_RSDP_ADDR, "<Q", RSDP)
    if initrd:
        put(RAMDISK_IMAGE, "<I", initrd[0])
        put(RAMDISK_SIZE, "<I", initrd[1])
    put(E820_ENTRIES, "<B", len(entries))
    for index, entry in enumerate(entries):
        struct.pack_into("<QQI", page, E820_TABLE + 20 * index, *entry)
    # struct setup_data: next, type, length. Kernels before 5.20 skip the type they do not know.
    put(SETUP_DATA, "<Q", HVM_START_INFO)
    memory.write(HVM_START_INFO, struct.pack("<QII", 0, SETUP_RNG_SEED, SEED_SIZE) + os.urandom(SEED_SIZE))
    memory.write(CMDLINE, cmdline + b"\0")
    memory.write(ZERO_PAGE, page)


def entry(address: int) -> Entry:
    return Entry("long64", address + ENTRY_64, ZERO_PAGE)
