"""The tables for firmware that places them itself: blobs, and a script that says what to do with them.

Pointers in the blobs are offsets; the script has the firmware put each blob somewhere, add the blob's address to the
pointers, and then make checksums right. Entries are 128 bytes, file names 56: QEMU's hw/acpi/bios-linker-loader.c has
the format, edk2's OvmfPkg/AcpiPlatformDxe/QemuFwCfgAcpi.c what firmware makes of it. A pointer is also how it finds
the tables that it installs, so the XSDT is there although it makes one of its own.
"""

from __future__ import annotations

import struct

from kvik.vmm.acpi import RSDP_SIZE, arrange, rsdp
from kvik.vmm.acpi.fadt import X_DSDT
from kvik.vmm.acpi.table import HEADER_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.acpi.description import Description

__all__ = ["LOADER", "files"]

LOADER, TABLES, ROOT = "etc/table-loader", "etc/acpi/tables", "etc/acpi/rsdp"
ALLOCATE, ADD_POINTER, ADD_CHECKSUM = 1, 2, 3
HIGH, LOW = 1, 2  # zones: anywhere below 4 GiB, or where the RSDP is looked for without UEFI
ENTRY, CHECKSUM = 128, 9  # size of an entry; a table's byte that makes its sum 0
RSDP_CHECKSUM, RSDP_XSDT, RSDP_EXTENDED_CHECKSUM, RSDP_OLD_SIZE = 8, 24, 32, 20
TABLE_ALIGNMENT, RSDP_ALIGNMENT = 64, 16


def files(description: Description) -> dict[str, bytes]:
    """fw_cfg's files by name: the script and the two blobs that it speaks of."""
    placed = arrange(description, 0)
    end, last = placed[-1]
    blob = bytearray(end + len(last))
    for offset, data in placed:
        blob[offset : offset + len(data)] = data
    fadt, xsdt = placed[1][0], placed[-1][0]
    script = [_allocate(TABLES, TABLE_ALIGNMENT, HIGH), _allocate(ROOT, RSDP_ALIGNMENT, LOW)]
    script.append(_pointer(TABLES, fadt + X_DSDT, TABLES))
    script += [_pointer(TABLES, at, TABLES) for at in range(xsdt + HEADER_SIZE, len(blob), 8)]
    script.append(_pointer(ROOT, RSDP_XSDT, TABLES))
    for offset, data in (placed[1], placed[-1]):  # the others have no pointers, and their sums are right
        blob[offset + CHECKSUM] = 0
        script.append(_checksum(TABLES, offset + CHECKSUM, offset, len(data)))
    root = bytearray(rsdp(xsdt))
    root[RSDP_CHECKSUM] = root[RSDP_EXTENDED_CHECKSUM] = 0
    script.append(_checksum(ROOT, RSDP_CHECKSUM, 0, RSDP_OLD_SIZE))
    script.append(_checksum(ROOT, RSDP_EXTENDED_CHECKSUM, 0, RSDP_SIZE))
    return {LOADER: b"".join(script), TABLES: bytes(blob), ROOT: bytes(root)}


def _allocate(name: str, alignment: int, zone: int) -> bytes:
    return struct.pack("<I56sIB", ALLOCATE, name.encode(), alignment, zone).ljust(ENTRY, b"\0")


def _pointer(name: str, offset: int, target: str) -> bytes:
    """The 8 bytes at `offset` of blob `name` are an offset in blob `target`."""
    return struct.pack("<I56s56sIB", ADD_POINTER, name.encode(), target.encode(), offset, 8).ljust(ENTRY, b"\0")


def _checksum(name: str, offset: int, start: int, length: int) -> bytes:
    """The byte at `offset`, 0 so far, makes the sum of `length` bytes from `start` on 0."""
    return struct.pack("<I56sIII", ADD_CHECKSUM, name.encode(), offset, start, length).ljust(ENTRY, b"\0")
