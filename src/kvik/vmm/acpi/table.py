"""What all tables share: the header with its checksum (ACPI 6.5, 5.2.6), register addresses (5.2.3.2)."""

from __future__ import annotations

import struct

OEM_ID, OEM_TABLE_ID, CREATOR = b"KVIK  ", b"KVIKVMM ", b"KVIK"
HEADER_SIZE = 36


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of all bytes zero."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        *(signature, HEADER_SIZE + len(body), revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR, 1),
    )
    data = bytearray(header + body)
    data[9] = checksum(data)
    return bytes(data)


def port(address: int, size: int = 1) -> bytes:
    """Generic Address Structure of an I/O port of `size` bytes."""
    return struct.pack("<BBBBQ", 1, 8 * size, 0, size.bit_length(), address)
