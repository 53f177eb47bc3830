"""MADT: the interrupt controllers, and with them the processors (ACPI 6.5, 5.2.12)."""

from __future__ import annotations

import struct

from kvik.vmm.acpi.table import table
from kvik.vmm.layout import IOAPIC, LAPIC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.acpi.description import Cpu, Description

ENABLED, ONLINE_CAPABLE = 1, 2
LARGEST_XAPIC_ID = 254  # 255 is the broadcast address


def cpu_entry(index: int, cpu: Cpu) -> bytes:
    """Processor Local APIC, or x2APIC for ids that eight bits cannot hold. The index is the ACPI processor UID. Also
    what a processor's _MAT returns."""
    flags = ENABLED if cpu.enabled else ONLINE_CAPABLE
    if cpu.apic_id <= LARGEST_XAPIC_ID and index <= 254:
        return struct.pack("<BBBBI", 0, 8, index, cpu.apic_id, flags)
    return struct.pack("<BBHIII", 9, 16, 0, cpu.apic_id, flags, index)


def build(description: Description) -> bytes:
    entries = [cpu_entry(index, cpu) for index, cpu in enumerate(description.cpus)]
    entries.append(struct.pack("<BBBBII", 1, 12, 0, 0, IOAPIC, 0))  # pins from GSI 0
    entries.append(struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1))  # NMI on LINT1 of every processor
    if any(cpu.apic_id > LARGEST_XAPIC_ID for cpu in description.cpus):
        entries.append(struct.pack("<BBHIB3x", 10, 12, 0, 0xFFFFFFFF, 1))
    return table(b"APIC", 5, struct.pack("<II", LAPIC, 0) + b"".join(entries))  # flags 0: no 8259 (5.2.12, table 5.20)
