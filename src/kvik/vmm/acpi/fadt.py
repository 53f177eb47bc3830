"""FADT: a hardware-reduced machine: no 8259, no PM timer, no fixed events (5.2.9, 4.1)."""

from __future__ import annotations

import struct

from kvik.vmm.acpi.table import HEADER_SIZE, port, table
from kvik.vmm.layout import ACPI_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.acpi.description import Description

SLEEP_CONTROL, SLEEP_STATUS, RESET = ACPI_PORT, ACPI_PORT + 1, ACPI_PORT + 2
RESET_VALUE = 1
S5_SLEEP_TYPE = 5

# Flags (table 5.10)
WBINVD, PROC_C1, POWER_BUTTON_IS_DEVICE, SLEEP_BUTTON_IS_DEVICE = 1 << 0, 1 << 2, 1 << 4, 1 << 5
RESET_REG_SUP, HEADLESS, APIC_PHYSICAL, HW_REDUCED = 1 << 10, 1 << 12, 1 << 19, 1 << 20
# IA-PC boot architecture flags (table 5.11)
VGA_NOT_PRESENT, CMOS_RTC_NOT_PRESENT = 1 << 2, 1 << 5
X_DSDT = 140  # offset of the pointer to the DSDT
SIZE = 276  # revision 6


def build(description: Description, dsdt: int) -> bytes:
    body = bytearray(SIZE - HEADER_SIZE)

    def put(offset: int, data: bytes) -> None:
        body[offset - HEADER_SIZE : offset - HEADER_SIZE + len(data)] = data

    flags = WBINVD | PROC_C1 | POWER_BUTTON_IS_DEVICE | SLEEP_BUTTON_IS_DEVICE | RESET_REG_SUP | HEADLESS | HW_REDUCED
    architecture = VGA_NOT_PRESENT | (0 if description.rtc else CMOS_RTC_NOT_PRESENT)
    put(96, struct.pack("<HH", 0xFFFF, 0xFFFF))  # C2 and C3 latencies: not there
    if description.rtc:
        put(108, b"\x32")  # the CMOS byte that holds the century
    put(109, struct.pack("<H", architecture))
    put(112, struct.pack("<I", flags))
    put(116, port(RESET) + bytes((RESET_VALUE,)))
    put(131, b"\x05")  # minor version: 6.5
    put(X_DSDT, struct.pack("<Q", dsdt))
    put(244, port(SLEEP_CONTROL) + port(SLEEP_STATUS))
    put(268, b"KVIK\0\0\0\0")  # hypervisor vendor identity
    return table(b"FACP", 6, bytes(body))
