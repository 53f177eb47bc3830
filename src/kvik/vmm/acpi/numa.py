"""SRAT and SLIT: which processors and memory belong together, how far nodes are apart (ACPI 6.5, 5.2.16, 5.2.17)."""

from __future__ import annotations

import struct

from kvik.vmm.acpi.madt import LARGEST_XAPIC_ID
from kvik.vmm.acpi.table import table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.acpi.description import Description

ENABLED, HOT_PLUGGABLE = 1, 2
LOCAL, REMOTE = 10, 20


def srat(description: Description) -> bytes:
    entries = []
    for cpu in description.cpus:
        if cpu.apic_id <= LARGEST_XAPIC_ID:
            node = cpu.node.to_bytes(4, "little")
            entries.append(struct.pack("<BBBBIB3sI", 0, 16, node[0], cpu.apic_id, ENABLED, 0, node[1:], 0))
        else:
            entries.append(struct.pack("<BBHIIIII", 2, 24, 0, cpu.node, cpu.apic_id, ENABLED, 0, 0))
    for part in description.ram:
        flags = ENABLED | (HOT_PLUGGABLE if part.hotplug else 0)
        entries.append(struct.pack("<BBIHQQIIQ", 1, 40, part.node, 0, part.start, part.size, 0, flags, 0))
    return table(b"SRAT", 3, struct.pack("<IQ", 1, 0) + b"".join(entries))


def slit(description: Description) -> bytes:
    nodes, given = description.nodes, description.distances
    matrix = bytearray()
    for row in range(nodes):
        for column in range(nodes):
            known = row < len(given) and column < len(given[row])
            matrix.append(given[row][column] if known else LOCAL if row == column else REMOTE)
    return table(b"SLIT", 1, struct.pack("<Q", nodes) + bytes(matrix))
