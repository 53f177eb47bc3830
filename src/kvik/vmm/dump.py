"""A dump of the guest's memory: an ELF64 core that gdb, crash and readelf read.

    ELF header, program headers   one PT_LOAD for each region of RAM, one PT_NOTE
    RAM                           page aligned; blocks of zeroes are holes in the file
    notes                         for each vCPU: "CORE" NT_PRSTATUS, then "QEMU" type 0; "VMCOREINFO" if there

Physical addresses are in p_paddr, where crash looks, and in p_vaddr, so that gdb reads memory by physical address.
The guest's kernel keeps its VMCOREINFO note (symbol addresses, KASLR's offset) somewhere in RAM: it is looked for on
the way, which is why the notes come last. Memory use is bounded: one block at a time.

References: ELF-64 Object File Format 1.5; Linux include/linux/elfcore.h and
Documentation/admin-guide/kdump/vmcoreinfo.rst; QEMU's target/i386/arch_dump.c for the "QEMU" note.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Generator

from kvik.errors import HostError, OperationUnsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.kvm.structs import Segment
    from kvik.vmm.machine import Machine
    from kvik.vmm.memory import Region
    from kvik.vmm.vcpu import VcpuThread

__all__ = ["core", "core_file"]

BLOCK = 64 * 1024  # a hole is at least this
STEP = 4 * 1024 * 1024  # bytes between two chances for the loop to do other things
_PAGE = 4096
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_ET_CORE, _EM_X86_64, _PT_LOAD, _PT_NOTE = 4, 62, 1, 4
_NT_PRSTATUS = 1
_ZEROES = bytes(BLOCK)
_MSR_KERNEL_GS_BASE = 0xC0000102
_VMCOREINFO = b"VMCOREINFO\0"
_MAX_VMCOREINFO = 4096  # the kernel's VMCOREINFO_BYTES is a page


def core_file(machine: Machine, path: str) -> Generator[int, None, int]:
    """As `core`, into `path`, which appears only when it is complete. Raises `HostError`."""
    part = f"{path}.part{os.getpid()}"
    try:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(
            f"cannot write a dump to {path}: {error.strerror}",
            errno=error.errno or 0,
            remedy="a sandboxed machine opens no files: send a descriptor with getfd and use fd:NAME",
        ) from error
    try:
        size = yield from core(machine, fd)
        os.fsync(fd)
        os.rename(part, path)  # noqa: PTH104
        part = ""
        return size
    finally:
        os.close(fd)
        if part:
            os.unlink(part)  # noqa: PTH108


def core(machine: Machine, fd: int) -> Generator[int, None, int]:
    """Write the dump to a regular file, from its start; yields the bytes of RAM dealt with, returns the file's size.

    The machine must stand still until it is done. Raises `HostError`, `OperationUnsupported`.
    """
    machine.memory.require_whole("be dumped")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OperationUnsupported("a dump goes to a regular file, not to a pipe or a device")
    regions = list(machine.memory.regions)
    head = _EHDR.size + _PHDR.size * (len(regions) + 1)
    start = -(-head // _PAGE) * _PAGE
    finder = _VmcoreinfoFinder()
    done = 0
    try:
        os.ftruncate(fd, 0)
        offset = start
        loads = []
        for region in regions:
            loads.append(_PHDR.pack(_PT_LOAD, 0, offset, region.start, region.start, region.size, region.size, _PAGE))
            for at in range(0, region.size, STEP):
                length = min(STEP, region.size - at)
                _copy(fd, offset, region, range(at, at + length), finder)
                done += length
                yield done
            offset += region.size
        notes = b"".join(_vcpu_notes(thread) for thread in machine.vcpus) + finder.note
        _write(fd, notes, offset)
        note = _PHDR.pack(_PT_NOTE, 0, offset, 0, 0, len(notes), len(notes), 4)
        ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
        count = len(regions) + 1
        ehdr = _EHDR.pack(ident, _ET_CORE, _EM_X86_64, 1, 0, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size, count, 0, 0, 0)
        _write(fd, ehdr + note + b"".join(loads), 0)
    except OSError as error:
        raise HostError(f"cannot write the dump: {error.strerror}", errno=error.errno or 0) from error
    return offset + len(notes)


def _write(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _copy(fd: int, offset: int, region: Region, span: range, finder: _VmcoreinfoFinder) -> None:
    """Blocks of one step that are not all zero."""
    for begin in range(span.start, span.stop, BLOCK):
        size = min(BLOCK, span.stop - begin)
        # Reading a hole of a memfd through its mapping would fill it; pread does not.
        if region.fd >= 0:
            block = os.pread(region.fd, size, region.fd_offset + begin)
        else:
            block = bytes(region.view[begin : begin + size])
        if block != _ZEROES[:size]:
            _write(fd, block, offset + begin)
            finder.look(region, begin, block)


class _VmcoreinfoFinder:
    """Looks for the note that Linux keeps for kdump. What it finds is the guest's word: bounded, not trusted."""

    def __init__(self) -> None:
        self.note = b""

    def look(self, region: Region, begin: int, block: bytes) -> None:
        position = -1
        while not self.note and (position := block.find(_VMCOREINFO, position + 1)) >= 0:
            start = begin + position - 12
            if start < 0 or start + 24 + _MAX_VMCOREINFO > region.size:
                continue
            # The note may cross the block's end: read it whole.
            note = bytes(region.view[start : start + 24 + _MAX_VMCOREINFO])
            namesz, descsz, kind = struct.unpack_from("<III", note)
            if namesz == len(_VMCOREINFO) and kind == 0 and 0 < descsz <= _MAX_VMCOREINFO:
                text = note[24 : 24 + descsz]
                if text.startswith(b"OSRELEASE=") and text.isascii():
                    self.note = _note(b"VMCOREINFO", 0, text)


def _note(name: bytes, kind: int, content: bytes) -> bytes:
    name += b"\0"
    padded = name.ljust(-(-len(name) // 4) * 4, b"\0") + content.ljust(-(-len(content) // 4) * 4, b"\0")
    return struct.pack("<III", len(name), len(content), kind) + padded


_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr")
_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{number}" for number in range(8, 16)))


def _vcpu_notes(thread: VcpuThread) -> bytes:
    """struct elf_prstatus (with the order of struct user_regs_struct), and QEMU's QEMUCPUState, version 1."""
    r, s = thread.vcpu.regs(), thread.vcpu.sregs()
    user_regs = (
        r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi, r.rdi,
        r.rax, r.rip, s.cs.selector, r.rflags, r.rsp, s.ss.selector, s.fs.base, s.gs.base, s.ds.selector,
        s.es.selector, s.fs.selector, s.gs.selector,
    )  # fmt: skip
    status = bytearray(336)
    struct.pack_into("<I", status, 32, thread.index + 1)  # pr_pid: gdb wants one for each thread, and not 0
    struct.pack_into("<27Q", status, 112, *user_regs)
    known, _ = thread.vcpu.msrs([_MSR_KERNEL_GS_BASE])
    body = struct.pack("<18Q", *(getattr(r, name) for name in _GENERAL), r.rip, r.rflags)
    body += b"".join(_segment(getattr(s, name)) for name in _SEGMENTS)
    body += b"".join(struct.pack("<IIIIQ", 0, table.limit, 0, 0, table.base) for table in (s.gdt, s.idt))
    body += struct.pack("<5Q", s.cr0, 0, s.cr2, s.cr3, s.cr4)
    body += struct.pack("<Q", known[0][1] if known else 0)
    qemu = struct.pack("<II", 1, len(body) + 8) + body
    return _note(b"CORE", _NT_PRSTATUS, bytes(status)) + _note(b"QEMU", 0, qemu)


def _segment(segment: Segment) -> bytes:
    """Selector, limit, the descriptor's flags where they lie in its second word, padding, base."""
    flags = segment.type << 8 | segment.s << 12 | segment.dpl << 13 | segment.present << 15
    flags |= segment.avl << 20 | segment.l << 21 | segment.db << 22 | segment.g << 23
    return struct.pack("<IIIIQ", segment.selector, segment.limit, flags, 0, segment.base)
