"""The PIIX4's power management registers, for UEFI firmware: a timer to wait by, and a way to power off.

An operating system does not use them: the tables call the machine hardware-reduced, and have no SCI. It powers off
through the firmware, which writes here. Source: Intel 82371AB (290562), 7.4: PM I/O registers; ACPI 6.5, 4.8.3.
"""

from __future__ import annotations

from time import monotonic_ns

from kvik.vmm.device import PortDevice
from kvik.vmm.layout import PM_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State
    from kvik.vmm.machine import Machine

__all__ = ["Piix4Pm"]

STATUS, ENABLE, CONTROL, TIMER = 0, 2, 4, 8
SCI_EN, SLP_EN, SLP_TYP = 1 << 0, 1 << 13, 7 << 10
SOFT_OFF = 0  # SLP_TYP's value for soft off (7.4, PMCNTRL)
FREQUENCY = 3_579_545  # Hz
TIMER_BITS = (1 << 24) - 1
SECOND = 1_000_000_000


class Piix4Pm(PortDevice):
    """Status and enable bits are always 0: nothing here raises an event."""

    kind, base, size = "piix4-pm-registers", PM_PORT, 0x40

    def __init__(self, name: str = "piix4-pm") -> None:
        self.machine: Machine | None = None
        self.started = monotonic_ns()
        super().__init__(name)

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self.machine = machine

    def reset(self) -> None:
        self.control = 0

    def ticks(self) -> int:
        """The timer: 24 bits that count up, at FREQUENCY, whatever the guest does."""
        return (monotonic_ns() - self.started) * FREQUENCY // SECOND & TIMER_BITS

    def read(self, offset: int, size: int) -> int:
        if offset == TIMER:
            return self.ticks()
        return self.control if offset == CONTROL else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset != CONTROL or size < 2:
            return
        self.control = value & (SCI_EN | SLP_TYP)  # SLP_EN always reads 0
        if value & SLP_EN and value & SLP_TYP == SOFT_OFF and self.machine is not None:
            self.machine.hold_caller()
            self.machine.request_shutdown("guest-shutdown")

    def state(self) -> State:
        return {"control": self.control, "elapsed": monotonic_ns() - self.started}

    def restore(self, state: State) -> None:
        self.control = int(state["control"]) & (SCI_EN | SLP_TYP)
        self.started = monotonic_ns() - int(state["elapsed"])
