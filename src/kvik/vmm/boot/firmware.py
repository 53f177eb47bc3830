"""A machine that starts with UEFI firmware (OVMF) at the reset vector: what the firmware needs, and what it is told.

    flash     the code, read-only, up to 4 GiB; the variables below it
    chipset   `pci.chipset`, `devices.piix4_pm`, `devices.pit`, KVM's 8259s
    fw_cfg    memory map, processors, boot order, ACPI and SMBIOS tables

A vCPU that KVM has just made is at the reset vector, so there are no registers to set; a reset puts it there again.
What OVMF reads, and where: edk2's OvmfPkg, Library/PlatformInitLib, Library/QemuBootOrderLib, AcpiPlatformDxe,
SmbiosPlatformDxe.
"""

from __future__ import annotations

import os
import struct

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.acpi import loader
from kvik.vmm.boot.memory_map import RAM
from kvik.vmm.boot.source import Source
from kvik.vmm.cpu.cpuid import physical_bits
from kvik.vmm.devices import fw_cfg
from kvik.vmm.devices.flash import Flash, Rom
from kvik.vmm.devices.fw_cfg import FwCfg
from kvik.vmm.devices.piix4_pm import Piix4Pm
from kvik.vmm.devices.pit import Pit
from kvik.vmm.devices.rtc import Rtc
from kvik.vmm.layout import KIB, MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.vmm.acpi.description import Description
    from kvik.vmm.layout import Layout
    from kvik.vmm.machine import Machine

__all__ = ["FirmwareLoader", "add_firmware"]

MOST_BITS = 46  # of a physical address: OVMF uses no more (PlatformAddressWidthFromCpuid)
# CMOS bytes that say how much memory there is, in units of 64 KiB (OvmfPkg, MemDetect.c)
CMOS_ABOVE_16M, CMOS_ABOVE_4G = 0x34, 0x5B


def add_firmware(machine: Machine) -> None:
    """The devices that firmware needs. Raises what `Source` raises for files, and ImageError, HostError."""
    config = machine.config.boot
    if config.kernel or config.kernel_fd >= 0:
        raise InvalidArgument("a machine starts with firmware or with a kernel", remedy="leave one of them out")
    layout = machine.memory.layout
    # It puts 64-bit BARs wherever its CPUs' addresses end.
    start, end = layout.pci64
    layout.pci64 = (start, max(end, 1 << min(physical_bits(machine.system.supported_cpuid()), MOST_BITS)))
    with Source("firmware", config.firmware_fd if config.firmware_fd >= 0 else config.firmware) as source:
        rom = Rom("firmware", source)
    machine.add(rom)
    if config.nvram or config.nvram_fd >= 0:
        fd = config.nvram_fd
        if fd < 0:
            fd = _open_variables(config.nvram)
            machine.on_close.append(lambda: os.close(fd))
        machine.add(Flash("nvram", Source("firmware's variables file", fd), rom.base, fd))
    machine.add(Pit())
    machine.add(Piix4Pm())
    machine.add(FwCfg())
    _tell_memory(machine, layout)


def _open_variables(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"the firmware's variables file {path!r} cannot be opened: {error.strerror}",
            errno=error.errno or 0,
            remedy="copy the template that came with the firmware (OVMF_VARS_4M.fd), writable for who runs the machine",
        ) from None


def _tell_memory(machine: Machine, layout: Layout) -> None:
    """In CMOS: what firmware looks at where it does not take the memory map's word."""
    low = layout.ram[0][1]
    high = sum(size for _, size in layout.ram[1:])
    rtc = machine.devices["rtc"]
    assert isinstance(rtc, Rtc)
    cmos = rtc.cmos
    cmos[CMOS_ABOVE_16M : CMOS_ABOVE_16M + 2] = struct.pack("<H", max(low - 16 * MIB, 0) // (64 * KIB))
    cmos[CMOS_ABOVE_4G : CMOS_ABOVE_4G + 3] = struct.pack("<I", min(high // (64 * KIB), 0xFFFFFF))[:3]


class FirmwareLoader:
    """Fills fw_cfg: at power-on, and again at each reset, for processors may have come."""

    def __init__(self, machine: Machine, describe: Callable[[], tuple[Description, list[tuple[int, bytes]]]]) -> None:
        self.machine, self.describe = machine, describe
        self()  # also for a machine whose state is to come

    def __call__(self) -> None:
        machine = self.machine
        description, smbios = self.describe()
        layout = machine.memory.layout
        memory_map = [struct.pack("<QQI", start, size, RAM) for start, size in layout.ram]
        files = loader.files(description) | {
            "etc/e820": b"".join(memory_map),
            "etc/reserved-memory-end": struct.pack("<Q", layout.pci64[0]),  # BARs come behind it
            "etc/smbios/smbios-anchor": smbios[0][1],
            "etc/smbios/smbios-tables": smbios[1][1],
        }
        if order := boot_order(machine):
            files["bootorder"] = order
        items = {
            fw_cfg.CPU_COUNT: struct.pack("<H", len(machine.vcpus)),
            fw_cfg.MAX_CPUS: struct.pack("<H", len(description.cpus)),
        }
        found = machine.devices["fw_cfg"]
        assert isinstance(found, FwCfg)
        found.publish(files, items)


def boot_order(machine: Machine) -> bytes:
    """Disks, in the order in which they were given, those of other processes last, as Open Firmware device paths: one a
    line, a zero behind them (OvmfPkg, QemuBootOrderLib)."""
    lines = []
    for disk in [*machine.config.disks, *machine.config.vhost_user_blk]:
        for name, (_, made_of) in machine.made.items():
            if made_of is disk and name in machine.devices:
                slot = machine.pci.find(name).slot
                lines.append(f"/pci@i0cf8/scsi@{slot:x}/disk@0,0")
    return "\n".join(lines).encode() + b"\0" if lines else b""
