"""The chipset that UEFI firmware (OVMF) finds: as much of Intel's 440FX and PIIX as it looks at, and no more.

OVMF knows what platform it is on by the host bridge's identity. Of the platforms that it knows this is the smallest:
no ECAM, no system management mode. What is behind the registers here stays at fixed places: the PM registers at
PM_PORT (`devices.piix4_pm`), the reset control register at port 0xCF9 (`pci.bus`).

Sources: Intel 82441FX (290549), 82371AB PIIX4 (290562); edk2's OvmfPkg: PlatformInitLib, BaseAcpiTimerLib,
PlatformBootManagerLib, SioBusDxe.
"""

from __future__ import annotations

from kvik.vmm.layout import PM_PORT
from kvik.vmm.pci.device import PciDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.pci.bus import PciBus

__all__ = ["CHIPSET_SLOT", "IsaBridge", "PmcBridge", "PowerManagement", "add_chipset"]

CHIPSET_SLOT = 1  # where OVMF looks for it
INTEL = 0x8086
PIRQ_ROUTES = 0x60  # PIRQRCA to PIRQRCD (7.1.9): where INTA to INTD go in the 8259s
PIRQ_DISABLED = 0x80
PM_BASE, PM_MISC = 0x40, 0x80  # PMBA (7.3.1), PMREGMISC (7.3.26)
PM_BASE_IS_IO, PM_IO_ENABLE = 1 << 0, 1 << 0


class PmcBridge(PciDevice):
    """The host bridge. Its registers for DRAM and shadow RAM are no concern of firmware that runs in flash and RAM."""

    kind = "i440fx-host-bridge"
    vendor, device_id, class_code, revision = INTEL, 0x1237, 0x060000, 2
    hotpluggable = False


class IsaBridge(PciDevice):
    """Behind it firmware expects the serial lines. It writes interrupt routes for systems that use 8259s, which
    nothing here acts on: the tables that we give it lead to the IOAPIC."""

    kind = "piix3-isa-bridge"
    vendor, device_id, class_code = INTEL, 0x7000, 0x060100
    hotpluggable = False

    def add_capabilities(self) -> None:
        routes = int.from_bytes(bytes((PIRQ_DISABLED,) * 4), "little")
        self.config.set(PIRQ_ROUTES, 4, routes, 0x8F8F8F8F)


class PowerManagement(PciDevice):
    """Says where the PM registers are, which do not move, and that they are on."""

    kind = "piix4-pm"
    vendor, device_id, class_code, revision = INTEL, 0x7113, 0x068000, 3
    hotpluggable = False

    def add_capabilities(self) -> None:
        self.config.set(PM_BASE, 4, PM_PORT | PM_BASE_IS_IO)
        self.config.set(PM_MISC, 1, PM_IO_ENABLE)


def add_chipset(bus: PciBus) -> None:
    """Into an empty bus."""
    bus.add(PmcBridge("host-bridge"), slot=0)
    bus.add(IsaBridge("isa-bridge"), CHIPSET_SLOT)
    bus.add(PowerManagement("power-management"), CHIPSET_SLOT, 3)
