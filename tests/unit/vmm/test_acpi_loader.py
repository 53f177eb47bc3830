"""The tables for firmware: what comes out when its linker and loader does what the script says."""

from __future__ import annotations

import struct

import pytest

from kvik.vmm.acpi import Cpu, Description, loader
from kvik.vmm.acpi import resources as res
from kvik.vmm.layout import ECAM, ECAM_SIZE, GIB, MIB, PM_PORT, RAM_HIGH, Layout


def run(files: dict[str, bytes]) -> tuple[dict[int, bytearray], int]:
    """A firmware's side, by the format's description: blobs by their address, and the RSDP's."""
    script, blobs, at = files[loader.LOADER], {}, 0x7F00_0000
    places: dict[str, int] = {}
    memory: dict[int, bytearray] = {}
    assert len(script) % 128 == 0
    for offset in range(0, len(script), 128):
        entry = script[offset : offset + 128]
        (command,) = struct.unpack_from("<I", entry)
        name = entry[4:60].rstrip(b"\0").decode()
        if command == 1:
            alignment, zone = struct.unpack_from("<IB", entry, 60)
            assert zone in (1, 2) and not alignment & alignment - 1
            at = (at + 0x10000 + alignment - 1) & -alignment
            places[name], blobs[name] = at, bytearray(files[name])
            memory[at] = blobs[name]
        elif command == 2:
            target = entry[60:116].rstrip(b"\0").decode()
            where, size = struct.unpack_from("<IB", entry, 116)
            value = int.from_bytes(blobs[name][where : where + size], "little")
            assert value < len(blobs[target])
            blobs[name][where : where + size] = (value + places[target]).to_bytes(size, "little")
        else:
            assert command == 3
            where, start, length = struct.unpack_from("<III", entry, 60)
            assert start <= where < start + length <= len(blobs[name]) and blobs[name][where] == 0
            blobs[name][where] = -sum(blobs[name][start : start + length]) & 0xFF
    return memory, places["etc/acpi/rsdp"]


def read(memory: dict[int, bytearray], address: int, size: int) -> bytes:
    start = max(start for start in memory if start <= address)
    data = memory[start][address - start : address - start + size]
    assert len(data) == size
    return bytes(data)


def table(memory: dict[int, bytearray], address: int) -> bytes:
    size = struct.unpack("<I", read(memory, address + 4, 4))[0]
    data = read(memory, address, size)
    assert sum(data) & 0xFF == 0, data[:4]
    return data


def described(firmware: bool = True, cpus: int = 2) -> Description:
    layout = Layout(512 * MIB, firmware=firmware)
    return Description(layout, [Cpu(number) for number in range(cpus)], slots=tuple(range(2, 32)), vmgenid=True)


@pytest.mark.parametrize("cpus", [1, 2, 200])
def test_every_table_is_reached_and_right_wherever_the_blobs_are_put(cpus: int) -> None:
    memory, rsdp = run(loader.files(described(cpus=cpus)))
    root = read(memory, rsdp, 36)
    assert root[:8] == b"RSD PTR " and sum(root[:20]) & 0xFF == 0 and sum(root) & 0xFF == 0
    xsdt = table(memory, struct.unpack_from("<Q", root, 24)[0])
    assert xsdt[:4] == b"XSDT"
    found = {data[:4]: data for data in (table(memory, at) for (at,) in struct.iter_unpack("<Q", xsdt[36:]))}
    assert set(found) == {b"FACP", b"APIC"}  # no MCFG: the chipset has no ECAM
    dsdt = table(memory, struct.unpack_from("<Q", found[b"FACP"], 140)[0])
    assert dsdt[:4] == b"DSDT" and b"_SB_" in dsdt


def test_the_tables_speak_of_the_firmwares_windows() -> None:
    windows = described().layout
    assert windows.pci32 == (0x8000_0000, 0xFC00_0000) and windows.pci_io == (0xC000, 0x10000)
    assert Layout(8 * GIB, firmware=True).pci32 == (0xC000_0000, 0xFC00_0000)
    assert Layout(8 * GIB, firmware=True).ram[1] == (RAM_HIGH, 5 * GIB)
    blob = loader.files(described())["etc/acpi/tables"]
    assert struct.pack("<II", *(windows.pci32[0], windows.pci32[1] - 1)) in blob
    assert res.io(PM_PORT, 0x40) in blob and res.memory32(ECAM, ECAM_SIZE) not in blob
