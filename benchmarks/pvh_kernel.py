"""A kernel of 40 bytes of code: an ELF file with a PVH entry that writes a byte to COM1 and powers the machine off.

It goes the whole way that a Linux kernel goes until its first instruction, on any KVM.
"""

from __future__ import annotations

import struct
from pathlib import Path

LOAD = 0x10_0000
COM1, SLEEP_CONTROL = 0x3F8, 0x600
S5_ENABLE = 5 << 2 | 1 << 5
XEN_ELFNOTE_PHYS32_ENTRY = 18


def program(*, power_off: bool, again: bool = False) -> bytes:
    """32-bit code. Without `power_off` it halts for good; with `again` it writes its byte for ever."""
    code = bytes((0x66, 0xBA)) + struct.pack("<H", COM1) + b"\xb0!\xee"  # mov dx, COM1; mov al, '!'; out dx, al
    if again:
        return code + b"\xeb\xfd"  # jmp to the out
    if power_off:
        code += bytes((0x66, 0xBA)) + struct.pack("<H", SLEEP_CONTROL) + bytes((0xB0, S5_ENABLE, 0xEE))
    return code + b"\xfa\xf4\xeb\xfd"  # cli; 1: hlt; jmp 1b


def write(path: Path, *, power_off: bool = True, again: bool = False) -> Path:
    code = program(power_off=power_off, again=again)
    note = struct.pack("<III", 4, 4, XEN_ELFNOTE_PHYS32_ENTRY) + b"Xen\0" + struct.pack("<I", LOAD)
    at_note = 64 + 2 * 56
    at_code = 4096
    header = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    segments = struct.pack("<IIQQQQQQ", 1, 5, at_code, LOAD, LOAD, len(code), len(code), 4096)
    segments += struct.pack("<IIQQQQQQ", 4, 4, at_note, 0, 0, len(note), len(note), 4)
    path.write_bytes((header + segments + note).ljust(at_code, b"\0") + code)
    return path
