"""The guest's address map: every address, port and interrupt number, with its reason.

Guest-physical memory:

    0                 RAM, low part                      up to RAM_LOW_END
    RAM_LOW_END       PCI32: windows of 32-bit BARs
    ECAM              PCI configuration space, 1 MiB a bus
    PLATFORM          registers of devices that are no PCI devices, 64 KiB each
    IOAPIC, LAPIC     where every x86 has them; KVM answers them in the kernel
    KVM_IDENTITY_MAP  four pages that KVM needs on some CPUs
    FLASH             firmware, if there is one, up to 4 GiB
    RAM_HIGH          the rest of the RAM, from 4 GiB
    layout.hotplug    room for memory that comes later
    layout.pci64      windows of 64-bit BARs
"""

from __future__ import annotations

from kvik.errors import InvalidArgument

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
PAGE = 4096

# What the boot code puts into low memory before the first instruction. All of it is free again once the kernel has
# copied what it needs.
BOOT_GDT = 0x500  # behind the real-mode interrupt table and the BIOS data area
HVM_START_INFO = 0x1000  # PVH's struct hvm_start_info with its memory map and module list (below 0x7000)
ZERO_PAGE = 0x7000  # Linux's struct boot_params
BOOT_PAGE_TABLES = 0x9000  # identity map for the 64-bit entry: PML4, PDPT, four PDs; up to 0xF000
BOOT_STACK = 0x8FF0
CMDLINE = 0x2_0000
CMDLINE_MAX = 0x1_0000  # far beyond COMMAND_LINE_SIZE (2048) of any x86 kernel

EBDA = 0x9_FC00  # end of conventional memory, as firmware reports it
ROM_AREA = 0xE_0000  # where an operating system looks for tables without UEFI (ACPI 5.2.5.1), up to 1 MiB
RSDP = ROM_AREA
VMGENID = 0xE_F000  # a page of its own, behind the ACPI tables
SMBIOS = 0xF_0000  # searched from here on (SMBIOS 5.2.1)
RESET_VECTOR = 0xF_FFF0  # where a BIOS begins: a kernel that finds no other way to reboot jumps here in real mode
HIGH_MEMORY = 0x10_0000
KERNEL = 0x100_0000  # 16 MiB: a bzImage's usual preferred address

RAM_LOW_END = 0xC000_0000  # 3 GiB, so that the 32-bit windows below 4 GiB have room
PCI32 = 0xC000_0000
PCI32_END = 0xE000_0000
FIRMWARE_PCI32_END = 0xFC00_0000  # OVMF's end of 32-bit windows
ECAM = 0xE000_0000
ECAM_BUSES = 1  # one flat bus: 32 slots of 8 functions
ECAM_SIZE = ECAM_BUSES * MIB
PLATFORM = 0xFEB0_0000
PLATFORM_SIZE = 0x10_0000
IOAPIC = 0xFEC0_0000
LAPIC = 0xFEE0_0000
KVM_IDENTITY_MAP = 0xFEFF_C000  # one page; KVM_SET_IDENTITY_MAP_ADDR. Not KVM's default, where firmware is
KVM_TSS = 0xFEFF_D000  # three pages; KVM_SET_TSS_ADDR
FLASH = 0xFF00_0000  # firmware ends at 4 GiB, so that the reset vector is its last 16 bytes; it may begin here
RAM_HIGH = 0x1_0000_0000

# Ports
PCI_CONFIG_ADDRESS = 0xCF8
PCI_CONFIG_DATA = 0xCFC
PCI_IO = 0x1000  # window of I/O BARs
PCI_IO_END = 0x1_0000
FIRMWARE_PCI_IO = 0xC000  # where OVMF puts I/O BARs on this chipset
COM_PORTS = (0x3F8, 0x2F8, 0x3E8, 0x2E8)
PIT_PORT = 0x40
RTC_PORT = 0x70
POST_PORT = 0x80  # written by kernels as a delay; nothing answers
DEBUGCON_PORT = 0xE9
FIRMWARE_LOG_PORT = 0x402  # OVMF's debug builds write there what they do
PVPANIC_PORT = 0x505
FW_CFG_PORT = 0x510
ACPI_PORT = 0x600  # sleep control, sleep status, reset register, pending events: `devices.acpi_events`
PCI_HOTPLUG_PORT = 0x610
CPU_HOTPLUG_PORT = 0x620
PM_PORT = 0xB000  # PIIX4 power management: OVMF powers off there, wherever the register says that it is

# Interrupts (GSIs): the IOAPIC's pins, then one route for each MSI that needs a descriptor.
IOAPIC_PINS = 24
COM_GSIS = (4, 3, 4, 3)
RTC_GSI = 8
ACPI_GSI = 9
PCI_GSI = 16  # 16 to 23: INTx of PCI slots
MSI_GSI = 24

MAX_RAM = 16 * TIB
PCI64_SIZE = 64 * GIB


def pci_gsi(slot: int) -> int:
    """The IOAPIC pin that INTA of the PCI slot is wired to."""
    return PCI_GSI + slot % 8


class Layout:
    """What depends on how much memory there is, and on who places the BARs. Sizes and addresses in bytes.

    `ram` lists (start, size) of the RAM that is there at power-on; `hotplug`, `pci32`, `pci64` and `pci_io` are
    (start, end). `firmware`: it places the BARs, in windows that it knows by itself (OvmfPkg, PlatformInitLib:
    PlatformMemMapInitialization), and there is no ECAM, as on the chipset that it finds.
    """

    __slots__ = ("firmware", "hotplug", "pci32", "pci64", "pci_io", "ram")

    def __init__(self, memory: int, hotplug: int = 0, *, firmware: bool = False) -> None:
        if not PAGE <= memory <= MAX_RAM or memory % PAGE:
            raise InvalidArgument(
                f"a machine cannot have {memory} bytes of memory",
                remedy=f"give a multiple of {PAGE} between {PAGE} and {MAX_RAM >> 40} TiB",
            )
        low = min(memory, RAM_LOW_END)
        self.ram = [(0, low)] + ([(RAM_HIGH, memory - low)] if memory > low else [])
        start = _up(RAM_HIGH + memory - low, GIB)
        self.hotplug = (start, start + _up(hotplug, GIB))
        # As far up as its own size, so that a BAR of any size fits at its natural alignment.
        start = _up(self.hotplug[1], PCI64_SIZE)
        self.pci64 = (start, start + PCI64_SIZE)
        self.firmware = firmware
        self.pci32, self.pci_io = (PCI32, PCI32_END), (PCI_IO, PCI_IO_END)
        if firmware:
            # One MTRR shall cover it up to 4 GiB: from there down a power of 2 that leaves RAM alone.
            self.pci32 = (RAM_HIGH - (1 << (RAM_HIGH - low).bit_length() - 1), FIRMWARE_PCI32_END)
            self.pci_io = (FIRMWARE_PCI_IO, PCI_IO_END)

    @property
    def end(self) -> int:
        """One more than the highest address in use: the guest's CPUs must be able to name it."""
        return self.pci64[1]


def _up(value: int, alignment: int) -> int:
    return (value + alignment - 1) // alignment * alignment
