"""The PCI bus: 32 slots, the ways to their configuration spaces, and who answers where.

One flat bus 0 with a host bridge in slot 0. Configuration space is reached through ECAM (PCIe 3.0, 7.2.2) and through
ports 0xCF8 and 0xCFC (PCI 3.0, 3.2.2.3.2). `hotplug` has what ACPI needs to plug and unplug.

Locks: `PciBus.lock` before a device's lock, never the other way round.
"""

from __future__ import annotations

import _thread

from kvik.errors import AlreadyExists, InvalidArgument, NotFound, OperationFailed
from kvik.vmm import layout
from kvik.vmm.device import Device
from kvik.vmm.pci.config import HEADER_TYPE, LEGACY, MULTIFUNCTION
from kvik.vmm.pci.device import PciDevice
from kvik.vmm.pci.hotplug import Hotplug

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State
    from kvik.vmm.machine import Machine
    from kvik.vmm.pci.device import _Window
    from kvik.vmm.slots import MemorySlots

__all__ = ["HostBridge", "PciBus"]

SLOTS = 32
RESET_CPU = 1 << 2  # PIIX3 (82371SB), 2.5.6: RST_CPU


class HostBridge(PciDevice):
    """What every PCI bus begins with. It has no registers of its own."""

    kind = "host-bridge"
    vendor, device_id, class_code = 0x1B36, 0x0008, 0x060000  # a generic PCIe host bridge
    hotpluggable = False


class _Ecam:
    """Configuration space in memory: 4 KiB a function."""

    def __init__(self, bus: PciBus) -> None:
        self._bus, self.lock = bus, bus.lock

    def read(self, offset: int, size: int) -> int:
        return self._bus.config_read(offset >> 12, offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._bus.config_write(offset >> 12, offset & 0xFFF, size, value)


class _Ports:
    """Configuration space behind two ports: an address (0xCF8), then its data (0xCFC to 0xCFF)."""

    def __init__(self, bus: PciBus) -> None:
        self._bus, self.lock = bus, bus.lock
        self.address = 0

    def _target(self, offset: int) -> tuple[int, int] | None:
        address = self.address
        if not address >> 31 or address >> 16 & 0xFF >= layout.ECAM_BUSES:
            return None
        return address >> 8 & 0xFF, (address & 0xFC) + offset - 4

    def read(self, offset: int, size: int) -> int:
        if offset < 4:
            return self.address if (offset, size) == (0, 4) else (1 << 8 * size) - 1
        target = self._target(offset)
        if target is None or target[1] + size > LEGACY:
            return (1 << 8 * size) - 1
        return self._bus.config_read(target[0], target[1], size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset < 4:
            if (offset, size) == (0, 4):
                self.address = value & 0x80FFFFFC
            elif self._bus.firmware and (offset, size) == (1, 1) and value & RESET_CPU:
                # 0xCF9, the chipset's reset control register
                self._bus.machine.hold_caller()
                self._bus.machine.request_reset("guest-reset")
            return
        target = self._target(offset)
        if target is not None and target[1] + size <= LEGACY:
            self._bus.config_write(target[0], target[1], size, value)


class PciBus(Device):
    """Bus 0 of a machine. Methods belong to the main loop's thread, unless they say otherwise.

    `legacy_ports`: answer at 0xCF8. Linux prefers the ports to ECAM, and each access through them is two exits, where
    a read through ECAM is none: so a kernel that was given finds only ECAM; firmware needs the ports.

    `firmware`: it finds a chipset that it knows (`pci.chipset`), which has no ECAM, and places all BARs itself.
    """

    kind = "pci-bus"

    def __init__(self, name: str = "pci", *, legacy_ports: bool = True, firmware: bool = False) -> None:
        self.legacy_ports, self.firmware = legacy_ports, firmware
        self.devices: dict[tuple[int, int], PciDevice] = {}
        self._waiting: list[tuple[_Window, int]] = []  # windows whose place is taken
        self._machine: Machine | None = None
        self._slots: MemorySlots | None = None
        self._next = {"mem32": layout.PCI32, "mem64": 0, "io": layout.PCI_IO}
        self.lock = _thread.RLock()
        self._ports: _Ports | None = None
        self.hotplug = Hotplug(self)
        super().__init__(name)

    def attach(self, machine: Machine) -> None:
        self._machine = machine
        self._slots = getattr(machine, "slots", None)
        self._next["mem64"] = machine.memory.layout.pci64[0]
        if not self.firmware:
            machine.mmio.attach(layout.ECAM, layout.ECAM_SIZE, _Ecam(self), "PCI configuration space")
        if self.legacy_ports:
            self._ports = _Ports(self)
            machine.ports.attach(layout.PCI_CONFIG_ADDRESS, 8, self._ports, "PCI configuration")
        self.hotplug.attach(machine)
        if self.firmware:
            from kvik.vmm.pci.chipset import add_chipset

            add_chipset(self)
        else:
            self.add(HostBridge("host-bridge"), slot=0)

    @property
    def machine(self) -> Machine:
        if self._machine is None:
            raise InvalidArgument("the PCI bus belongs to no machine yet")
        return self._machine

    # --- devices

    def free_slot(self) -> int:
        """The first slot with nothing in it. OperationFailed if there is none."""
        used = {slot for slot, _ in self.devices}
        for slot in range(SLOTS):
            if slot not in used:
                return slot
        raise OperationFailed(f"all {SLOTS} slots of the PCI bus are taken", remedy="remove a device first")

    def add(self, device: PciDevice, slot: int | None = None, function: int = 0, *, assign: bool = True) -> None:
        """Put a device into a slot (None: the first free one). AlreadyExists if something is there.

        `assign`: give its BARs addresses, as firmware does at power-on. A device that comes later is left to the
        guest, which has moved things by then.
        """
        with self.lock:
            if slot is None:
                slot = self.free_slot()
            if not 0 <= slot < SLOTS or not 0 <= function < 8:
                raise InvalidArgument(f"{device.name}: there is no PCI address {slot:02x}.{function}")
            if (other := self.devices.get((slot, function))) is not None:
                raise AlreadyExists(f"{device.name}: PCI address {slot:02x}.{function} belongs to {other.name}")
            if function and (slot, 0) not in self.devices:
                raise InvalidArgument(f"{device.name}: PCI slot {slot:02x} has no function 0", remedy="add that first")
            device.slot, device.function, device.bus = slot, function, self
            if assign and not self.firmware:
                self._assign(device)
            if function:
                self.devices[slot, 0].config.fix(HEADER_TYPE, 1, MULTIFUNCTION)
            device.attach(self.machine)
            self.devices[slot, function] = device
            if not self.firmware:
                device.config.pages.place(self._slots, layout.ECAM + (slot << 15 | function << 12))
            device.place()

    def _assign(self, device: PciDevice) -> None:
        ends = {"mem32": layout.PCI32_END, "mem64": self.machine.memory.layout.pci64[1], "io": layout.PCI_IO_END}
        # Largest first wastes least; a window that is not a multiple of a page would share it with a neighbour.
        for window in sorted(device.windows, key=lambda window: -window.bar.size):
            bar = window.bar
            size = bar.size if bar.kind == "io" else max(bar.size, layout.PAGE)
            start = (self._next[bar.kind] + size - 1) // size * size
            if start + size <= ends[bar.kind]:  # else the guest may find room; unassigned is legal
                device.fix_bar_address(bar.index, start)
                self._next[bar.kind] = start + size

    def remove(self, device: PciDevice) -> None:
        """Take a device out at once, and close it. Any thread."""
        device.close()

    def forget(self, device: PciDevice) -> None:
        """The device answers no more. Any thread; `PciDevice.close` calls it."""
        with self.lock:
            if self.devices.get((device.slot, device.function)) is not device:
                return
            device.unplace()
            device.config.pages.place(None, -1)
            del self.devices[device.slot, device.function]
            device.bus = None

    def plug(self, device: PciDevice, slot: int | None = None) -> None:
        """Add a device while the machine runs; the guest is told by ACPI."""
        self.hotplug.plug(device, slot)

    def request_unplug(self, device: PciDevice) -> None:
        """Ask the guest to give a device up; DEVICE_DELETED tells that it did."""
        self.hotplug.request_unplug(device)

    def find(self, name: str) -> PciDevice:
        for device in self.devices.values():
            if device.name == name:
                return device
        raise NotFound(f"there is no PCI device {name}")

    # --- configuration accesses; the lock is held, on a vCPU's thread

    def config_read(self, devfn: int, offset: int, size: int) -> int:
        device = self.devices.get((devfn >> 3, devfn & 7))
        if device is None or devfn > 0xFF:
            return (1 << 8 * size) - 1
        with device.lock:
            return device.config_read(offset, size)

    def config_write(self, devfn: int, offset: int, size: int, value: int) -> None:
        device = self.devices.get((devfn >> 3, devfn & 7))
        if device is not None:
            with device.lock:
                device.config_write(offset, size, value)

    # --- windows; the lock is held

    def map(self, window: _Window, address: int) -> None:
        """Answer at `address`, if a window of the host bridge leads there. Where somebody else already answers, wait
        until that one leaves: what overlapping BARs do is undefined, so the first wins."""
        window.start = address
        kind, size = window.bar.kind, window.bar.size
        places = self.machine.memory.layout
        windows = (places.pci_io,) if kind == "io" else (places.pci32, places.pci64)
        if not any(low <= address and address + size <= high for low, high in windows):
            return
        buses = self.machine.ports if kind == "io" else self.machine.mmio
        device, index = window.device, window.bar.index
        try:
            buses.attach(address, size, window, f"{device.name} BAR {index}")
        except InvalidArgument:
            self._waiting.append((window, address))
            return
        window.mapped = True
        for bar, offset, pages in device.pages:
            # A page of a window that is smaller, or shares its page, would show what is not there.
            if bar == index and address % layout.PAGE == 0:
                pages.place(self._slots, address + offset)
        for bell in device.doorbells:
            if bell.bar == index:
                self.machine.doorbells.add(address + bell.offset, bell.size, bell.fd, pio=kind == "io")

    def unmap(self, window: _Window) -> None:
        """Answer nowhere; whoever waited for the place gets it."""
        start, window.start = window.start, -1
        self._waiting = [entry for entry in self._waiting if entry[0] is not window]
        if not window.mapped:
            return
        window.mapped = False
        device, index, pio = window.device, window.bar.index, window.bar.kind == "io"
        for bar, _, pages in device.pages:
            if bar == index:
                pages.place(None, -1)
        for bell in device.doorbells:
            if bell.bar == index:
                self.machine.doorbells.remove(start + bell.offset, bell.size, pio=pio)
        (self.machine.ports if pio else self.machine.mmio).detach(start)
        waiting, self._waiting = self._waiting, []
        for other, address in waiting:
            self.map(other, address)

    # --- life

    def reset(self) -> None:
        """Power-on: every device, then its windows."""
        with self.lock:
            if self._ports is not None:
                self._ports.address = 0
            self.hotplug.reset()
            for device in self.devices.values():
                device.reset()
                device.place()

    def state(self) -> State:
        """The bus's own state; each device has one of its own."""
        return {"address": self._ports.address if self._ports else 0, "hotplug": self.hotplug.state()}

    def restore(self, state: State) -> None:
        if self._ports is not None:
            self._ports.address = int(state["address"])
        self.hotplug.restore(state["hotplug"])

    def close(self) -> None:
        for device in list(self.devices.values()):
            device.close()
        if self._machine is not None:
            self._machine.mmio.detach(layout.ECAM)
            self._machine.ports.detach(layout.PCI_CONFIG_ADDRESS)
            self._machine.ports.detach(layout.PCI_HOTPLUG_PORT)
            self._machine = None
