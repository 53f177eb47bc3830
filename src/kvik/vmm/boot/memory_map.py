"""The guest's memory map (e820): what the kernel may use, and what it must leave alone.

Types are those of the BIOS call of that name (ACPI 6.5, 15.2); PVH and the zero page use the same numbers.
"""

from __future__ import annotations

from kvik.vmm.layout import EBDA, ECAM, ECAM_SIZE, HIGH_MEMORY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvik.vmm.memory import GuestMemory

RAM, RESERVED, ACPI_TABLES = 1, 2, 3


def memory_map(memory: GuestMemory, tables: Iterable[tuple[int, int]] = ()) -> list[tuple[int, int, int]]:
    """Entries (start, size, type), ascending and without overlap. `tables`: ACPI tables (start, size) inside RAM above
    1 MiB; those below lie in the BIOS range, which is never RAM."""
    holes = [(EBDA, HIGH_MEMORY - EBDA, RESERVED)]
    holes += [(start, size, ACPI_TABLES) for start, size in tables if start >= HIGH_MEMORY]
    entries = [(ECAM, ECAM_SIZE, RESERVED)]  # MMCONFIG is used only where the map or the DSDT reserves it
    for first, length in memory.layout.ram:  # not what a device brings: its driver takes that when it is told to
        at, end = first, first + length
        for start, size, kind in sorted(holes):
            if start < at or start + size > end:
                continue
            if start > at:
                entries.append((at, start - at, RAM))
            entries.append((start, size, kind))
            at = start + size
        if at < end:
            entries.append((at, end - at, RAM))
    return sorted(entries)
