"""Resource templates: what a device decodes and which interrupt it raises (ACPI 6.5, 6.4)."""

from __future__ import annotations

import struct

from kvik.vmm.acpi.aml import buffer

MEMORY, IO, BUS = 0, 1, 2
_FIXED = 0x0C  # general flags: minimum and maximum are fixed; the bridge decodes (producer)


def template(*descriptors: bytes) -> bytes:
    """A _CRS: descriptors and the end tag; a checksum of zero means "not checked"."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io(start: int, size: int) -> bytes:
    """I/O Port Descriptor (6.4.2.5), 16 bits decoded."""
    return struct.pack("<BBHHBB", 0x47, 1, start, start, 1, size)


def memory32(start: int, size: int) -> bytes:
    """32-bit Fixed Memory Range (6.4.3.4), writable."""
    return struct.pack("<BHBII", 0x86, 9, 1, start, size)


def interrupt(gsi: int, *, level: bool = False) -> bytes:
    """Extended Interrupt (6.4.3.6): consumer, active high, exclusive. The IOAPIC's pin is the GSI."""
    return struct.pack("<BHBBI", 0x89, 6, 0x01 if level else 0x03, 1, gsi)


def bus_numbers(first: int, last: int) -> bytes:
    """Word Address Space (6.4.3.5.3)."""
    return struct.pack("<BHBBBHHHHH", 0x88, 13, BUS, _FIXED, 0, 0, first, last, 0, last - first + 1)


def io_window(start: int, end: int) -> bytes:
    """I/O ports that a bridge passes on, [start, end); word address space, entire range."""
    return struct.pack("<BHBBBHHHHH", 0x88, 13, IO, _FIXED, 3, 0, start, end - 1, 0, end - start)


def memory_window(start: int, end: int, *, prefetchable: bool = False) -> bytes:
    """Memory that a bridge passes on, [start, end): a DWord, or above 4 GiB a QWord address space."""
    flags = 1 | (prefetchable and 3 << 1)  # read-write; cacheable and prefetchable
    wide = end > 1 << 32
    layout, tag, size = ("<BHBBBQQQQQ", 0x8A, 43) if wide else ("<BHBBBIIIII", 0x87, 23)
    return struct.pack(layout, tag, size, MEMORY, _FIXED, flags, 0, start, end - 1, 0, end - start)
