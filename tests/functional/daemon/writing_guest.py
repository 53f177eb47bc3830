"""A guest that is one boot sector and writes numbers to its disk for as long as it runs, one after the other.

Number n goes to sector FIRST + (n * STEP) mod SECTORS and fills it; the next is written when that one is done. So what
a disk shows tells the last number, and with it what every sector must hold: one lost, late or torn write is seen.
"""

from __future__ import annotations

import struct
from pathlib import Path

SECTOR = 512
FIRST, SECTORS, STEP = 8, 4096, 0x9E3779B1
SIZE = 4 << 20  # bytes of the disk; more than (FIRST + SECTORS) * SECTOR
_BUFFER, _DRIVE, _PACKET = 0x7E00, 0x7DF0, 0x7DE0


def boot_sector() -> bytes:
    """16-bit code for the BIOS: INT 13h, AH=43h (extended write) with a disk address packet."""
    code = bytes.fromhex("fa 31c0 8ed8 8ec0 8ed0 bc007c fb fc")  # segments 0, stack below us
    code += b"\x88\x16" + struct.pack("<H", _DRIVE)  # mov [drive], dl
    code += b"\x66\xc7\x06" + struct.pack("<HI", _BUFFER, 0)  # mov dword [buffer], 0
    loop = len(code)
    code += b"\x66\xff\x06" + struct.pack("<H", _BUFFER)  # inc dword [buffer]
    code += b"\x66\xa1" + struct.pack("<H", _BUFFER)  # mov eax, [buffer]
    code += b"\xbf" + struct.pack("<H", _BUFFER) + b"\xb9\x80\x00\xf3\x66\xab"  # fill the buffer: mov di, cx; rep stosd
    code += b"\x66\x69\xc0" + struct.pack("<I", STEP)  # imul eax, STEP
    code += b"\x66\x25" + struct.pack("<I", SECTORS - 1)  # and eax, SECTORS - 1
    code += b"\x66\x83\xc0" + struct.pack("<B", FIRST)  # add eax, FIRST
    code += b"\x66\xa3" + struct.pack("<H", _PACKET + 8)  # mov [packet.lba], eax
    code += b"\xbe" + struct.pack("<H", _PACKET) + b"\xb8\x00\x43"  # mov si, packet; mov ax, 4300h
    code += b"\x8a\x16" + struct.pack("<H", _DRIVE) + b"\xcd\x13"  # mov dl, [drive]; int 13h
    code += b"\x72\xfe"  # an error: stand still
    code += b"\xeb" + struct.pack("<b", loop - len(code) - 2)
    sector = bytearray(code.ljust(510, b"\0") + b"\x55\xaa")
    sector[_PACKET - 0x7C00 : _PACKET - 0x7C00 + 16] = struct.pack("<BBHHHQ", 16, 0, 1, _BUFFER, 0, 0)
    return bytes(sector)


def last_number(data: bytes) -> int:
    """The number that was written last; AssertionError if not all before it are where they belong, and nothing else."""
    held = [struct.unpack_from("<128I", data, (FIRST + number) * SECTOR) for number in range(SECTORS)]
    torn = [number for number, words in enumerate(held) if len(set(words)) != 1]
    assert not torn, f"sectors written in part: {torn[:5]}"
    last = max(words[0] for words in held)
    back = pow(STEP, -1, SECTORS)
    for number, words in enumerate(held):
        behind = (last - number * back) % SECTORS  # so many numbers before the last one came here last
        assert words[0] == max(last - behind, 0), f"sector {number} holds {words[0]}, not {max(last - behind, 0)}"
    return last


def make_disk(path: Path) -> Path:
    path.write_bytes(boot_sector().ljust(SIZE, b"\0"))
    return path
