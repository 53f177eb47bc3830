"""How the boot processor starts: in 32-bit protected mode (PVH) or 64-bit long mode (Linux's 64-bit boot protocol).

The other processors wait for INIT and SIPI, as KVM makes them. The state is what two documents ask for: Xen's
docs/misc/pvh.pandoc ("x86/HVM direct boot ABI") and Linux's Documentation/arch/x86/boot.rst ("64-bit Boot Protocol").
"""

from __future__ import annotations

import ctypes
import struct

from kvik.vmm.layout import ACPI_PORT, BOOT_GDT, BOOT_PAGE_TABLES, RESET_VECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.kvm.structs import Segment
    from kvik.kvm.vcpu import Vcpu
    from kvik.vmm.memory import GuestMemory

CR0_PE, CR0_ET, CR0_PG = 1 << 0, 1 << 4, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
# Selectors: boot.rst wants __BOOT_CS 0x10 (execute/read) and __BOOT_DS 0x18 (read/write); PVH names none.
BOOT_CS, BOOT_DS, BOOT_TSS = 0x10, 0x18, 0x20
CODE32, CODE64, DATA, TSS = 0x00CF9B000000FFFF, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00008B0000000067
LARGE_PAGE = 0x83  # present, writable, 2 MiB
# mov $reset register,%dx; mov $1,%al; out %al,%dx; hlt; jmp to the hlt. On a hardware-reduced machine Linux tries EFI,
# then this, and never ACPI's reset register itself (arch/x86/kernel/reboot.c, reboot_init, machine_real_restart).
RESET_CODE = b"\xba" + struct.pack("<H", ACPI_PORT + 2) + b"\xb0\x01\xee\xf4\xeb\xfd"
MAPPED_GIB = 4  # boot.rst: the kernel, zero page and command line must be identity mapped; all of them lie below 4 GiB


class Entry:
    """Where and how to start. `mode` is 'pvh32' or 'long64'; `info` is the address of hvm_start_info (in rbx) or of
    the zero page (in rsi)."""

    __slots__ = ("info", "mode", "rip")

    def __init__(self, mode: str, rip: int, info: int) -> None:
        self.mode = mode
        self.rip = rip
        self.info = info

    def prepare(self, memory: GuestMemory) -> None:
        """Write the descriptor table and, for long mode, page tables into low memory; the code that a reboot enters."""
        memory.write(RESET_VECTOR, RESET_CODE)
        code = CODE64 if self.mode == "long64" else CODE32
        memory.write(BOOT_GDT, struct.pack("<5Q", 0, 0, code, DATA, TSS))
        if self.mode != "long64":
            return
        table = BOOT_PAGE_TABLES
        directories = table + 0x2000
        memory.put_u64(table, table + 0x1000 | 3)
        pointers = [directories + gib * 0x1000 | 3 for gib in range(MAPPED_GIB)]
        memory.write(table + 0x1000, struct.pack(f"<{MAPPED_GIB}Q", *pointers))
        pages = MAPPED_GIB * 512
        memory.write(directories, struct.pack(f"<{pages}Q", *((page << 21) | LARGE_PAGE for page in range(pages))))

    def apply(self, vcpu: Vcpu) -> None:
        """Set the boot processor's registers."""
        sregs = vcpu.sregs()
        long = self.mode == "long64"
        _segment(sregs.cs, BOOT_CS, 11, db=not long, long=long)
        for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
            _segment(segment, BOOT_DS, 3)
        _segment(sregs.tr, BOOT_TSS, 11, system=True)
        sregs.gdt.base, sregs.gdt.limit = BOOT_GDT, 5 * 8 - 1
        sregs.idt.base, sregs.idt.limit = 0, 0
        sregs.cr0 = CR0_PE | CR0_ET
        sregs.cr3 = sregs.cr4 = sregs.efer = 0
        if long:
            sregs.cr3, sregs.cr4, sregs.efer = BOOT_PAGE_TABLES, CR4_PAE, EFER_LME | EFER_LMA
            sregs.cr0 |= CR0_PG
        vcpu.set_sregs(sregs)
        regs = vcpu.regs()
        memoryview(regs).cast("B")[:] = bytes(ctypes.sizeof(regs))
        regs.rip, regs.rflags = self.rip, 2
        if long:
            regs.rsi = self.info
        else:
            regs.rbx = self.info
        vcpu.set_regs(regs)


def _segment(
    segment: Segment, selector: int, kind: int, *, db: bool = True, long: bool = False, system: bool = False
) -> None:
    """A flat segment of 4 GiB; a system segment (the busy 32-bit TSS that VM entry demands) of 0x68 bytes."""
    segment.base, segment.selector, segment.type = 0, selector, kind
    segment.limit = 0x67 if system else 0xFFFFFFFF
    segment.present, segment.dpl, segment.unusable, segment.avl = 1, 0, 0, 0
    segment.s = segment.g = int(not system)
    segment.db, segment.l = int(db and not system), int(long)
