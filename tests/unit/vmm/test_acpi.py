"""The ACPI tables: read back byte by byte, and by Intel's own disassembler."""

from __future__ import annotations

import itertools
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from kvik.errors import InvalidArgument
from kvik.vmm import acpi
from kvik.vmm.acpi import aml, resources
from kvik.vmm.acpi.description import Cpu, Description, MemoryRange, spread_ram
from kvik.vmm.layout import ECAM, GIB, HIGH_MEMORY, IOAPIC, MIB, RAM_HIGH, RAM_LOW_END, RSDP, VMGENID, Layout


def description(cpus: int = 2, memory: int = 512 * MIB, **more: object) -> Description:
    return Description(Layout(memory), [Cpu(index) for index in range(cpus)], **more)


def everything(cpus: int = 4) -> Description:
    layout = Layout(8 * GIB)
    return Description(
        layout,
        [Cpu(index, index < 2, index % 2) for index in range(cpus)],
        ram=spread_ram(layout, [4 * GIB, 4 * GIB]),
        distances=[[10, 21], [21, 10]],
        slots=tuple(range(1, 32)),
        com_ports=(0, 1),
        pvpanic=True,
        vmgenid=True,
        cpu_hotplug=True,
    )


def by_signature(tables: list[tuple[int, bytes]]) -> dict[str, tuple[int, bytes]]:
    return {data[:4].decode().strip(): (address, data) for address, data in tables}


def entries(data: bytes, start: int) -> list[tuple[int, bytes]]:
    """(type, whole entry) of a table of entries that begin with type and length."""
    found = []
    while start < len(data):
        kind, size = data[start], data[start + 1]
        assert size >= 2
        found.append((kind, data[start : start + size]))
        start += size
    assert start == len(data)
    return found


@pytest.mark.parametrize("which", [description(), everything(), everything(255), everything(1024)])
def test_every_table_is_found_from_the_rsdp_and_sums_to_zero(which: Description) -> None:
    tables = acpi.build(which)
    memory = dict(tables)
    assert tables[0][0] == RSDP
    root = memory[RSDP]
    assert root[:8] == b"RSD PTR " and sum(root[:20]) % 256 == 0 and sum(root) % 256 == 0
    xsdt = memory[struct.unpack_from("<Q", root, 24)[0]]
    pointers = struct.unpack_from(f"<{(len(xsdt) - 36) // 8}Q", xsdt, 36)
    fadt = memory[pointers[0]]
    dsdt = struct.unpack_from("<Q", fadt, 140)[0]
    assert {RSDP, dsdt, *pointers} | {a for a, d in tables if d is xsdt} == set(memory)
    for address, data in tables[1:]:
        assert sum(data) % 256 == 0, data[:4]
        assert struct.unpack_from("<I", data, 4)[0] == len(data), data[:4]
        assert address % 16 == 0
    ends = sorted((address, address + len(data)) for address, data in tables)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))


def test_small_tables_lie_in_the_bios_area_and_large_ones_at_the_end_of_low_ram() -> None:
    assert all(address + len(data) <= VMGENID for address, data in acpi.build(everything(64)))
    large = acpi.build(everything(1024))
    low = [address for address, _ in large if address != RSDP]
    assert min(low) > RAM_LOW_END - 2 * MIB and large[-1][0] + len(large[-1][1]) <= RAM_LOW_END


def test_tables_too_large_for_the_memory_are_refused() -> None:
    layout = Layout(MIB)
    with pytest.raises(InvalidArgument, match=r"ACPI tables.*give the machine more memory"):
        acpi.build(Description(layout, [Cpu(index) for index in range(1024)], cpu_hotplug=True))


def test_madt_has_each_processor_once_and_x2apic_entries_beyond_254() -> None:
    cpus = [Cpu(0), Cpu(1, False), Cpu(254), Cpu(255), Cpu(4000, False)]
    _, madt = by_signature(acpi.build(Description(Layout(GIB), cpus)))["APIC"]
    listed = entries(madt, 44)
    local = [struct.unpack("<BBBBI", data) for kind, data in listed if kind == 0]
    assert [(uid, apic, flags) for _, _, uid, apic, flags in local] == [(0, 0, 1), (1, 1, 2), (2, 254, 1)]
    wide = [struct.unpack("<BBHIII", data) for kind, data in listed if kind == 9]
    assert [(apic, flags, uid) for _, _, _, apic, flags, uid in wide] == [(255, 1, 3), (4000, 2, 4)]
    assert [struct.unpack("<BBBBII", data)[4:] for kind, data in listed if kind == 1] == [(IOAPIC, 0)]
    assert [kind for kind, _ in listed if kind in (4, 10)] == [4, 10]  # NMI lines, for both kinds of id


def test_fadt_is_hardware_reduced_with_sleep_and_reset_registers() -> None:
    _, fadt = by_signature(acpi.build(description()))["FACP"]
    flags = struct.unpack_from("<I", fadt, 112)[0]
    assert flags & 1 << 20 and flags & 1 << 10 and fadt[8] == 6 and len(fadt) == 276
    assert struct.unpack_from("<BBBBQ", fadt, 116) == (1, 8, 0, 1, 0x602) and fadt[128] == 1
    assert struct.unpack_from("<BBBBQ", fadt, 244) == (1, 8, 0, 1, 0x600)
    assert struct.unpack_from("<BBBBQ", fadt, 256) == (1, 8, 0, 1, 0x601)
    without = by_signature(acpi.build(description(rtc=False)))["FACP"][1]
    assert struct.unpack_from("<H", without, 109)[0] & 1 << 5 and not struct.unpack_from("<H", fadt, 109)[0] & 1 << 5


def test_mcfg_names_the_configuration_space() -> None:
    _, mcfg = by_signature(acpi.build(description()))["MCFG"]
    assert struct.unpack_from("<QHBB", mcfg, 44) == (ECAM, 0, 0, 0)


def test_numa_tables_come_with_nodes_only() -> None:
    assert not {"SRAT", "SLIT"} & set(by_signature(acpi.build(description())))
    tables = by_signature(acpi.build(everything()))
    listed = entries(tables["SRAT"][1], 48)
    cpus = [struct.unpack("<BBBBIB3sI", data) for kind, data in listed if kind == 0]
    assert [(apic, node) for _, _, node, apic, *_ in cpus] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    ram = [struct.unpack("<BBIHQQIIQ", data) for kind, data in listed if kind == 1]
    assert [(node, start, size) for _, _, node, _, start, size, *_ in ram] == [
        (0, 0, RAM_LOW_END),
        (0, RAM_HIGH, GIB),
        (1, RAM_HIGH + GIB, 4 * GIB),
    ]
    slit = tables["SLIT"][1]
    assert struct.unpack_from("<Q", slit, 36)[0] == 2 and slit[44:] == bytes((10, 21, 21, 10))


def test_wide_apic_ids_have_wide_affinity_entries() -> None:
    layout = Layout(GIB)
    which = Description(layout, [Cpu(0), Cpu(300, True, 1)], ram=[MemoryRange(0, GIB, 0)])
    listed = entries(by_signature(acpi.build(which))["SRAT"][1], 48)
    assert [struct.unpack("<BBHIIIII", data)[3:5] for kind, data in listed if kind == 2] == [(1, 300)]


def test_room_for_memory_that_comes_later_is_marked_so() -> None:
    layout = Layout(4 * GIB, 2 * GIB)
    assert [part for part in spread_ram(layout, [4 * GIB]) if part.hotplug] == [
        MemoryRange(layout.hotplug[0], 2 * GIB, 0, True)
    ]


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("PEND", b"PEND"),
        ("S1", b"S1__"),
        ("\\_SB_.PCI0", b"\\\x2e_SB_PCI0"),
        ("\\_SB_.PCI0.S01_", b"\\\x2f\x03_SB_PCI0S01_"),
        ("^X", b"^X___"),
        ("\\", b"\\\x00"),
    ],
)
def test_names(text: str, encoded: bytes) -> None:
    assert aml.path(text) == encoded


@pytest.mark.parametrize("text", ["TOOLONG", "1AB", "lower", "A.B-C"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no ACPI name"):
        aml.path(text)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        *[(0, b"\0"), (1, b"\1"), (2, b"\x0a\x02"), (255, b"\x0a\xff"), (256, b"\x0b\0\1")],
        *[(65536, b"\x0c\0\0\1\0"), (1 << 32, b"\x0e\0\0\0\0\1\0\0\0")],
    ],
)
def test_integers_are_as_short_as_can_be(value: int, encoded: bytes) -> None:
    assert aml.integer(value) == encoded


@pytest.mark.parametrize("size", [0, 62, 63, 4093, 4094, 1 << 20])
def test_a_package_length_counts_itself(size: int) -> None:
    encoded = aml.package_length(size)
    more = encoded[0] >> 6
    length = encoded[0] & 0x3F if not more else encoded[0] & 15 | int.from_bytes(encoded[1:], "little") << 4
    assert len(encoded) == more + 1 and length == size + len(encoded)


def test_a_too_long_package_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        aml.package_length(1 << 28)


def test_a_resource_template_ends_with_its_tag() -> None:
    made = resources.template(resources.io(0x3F8, 8), resources.interrupt(4))
    assert made.endswith(b"\x79\x00") and made[0] == 0x11
    assert struct.pack("<HH", 0x3F8, 0x3F8) in made


IASL = shutil.which("iasl")


@pytest.mark.skipif(IASL is None, reason="iasl is missing: apt-get install acpica-tools")
@pytest.mark.parametrize("cpus", [4, 300])
def test_intels_compiler_understands_every_table(tmp_path: Path, cpus: int) -> None:
    """Disassembled and compiled again without an error, and the devices are there."""
    for _, data in acpi.build(everything(cpus))[1:]:
        name = data[:4].decode()
        (tmp_path / f"{name}.aml").write_bytes(data)
        done = subprocess.run(
            [str(IASL), "-d", f"{name}.aml"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        text = done.stdout + done.stderr
        assert done.returncode == 0 and not re.search(r"error|invalid|unknown|mismatch", text, re.IGNORECASE), text
    source = (tmp_path / "DSDT.dsl").read_text()
    for device in ("COM1", "COM2", "RTC", "MRES", "PEVT", "VGEN", "PWRB", "SLPB", "PCI0", "S1F", "GED", "CPUS", "C003"):
        assert f"Device ({device})" in source, device
    # 6035: the second half of QEMUVGID is no number; it is what guests look for all the same.
    done = subprocess.run(
        [str(IASL), "-vw", "6035", "DSDT.dsl"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert " 0 Errors" in done.stdout, done.stdout + done.stderr


def test_devices_that_are_not_there_are_not_described() -> None:
    _, dsdt = by_signature(acpi.build(description(com_ports=(), rtc=False)))["DSDT"]
    for name in (b"COM1", b"RTC_", b"PEVT", b"VGEN", b"CPUS", b"PCIH"):
        assert name not in dsdt
    assert b"PWRB" in dsdt and b"GED_" in dsdt


def test_high_tables_stay_out_of_the_first_mebibyte() -> None:
    assert all(address >= HIGH_MEMORY or address == RSDP for address, _ in acpi.build(everything(1024)))
