"""ACPI tables (ACPI 6.5, chapter 5), built in code: a pure function from a description of the machine to bytes.

RSDP -> XSDT -> FADT -> DSDT
             -> MADT, MCFG, and with NUMA SRAT, SLIT
"""

from __future__ import annotations

import struct

from kvik.errors import InvalidArgument
from kvik.vmm.acpi import dsdt, fadt, madt, mcfg, numa
from kvik.vmm.acpi.description import Cpu, Description, MemoryRange, spread_ram
from kvik.vmm.acpi.table import OEM_ID, checksum, table
from kvik.vmm.layout import HIGH_MEMORY, PAGE, RSDP, VMGENID

__all__ = ["Cpu", "Description", "MemoryRange", "arrange", "build", "rsdp", "spread_ram"]

RSDP_SIZE = 36
ALIGNMENT = 16


def build(description: Description) -> list[tuple[int, bytes]]:
    """(address, bytes) of every table, the RSDP first, ready to be written into guest memory.

    Tables lie behind the RSDP in the BIOS area. A set too large for it (hundreds of processors that may come) goes to
    the end of low RAM, which `boot.load_kernel` then keeps out of the memory map.
    """
    placed = arrange(description, RSDP + _up(RSDP_SIZE))
    if _end(placed) > VMGENID:
        _, low = description.layout.ram[0]
        total = _end(placed) - placed[0][0]
        at = (low - total) & ~(PAGE - 1)
        if at < 2 * HIGH_MEMORY:
            raise InvalidArgument(
                f"{total} bytes of ACPI tables do not fit in {low} bytes of memory",
                remedy="give the machine more memory, or fewer processors",
            )
        placed = arrange(description, at)
    return [(RSDP, rsdp(placed[-1][0])), *placed]


def arrange(description: Description, start: int) -> list[tuple[int, bytes]]:
    """(address, bytes) of all tables from `start` on: the DSDT, the FADT that points at it, the others, and at the end
    the XSDT that points at all but the DSDT, in this order."""
    at = start
    placed: list[tuple[int, bytes]] = []

    def place(data: bytes) -> int:
        nonlocal at
        address = at
        placed.append((address, data))
        at = _up(at + len(data))
        return address

    code = place(dsdt.build(description))
    pointers = [place(fadt.build(description, code)), place(madt.build(description))]
    if not description.layout.firmware:  # its chipset has no ECAM
        pointers.append(place(mcfg.build()))
    if description.ram:
        pointers += [place(numa.srat(description)), place(numa.slit(description))]
    place(table(b"XSDT", 1, struct.pack(f"<{len(pointers)}Q", *pointers)))
    return placed


def _end(placed: list[tuple[int, bytes]]) -> int:
    address, data = placed[-1]
    return _up(address + len(data))


def rsdp(xsdt: int) -> bytes:
    """Root System Description Pointer, revision 2 (5.2.5.3): the first checksum covers the 20 bytes of revision 0."""
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, RSDP_SIZE, xsdt, 0))
    data[8] = checksum(data[:20])
    data[32] = checksum(data)
    return bytes(data)


def _up(value: int) -> int:
    return (value + ALIGNMENT - 1) & ~(ALIGNMENT - 1)
