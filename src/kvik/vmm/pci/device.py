"""A PCI device: configuration space, BARs, interrupts. Subclasses say what lies behind the BARs.

    class Doorbell(PciDevice):
        kind, vendor, device_id, class_code = "doorbell", 0x1B36, 0x0011, 0xFF0000
        bars = (Bar(0, 4096, "mem32"),)
        msix_vectors = 2

        def read_bar(self, bar: int, offset: int, size: int) -> int: ...
        def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
            self.msix.signal(value)

`PciBus.add` puts it into a slot. Source: PCI Local Bus Specification 3.0, 6.
"""

from __future__ import annotations

from kvik.vmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.pci.config import ConfigSpace
    from kvik.vmm.pci.msix import Msix


class Bar:
    """One base address register: `size` bytes (a power of 2) behind BAR `index`.

    `kind`: mem32, mem64 (takes index + 1 too) or io.
    """

    __slots__ = ("index", "kind", "prefetch", "size")

    def __init__(self, index: int, size: int, kind: str = "mem32", *, prefetch: bool = False) -> None:
        self.index, self.size, self.kind, self.prefetch = index, size, kind, prefetch


class PciDevice(Device):
    """Base of all PCI devices (type 0 header)."""

    kind = "pci"
    vendor = 0xFFFF
    device_id = 0xFFFF
    class_code = 0xFF0000  # base class, subclass, programming interface
    revision = 0
    subsystem_vendor = 0
    subsystem = 0
    bars: tuple[Bar, ...] = ()
    msix_vectors = 0  # more than 0: an MSI-X capability, its table behind `msix_bar`
    intx = False  # has an interrupt pin

    config: ConfigSpace
    msix: Msix  # .signal(vector), .fd(vector) -> irqfd's eventfd
    address: tuple[int, int]  # slot, function: set by the bus

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        """The guest reads behind a BAR; `lock` is held."""
        return (1 << 8 * size) - 1

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        """The guest writes behind a BAR; `lock` is held."""

    def config_written(self, offset: int, size: int) -> None:
        """The guest wrote to the configuration space, and what was writable has changed."""

    def raise_intx(self) -> None:
        """Assert the interrupt pin: a level, until `lower_intx`."""

    def lower_intx(self) -> None:
        """Deassert the interrupt pin."""
