"""GSI routing: where an interrupt number leads (api.rst 4.52, KVM_SET_GSI_ROUTING)."""

from __future__ import annotations

import struct

from kvik.kvm.constants import Irqchip
from kvik.named import NamedTuple

_HEADER = struct.Struct("<II")
_ENTRY = struct.Struct("<IIII4I16x")  # gsi, type, flags, pad; a union of 32 bytes
_IRQCHIP, _MSI = 1, 2  # KVM_IRQ_ROUTING_*

IOAPIC_PINS = 24
PIC_PINS = 8


class IrqchipRoute(NamedTuple):
    """`gsi` raises pin `pin` of one of KVM's own chips (`Irqchip`)."""

    gsi: int
    irqchip: int
    pin: int


class MsiRoute(NamedTuple):
    """`gsi` sends the message `data` to `address` (bits 63:32 hold the high bits of an x2APIC id, if enabled)."""

    gsi: int
    address: int
    data: int


Route = IrqchipRoute | MsiRoute


def default_routes() -> list[Route]:
    """What KVM_CREATE_IRQCHIP installs: GSI n is IOAPIC pin n, and 0 to 15 also the two PICs' pins. A new table
    replaces the old one whole, so these belong into every table of a machine with the full in-kernel irqchip."""
    routes: list[Route] = []
    for gsi in range(IOAPIC_PINS):
        routes.append(IrqchipRoute(gsi, Irqchip.IOAPIC, gsi))
        if gsi < 2 * PIC_PINS:
            chip = Irqchip.PIC_MASTER if gsi < PIC_PINS else Irqchip.PIC_SLAVE
            routes.append(IrqchipRoute(gsi, chip, gsi % PIC_PINS))
    return routes


def msi_address(address: int) -> tuple[int, int]:
    """The two halves as the kernel takes them: with 32-bit APIC ids enabled it refuses a message, or a whole table,
    whose reserved bits 39:32 the guest has set; hardware ignores them."""
    return address & 0xFFFFFFFF, address >> 32 & 0xFFFFFF00


def encode(routes: list[Route]) -> bytearray:
    """struct kvm_irq_routing."""
    table = bytearray(_HEADER.size + _ENTRY.size * len(routes))
    _HEADER.pack_into(table, 0, len(routes), 0)
    offset = _HEADER.size
    for route in routes:
        if isinstance(route, MsiRoute):
            low, high = msi_address(route.address)
            _ENTRY.pack_into(table, offset, route.gsi, _MSI, 0, 0, low, high, route.data, 0)
        else:
            _ENTRY.pack_into(table, offset, route.gsi, _IRQCHIP, 0, 0, route.irqchip, route.pin, 0, 0)
        offset += _ENTRY.size
    return table
