"""An uncompressed ELF kernel, entered by PVH in 32-bit mode: no real-mode code, no decompressor.

The file is hostile: every number in it is checked against the file's size and guest RAM. ELF: System V ABI, "Program
Header"; the entry point is the note XEN_ELFNOTE_PHYS32_ENTRY (xen/include/public/elfnote.h); the start info is
xen/include/public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

import struct

from kvik.errors import ImageError, InvalidArgument
from kvik.named import NamedTuple
from kvik.vmm.boot.entry import Entry
from kvik.vmm.layout import CMDLINE, HIGH_MEMORY, HVM_START_INFO, RSDP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.boot.source import Source
    from kvik.vmm.memory import GuestMemory

EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_NOTE = 1, 4
XEN_ELFNOTE_PHYS32_ENTRY = 18
MAX_PROGRAM_HEADERS = 64  # Linux has 5
MAX_NOTES = 64 << 10
START_MAGIC = 0x336EC578
MEMORY_MAP_LIMIT = 128  # entries; 24 bytes each, below the zero page


class Segment(NamedTuple):
    """A PT_LOAD: `file_size` bytes at `offset` of the file belong to `address`, `size` with the zeros behind."""

    offset: int
    address: int
    file_size: int
    size: int


class ElfKernel(NamedTuple):
    segments: list[Segment]
    entry: int  # 0: the kernel has no PVH note


def parse(source: Source) -> ElfKernel:
    """Raises `ImageError` for a file that is no x86 ELF, or lies about itself."""
    header = source.read(0, 64)
    if len(header) < 52 or header[:4] != b"\x7fELF" or header[4] not in (1, 2) or header[5] != 1:
        raise ImageError(f"the kernel {source.name} is no little-endian ELF file")
    wide = header[4] == 2
    if len(header) < 64:
        raise _damaged(source, "its header is cut off")
    layout = "<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH"
    _, machine, _, _, table, _, _, _, entry_size, count, *_ = struct.unpack_from(layout, header, 16)
    if machine not in (EM_386, EM_X86_64):
        raise ImageError(f"the kernel {source.name} is for another processor", remedy="give an x86 kernel")
    expected = 56 if wide else 32
    if entry_size != expected or not 0 < count <= MAX_PROGRAM_HEADERS:
        raise _damaged(source, f"{count} program headers of {entry_size} bytes")
    raw = source.read(table, count * expected) if table < source.size else b""
    if len(raw) != count * expected:
        raise _damaged(source, "its program headers lie outside the file")
    segments, entry = [], 0
    for index in range(count):
        if wide:
            kind, _, offset, _, address, file_size, size, _ = struct.unpack_from("<IIQQQQQQ", raw, index * 56)
        else:
            kind, offset, _, address, file_size, size, _, _ = struct.unpack_from("<IIIIIIII", raw, index * 32)
        if kind not in (PT_LOAD, PT_NOTE):
            continue
        if offset + file_size > source.size:
            raise _damaged(source, f"a segment of {file_size} bytes at {offset} lies outside the file")
        if kind == PT_NOTE:
            entry = entry or _entry(source.read(offset, min(file_size, MAX_NOTES)))
        elif size:
            if file_size > size:
                raise _damaged(source, "a segment is larger in the file than in memory")
            segments.append(Segment(offset, address, file_size, size))
    if not segments:
        raise _damaged(source, "it has nothing to load")
    return ElfKernel(segments, entry)


def load(memory: GuestMemory, source: Source, kernel: ElfKernel, *, stable: bool, fresh: bool) -> int:
    """Bring the segments into guest memory; the first address behind them. `stable`: nobody will write the file while
    the machine runs, so that its pages can be mapped copy-on-write instead of read. `fresh`: guest memory is all
    zeros."""
    low = memory.regions[0]
    ram_end = low.start + low.size
    for segment in kernel.segments:
        end = segment.address + segment.size
        if segment.address < HIGH_MEMORY:
            raise _damaged(source, f"a segment at {segment.address:#x} lies below 1 MiB")
        if end > ram_end:
            raise InvalidArgument(
                f"the kernel {source.name} needs memory up to {end >> 20} MiB, the machine has {ram_end >> 20} MiB",
                remedy=f"give the machine at least {(end >> 20) + 32} MiB",
            )
    for segment in kernel.segments:
        if stable and segment.file_size:
            memory.map_file(segment.address, source.fd, segment.offset, segment.file_size)
        elif segment.file_size:
            source.load(memory, segment.address, segment.offset, segment.file_size)
        behind = segment.size - segment.file_size
        if behind and not fresh:
            _clear(memory, segment.address + segment.file_size, behind)
    return max(segment.address + segment.size for segment in kernel.segments)


def _clear(memory: GuestMemory, address: int, size: int) -> None:
    """Zeros, a piece at a time: the file chose how many."""
    while size:
        part = min(size, 1 << 20)
        memory.write(address, bytes(part))
        address, size = address + part, size - part


def write_start_info(
    memory: GuestMemory,
    entries: list[tuple[int, int, int]],
    *,
    cmdline: bytes,
    initrd: tuple[int, int] | None,
) -> None:
    """struct hvm_start_info version 1 at HVM_START_INFO, behind it the module list and the memory map."""
    modules = HVM_START_INFO + 64
    table = modules + 64
    if len(entries) > MEMORY_MAP_LIMIT:
        raise InvalidArgument(f"a memory map of {len(entries)} entries is too long for PVH")
    memory.write(CMDLINE, cmdline + b"\0")
    if initrd:
        memory.write(modules, struct.pack("<4Q", *initrd, 0, 0))
    memory.write(table, b"".join(struct.pack("<QQII", *entry, 0) for entry in entries))
    memory.write(
        HVM_START_INFO,
        struct.pack(
            "<IIIIQQQQII",
            *(START_MAGIC, 1, 0, 1 if initrd else 0, modules if initrd else 0),
            *(CMDLINE, RSDP, table, len(entries), 0),
        ),
    )


def entry(kernel: ElfKernel) -> Entry:
    return Entry("pvh32", kernel.entry, HVM_START_INFO)


def _entry(notes: bytes) -> int:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        start = at + 12 + (name_size + 3 & ~3)
        if start + size > len(notes):
            return 0
        if kind == XEN_ELFNOTE_PHYS32_ENTRY and notes[at + 12 : at + 16] == b"Xen\0" and size in (4, 8):
            return int.from_bytes(notes[start : start + 4], "little")
        at = start + (size + 3 & ~3)
    return 0


def _damaged(source: Source, how: str) -> ImageError:
    return ImageError(f"the kernel {source.name} is damaged: {how}", remedy="fetch or build it again")
