"""An MMIO device with an interrupt: a timer that raises IOAPIC pin 10 every so many microseconds.

offset 0  period in microseconds, 0 stops it      4  read: ticks since the last read, which lowers the interrupt
"""

from typing import Any

from kvik.vmm.device import MmioDevice
from kvik.vmm.interrupts import Line
from kvik.vmm.loop import Timer
from kvik.vmm.machine import Machine

SHORTEST = 100  # microseconds: the guest must not keep the host's CPU busy


class Metronome(MmioDevice):
    kind, base, size = "metronome", 0xFEB8_0000, 8
    gsi = 10

    def __init__(self, name: str) -> None:
        self.line: Line | None = None
        self.timer: Timer | None = None
        super().__init__(name)

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self.loop = machine.loop
        self.line = machine.interrupts.line(self.gsi)

    def reset(self) -> None:
        self.period = self.ticks = 0
        self._update()

    def _update(self) -> None:
        """The pin is up as long as there are ticks that nobody has read."""
        if self.line is not None:
            self.line.set(self.ticks > 0)

    def read(self, offset: int, size: int) -> int:
        if offset == 0:
            return self.period
        ticks, self.ticks = self.ticks, 0
        self._update()
        return ticks

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 4:
            self.period = max(value, SHORTEST) if value else 0
            self.loop.call_soon(self._wind)  # from a vCPU's thread: timers belong to the loop's

    def _wind(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.period:
            self.timer = self.loop.call_later(self.period / 1e6, self._tick)

    def _tick(self) -> None:
        with self.lock:  # `read` comes on vCPUs' threads
            self.timer = None
            self.ticks += 1
            self._update()
            self._wind()

    def pause(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def resume(self) -> None:
        self._wind()

    def state(self) -> dict[str, Any]:
        return {"period": self.period, "ticks": self.ticks}

    def restore(self, state: dict[str, Any]) -> None:
        self.period, self.ticks = int(state["period"]), int(state["ticks"])
        self._update()

    def close(self) -> None:
        self.pause()
        super().close()
