"""Plugging and unplugging of PCI devices, told to the guest by ACPI (ACPI 6.4, 5.6.6, 6.3).

    port 0x610 read   slots with a new device; reading takes them
         0x614 read   slots that the guest shall give up; reading takes them
         0x618 write  eject these slots

The names are those that the DSDT uses (`vmm/acpi/dsdt.py`). One bit a slot, double words only.
"""

from __future__ import annotations

from kvik.errors import NotFound, OperationInvalid, OperationUnsupported
from kvik.vmm import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.vmm.device import State
    from kvik.vmm.machine import Machine
    from kvik.vmm.pci.bus import PciBus
    from kvik.vmm.pci.device import PciDevice

__all__ = ["Hotplug"]

SLOTS = 32


class Hotplug:
    """`on_event` makes the guest look at the registers (the generic event device's bit 1). `on_removed` gets each
    device that the guest gave up, on the main loop; unless it is set, the device is closed and DEVICE_DELETED sent."""

    def __init__(self, bus: PciBus) -> None:
        self.bus = bus
        self.lock = bus.lock
        self.on_event: Callable[[], None] | None = None
        self.on_removed: Callable[[PciDevice], None] | None = None
        self._inserted = self._leaving = 0
        self._asked = 0  # asked to leave and still there

    def attach(self, machine: Machine) -> None:
        machine.ports.attach(layout.PCI_HOTPLUG_PORT, 12, self, "PCI hot-plug")

    def plug(self, device: PciDevice, slot: int | None = None) -> None:
        """Add a device to a machine that runs. OperationUnsupported if its kind cannot be plugged."""
        if not device.hotpluggable:
            raise OperationUnsupported(f"{device.name}: a device of kind {device.kind} cannot be plugged")
        with self.lock:
            self.bus.add(device, slot, assign=False)
            self._inserted |= 1 << device.slot
        self._notify()

    def request_unplug(self, device: PciDevice) -> None:
        """Ask the guest to give a device up. It may take its time, or refuse by doing nothing.

        NotFound if it is not there, OperationInvalid if the guest was asked before and has not answered yet.
        """
        if not device.hotpluggable:
            raise OperationUnsupported(f"{device.name}: a device of kind {device.kind} cannot be unplugged")
        with self.lock:
            if self.bus.devices.get((device.slot, device.function)) is not device:
                raise NotFound(f"{device.name} is not on the PCI bus")
            bit = 1 << device.slot
            if self._leaving & bit:  # once the guest has read it and does nothing, asking again is all that can be done
                raise OperationInvalid(f"{device.name}: the guest has been asked already and did not look yet")
            self._leaving |= bit
            self._asked |= bit
        self._notify()

    def _notify(self) -> None:
        if self.on_event is not None:
            self.on_event()

    def read(self, offset: int, size: int) -> int:
        value = 0
        if size == 4 and offset == 0:
            value, self._inserted = self._inserted, 0
        elif size == 4 and offset == 4:
            value, self._leaving = self._leaving, 0
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 4 and offset == 8:
            for slot in range(SLOTS):
                if value >> slot & 1:
                    self._eject(slot)

    def _eject(self, slot: int) -> None:
        leaving = [device for (at, _), device in self.bus.devices.items() if at == slot]
        if any(not device.hotpluggable for device in leaving):
            return
        bit = 1 << slot
        self._asked, self._inserted, self._leaving = self._asked & ~bit, self._inserted & ~bit, self._leaving & ~bit
        loop = self.bus.machine.loop
        for device in leaving:
            self.bus.forget(device)  # at once: the guest looks whether it is gone
            loop.call_soon(self._removal(device))

    def _removal(self, device: PciDevice) -> Callable[[], None]:
        return lambda: self._removed(device)

    def _removed(self, device: PciDevice) -> None:
        if self.on_removed is not None:
            self.on_removed(device)
            return
        machine = self.bus.machine
        if device.name in machine.devices:  # else somebody took it away meanwhile
            machine.remove(device.name)
        machine.emit("DEVICE_DELETED", {"device": device.name, "path": f"/machine/peripheral/{device.name}"})

    def reset(self) -> None:
        """Power-on: what was asked to leave leaves, as on every hypervisor; what was new is simply there."""
        self._inserted = self._leaving = 0
        for slot in range(SLOTS):
            if self._asked >> slot & 1:
                self._eject(slot)

    def state(self) -> State:
        return {"inserted": self._inserted, "leaving": self._leaving, "asked": self._asked}

    def restore(self, state: State) -> None:
        self._inserted, self._leaving, self._asked = state["inserted"], state["leaving"], state["asked"]
