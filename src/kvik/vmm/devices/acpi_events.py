"""The ACPI registers: sleep and reset, pending events of the generic event device, CPU hot-plug.

The guest's side is AML in `acpi.dsdt` and the FADT (ACPI 6.5: 4.8.3.7 sleep registers, 4.8.3.6 reset register, 5.6.9
GED). One level interrupt, ACPI_GSI, is up as long as an event is pending; reading the events takes them.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument, OperationInvalid
from kvik.vmm.acpi.dsdt import (
    CPU_EJECT,
    CPU_HOTPLUG,
    CPU_INSERTED,
    CPU_PRESENT,
    CPU_REMOVING,
    POWER_BUTTON,
    SLEEP_BUTTON,
)
from kvik.vmm.acpi.fadt import RESET_VALUE, S5_SLEEP_TYPE
from kvik.vmm.device import PortDevice
from kvik.vmm.layout import ACPI_GSI, ACPI_PORT, CPU_HOTPLUG_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.vmm.device import State
    from kvik.vmm.interrupts import Line
    from kvik.vmm.machine import Machine

__all__ = ["AcpiEvents", "CpuHotplug"]

SLEEP_CONTROL, SLEEP_STATUS, RESET, EVENTS = 0, 1, 2, 4
SLP_EN, SLP_TYP_SHIFT = 1 << 5, 2
WAK_STS = 1 << 7
NONE = 0xFFFFFFFF


class AcpiEvents(PortDevice):
    """Sleep, reset and event registers. `raise_event` may be called from any thread."""

    kind, base, size = "acpi-events", ACPI_PORT, 8

    def __init__(self, name: str = "acpi") -> None:
        self.line: Line | None = None
        self.machine: Machine | None = None
        super().__init__(name)

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self.machine = machine
        self.line = machine.interrupts.line(ACPI_GSI)
        machine.power_button = self.press_power_button

    def reset(self) -> None:
        self.pending = 0
        self.status = 0
        self._update()

    def _update(self) -> None:
        if self.line is not None:
            self.line.set(bool(self.pending))

    def raise_event(self, bit: int) -> None:
        """Make an event pending (`acpi.dsdt` has the bits)."""
        with self.lock:
            self.pending |= bit
            self._update()

    def press_power_button(self) -> None:
        self.raise_event(POWER_BUTTON)

    def press_sleep_button(self) -> None:
        self.raise_event(SLEEP_BUTTON)

    def read(self, offset: int, size: int) -> int:
        if offset == EVENTS:
            taken, self.pending = self.pending, 0
            self._update()
            return taken
        if offset == SLEEP_STATUS:
            return self.status
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        machine = self.machine
        if offset == SLEEP_STATUS:
            self.status &= ~(value & WAK_STS)  # written as 1 to clear
        if machine is None:
            return
        if offset == SLEEP_CONTROL and value & SLP_EN and value >> SLP_TYP_SHIFT & 7 == S5_SLEEP_TYPE:
            machine.hold_caller()
            machine.request_shutdown("guest-shutdown")
        elif offset == RESET and value == RESET_VALUE:
            machine.hold_caller()
            machine.request_reset("guest-reset")

    def state(self) -> State:
        return {"pending": self.pending, "status": self.status}

    def restore(self, state: State) -> None:
        self.pending, self.status = int(state["pending"]), int(state["status"])
        self._update()


class CpuHotplug(PortDevice):
    """Which processors are there, which came, which shall go. Registers of 32 bits: select, state, next with an event.

    `present[i]` tells of processor i. `on_eject(index)` is called, on a vCPU's thread, when the guest has let one go.
    """

    kind, base, size = "acpi-cpu-hotplug", CPU_HOTPLUG_PORT, 12

    def __init__(self, events: AcpiEvents, count: int, maximum: int, name: str = "cpu-hotplug") -> None:
        self.events = events
        self.present = [index < count for index in range(maximum)]
        self.on_eject: Callable[[int], None] | None = None
        super().__init__(name)

    def reset(self) -> None:
        # What is there stays there: a reset unplugs nothing.
        self.selected = 0
        self.inserted: set[int] = set()
        self.removing: set[int] = set()

    def plug(self, index: int) -> None:
        """Processor `index` is there now: its vCPU exists and waits for the guest to start it."""
        with self.lock:
            if not 0 <= index < len(self.present):
                raise InvalidArgument(
                    f"the machine has no place for processor {index}", remedy=f"at most {len(self.present)} processors"
                )
            if self.present[index]:
                raise OperationInvalid(f"processor {index} is there already")
            self.present[index] = True
            self.inserted.add(index)
        self.events.raise_event(CPU_HOTPLUG)

    def request_unplug(self, index: int) -> None:
        """Ask the guest to let a processor go; `on_eject` tells when it has."""
        with self.lock:
            if not 0 < index < len(self.present) or not self.present[index]:
                raise OperationInvalid(
                    f"processor {index} cannot be taken away", remedy="any but the first that is there can"
                )
            self.removing.add(index)
        self.events.raise_event(CPU_HOTPLUG)

    def read(self, offset: int, size: int) -> int:
        if offset == 4:
            index = self.selected
            if index >= len(self.present):
                return 0
            state = CPU_PRESENT if self.present[index] else 0
            state |= CPU_INSERTED if index in self.inserted else 0
            return state | (CPU_REMOVING if index in self.removing else 0)
        if offset == 8:
            return min(self.inserted | self.removing, default=NONE)
        return self.selected if offset == 0 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        index = self.selected
        if offset == 0:
            self.selected = value
        elif offset == 4 and index < len(self.present):
            if value & CPU_INSERTED:
                self.inserted.discard(index)
            if value & CPU_REMOVING:
                self.removing.discard(index)
            if value & CPU_EJECT and index and self.present[index]:
                self.present[index] = False
                if self.on_eject is not None:
                    self.on_eject(index)

    def state(self) -> State:
        return {
            "present": [int(there) for there in self.present],
            "selected": self.selected,
            "inserted": sorted(self.inserted),
            "removing": sorted(self.removing),
        }

    def restore(self, state: State) -> None:
        present = [bool(there) for there in state["present"]]
        if len(present) != len(self.present):
            raise ValueError(f"{len(present)} processors in the state, {len(self.present)} in the machine")
        self.present, self.selected = present, int(state["selected"])
        self.inserted, self.removing = set(state["inserted"]), set(state["removing"])
