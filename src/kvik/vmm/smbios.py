"""SMBIOS tables: what the machine is called (DMTF DSP0134, version 3.0): `dmidecode`, /sys/class/dmi, cloud-init.

A structure is a formatted part, whose strings are numbers from 1, and behind it the strings themselves.
"""

from __future__ import annotations

import struct

from kvik.errors import InvalidArgument
from kvik.vmm.layout import RESET_VECTOR, SMBIOS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.config import SmbiosConfig
    from kvik.vmm.cpu.topology import Topology

__all__ = ["build"]

ENTRY_SIZE = 24
LONGEST_STRING = 4096  # far beyond any serial number; OEM strings carry configuration
OTHER = 1


class _Tables:
    def __init__(self) -> None:
        self.data = bytearray()
        self.largest = 0

    def add(self, kind: int, handle: int, body: bytes, strings: list[str]) -> None:
        """`body` is what follows the header of four bytes."""
        text = b"".join(_string(item) for item in strings) or b"\0"
        structure = struct.pack("<BBH", kind, 4 + len(body), handle) + body + text + b"\0"
        self.largest = max(self.largest, len(structure))
        self.data += structure


class _Strings:
    """Gives each string its number; an empty one is 0, "not specified"."""

    def __init__(self) -> None:
        self.all: list[str] = []

    def __call__(self, text: str) -> int:
        if not text:
            return 0
        self.all.append(text)
        return len(self.all)


def build(
    config: SmbiosConfig, *, uuid: str, memory: int, topology: Topology, ram: list[tuple[int, int]]
) -> list[tuple[int, bytes]]:
    """(address, bytes) of the entry point and of the tables. `uuid` is the machine's own, for when `config` has none;
    `memory` in bytes, `ram` its (start, size) ranges. Raises `InvalidArgument` for a text that SMBIOS cannot hold."""
    tables = _Tables()
    _bios(tables)
    _system(tables, config, uuid)
    _board_and_chassis(tables, config)
    for socket in range(topology.sockets):
        _processor(tables, socket, topology, config.manufacturer)
    if config.oem_strings:
        tables.add(11, 0x0B00, bytes((len(config.oem_strings),)), list(config.oem_strings))
    _memory(tables, memory, ram, config.manufacturer)
    tables.add(32, 0x2000, bytes(6) + b"\0", [])  # no boot error
    tables.add(127, 0x7F00, b"", [])
    address = SMBIOS + 32
    if address + len(tables.data) > RESET_VECTOR:
        raise InvalidArgument(
            f"{len(tables.data)} bytes of SMBIOS tables do not fit",
            remedy="shorten the OEM strings, or use fewer sockets",
        )
    # SMBIOS 3.0 entry point (5.2.2)
    entry = bytearray(struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, ENTRY_SIZE, 3, 0, 0, 1, 0, len(tables.data), address))
    entry[5] = -sum(entry) & 0xFF
    return [(SMBIOS, bytes(entry)), (address, bytes(tables.data))]


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    if b"\0" in data or len(data) > LONGEST_STRING:
        raise InvalidArgument(
            f"{text[:40]!r} cannot be an SMBIOS string", remedy=f"at most {LONGEST_STRING} bytes, no zeros"
        )
    return data + b"\0"


def _bios(tables: _Tables) -> None:
    s = _Strings()
    vendor, version, date = s("kvik"), s("1.0"), s("01/01/2025")
    characteristics = 1 << 3  # not supported: nothing more is said
    extended = (0, 1 << 4)  # it is a virtual machine (7.1.2.2)
    body = struct.pack("<BBHBBQBBBBBB", vendor, version, 0, date, 0, characteristics, *extended, 1, 0, 255, 255)
    tables.add(0, 0x0000, body, s.all)


def _system(tables: _Tables, config: SmbiosConfig, uuid: str) -> None:
    s = _Strings()
    names = [s(config.manufacturer), s(config.product), s(config.version), s(config.serial)]
    body = bytes(names) + _uuid(config.uuid or uuid) + b"\x06" + bytes((s(config.sku), s(config.family)))
    tables.add(1, 0x0100, body, s.all)


def _uuid(text: str) -> bytes:
    """16 bytes; since 2.6 the first three fields are little-endian (7.2.1). Zeros: not present."""
    try:
        raw = bytes.fromhex(text.replace("-", "")) or bytes(16)
        if len(raw) != 16:
            raise ValueError(text)
    except ValueError:
        raise InvalidArgument(f"{text!r} is no UUID", remedy="like 6f8e2a4c-9d0b-4f57-8c9a-0d1f5e3b7a21") from None
    return raw[3::-1] + raw[5:3:-1] + raw[7:5:-1] + raw[8:]


def _board_and_chassis(tables: _Tables, config: SmbiosConfig) -> None:
    s = _Strings()
    names = bytes((s(config.manufacturer), s(config.product), s(config.version), s(config.serial)))
    # Asset tag; hosting board; location; chassis; motherboard; no contained objects
    tables.add(2, 0x0200, names + struct.pack("<BBBHBB", 0, 1, 0, 0x0300, 0x0A, 0), s.all)
    s = _Strings()
    maker, version, serial = s(config.manufacturer), s(config.version), s(config.serial)
    # Type "other"; boot-up, supply and thermal states "safe"; no security; OEM, height, cords, contained elements, SKU
    tail = struct.pack("<BBBBIBBBBB", 3, 3, 3, 2, 0, 0, 0, 0, 0, 0)
    tables.add(3, 0x0300, bytes((maker, OTHER, version, serial, 0)) + tail, s.all)


def _processor(tables: _Tables, socket: int, topology: Topology, manufacturer: str) -> None:
    s = _Strings()
    cores, threads = topology.dies * topology.cores, topology.per_socket
    body = struct.pack(
        "<BBBBQBBHHHBBHHHBBBBBBHHHHH",
        *(s(f"CPU {socket}"), 3, 0xFE, s(manufacturer), 0),  # central processor; family: see family 2
        *(s("virtual"), 0, 0, 2000, 2000, 0x41, OTHER),  # version, voltage, clocks in MHz, populated and enabled
        *(0xFFFF, 0xFFFF, 0xFFFF, 0, 0, 0),  # no cache handles, serial number, asset tag, part number
        *(min(cores, 255), min(cores, 255), min(threads, 255), 1 << 2, OTHER),  # 64-bit; family 2
        *(cores, cores, threads),
    )
    tables.add(4, 0x0400 + socket, body, s.all)


def _memory(tables: _Tables, memory: int, ram: list[tuple[int, int]], manufacturer: str) -> None:
    # Physical memory array (7.17): on the board, system memory, no error correction; capacity in KiB, or extended
    kib = memory >> 10
    small = kib if kib < 0x8000_0000 else 0x8000_0000
    array = struct.pack("<BBBIHHQ", OTHER, 3, 3, small, 0xFFFE, 1, 0 if small == kib else memory)
    tables.add(16, 0x1000, array, [])
    # One memory device (7.18): size in MiB, or beyond 32 GiB in the extended field
    s = _Strings()
    mib = memory >> 20
    size = mib if mib < 0x7FFF else 0x7FFF
    device = struct.pack(
        "<HHHHHBBBBBHHBBBBBIHHHH",
        *(0x1000, 0xFFFE, 0xFFFF, 0xFFFF, size, 9, 0),  # array, no error handle, unknown widths; form factor DIMM
        *(s("DIMM 0"), 0, 7, 1 << 1, 0, s(manufacturer)),  # locator, bank, RAM, other, speed unknown
        *(0, 0, 0, 0, 0 if size == mib else mib, 0, 0, 0, 0),
    )
    tables.add(17, 0x1100, device, s.all)
    # Mapped addresses (7.20): in KiB, or in bytes where that does not fit
    for index, (start, length) in enumerate(ram):
        end = start + length - 1
        if end >> 10 < 0xFFFF_FFFF:
            mapped = struct.pack("<IIHBQQ", start >> 10, end >> 10, 0x1000, 1, 0, 0)
        else:
            mapped = struct.pack("<IIHBQQ", 0xFFFF_FFFF, 0xFFFF_FFFF, 0x1000, 1, start, end)
        tables.add(19, 0x1300 + index, mapped, [])
