"""MCFG: where PCI configuration space lies in memory (PCI Firmware Specification 3.2, 4.1.2)."""

from __future__ import annotations

import struct

from kvik.vmm.acpi.table import table
from kvik.vmm.layout import ECAM, ECAM_BUSES


def build() -> bytes:
    return table(b"MCFG", 1, bytes(8) + struct.pack("<QHBB4x", ECAM, 0, 0, ECAM_BUSES - 1))
