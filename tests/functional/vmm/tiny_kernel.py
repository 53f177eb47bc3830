"""An ELF kernel of a few instructions with a PVH entry, for machines started by the command kvik-vmm."""

from __future__ import annotations

import struct

BASE = 0x100_0000
COM1 = 0x3F8


def say(text: bytes, port: int = COM1) -> bytes:
    """mov $port,%dx; then for each letter mov $letter,%al; out %al,(%dx): 32-bit code"""
    return b"\x66\xba" + struct.pack("<H", port) + b"".join(bytes((0xB0, letter, 0xEE)) for letter in text)


def out(port: int, value: int) -> bytes:
    return b"\x66\xba" + struct.pack("<H", port) + bytes((0xB0, value, 0xEE))


IDLE = b"\xf4\xeb\xfd"  # 1: hlt; jmp 1b
POWER_OFF = out(0x600, 0x20 | 5 << 2)  # ACPI's sleep control: S5


def elf(code: bytes) -> bytes:
    """A 64-bit ELF file that is entered in 32-bit mode at its only segment."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", BASE)
    header = b"\x7fELF\2\1\1" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, BASE, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    header += struct.pack("<IIQQQQQQ", 1, 5, 0x200, BASE, BASE, len(code), max(len(code), 0x1000), 0x1000)
    header += struct.pack("<IIQQQQQQ", 4, 4, 0x180, 0, 0, len(note), len(note), 4)
    return header.ljust(0x180, b"\0") + note.ljust(0x80, b"\0") + code
