"""What a device is, and the two simplest kinds: registers behind ports, registers in memory.

A device never knows what carries it further: not which thread calls it, not how its interrupt reaches the guest. It
claims what it needs when it is attached to a machine, and gives all of it back when it is closed.

    class Scratch(PortDevice):
        kind, base, size = "scratch", 0x5F0, 4

        def reset(self) -> None:
            self.value = 0

        def read(self, offset: int, size: int) -> int:
            return self.value >> 8 * offset

        def write(self, offset: int, size: int, value: int) -> None:
            self.value = value

        def state(self) -> State:
            return {"value": self.value}

        def restore(self, state: State) -> None:
            self.value = state["value"]

    machine.add(Scratch("scratch0"))

docs/guide/devices.md has five complete ones.
"""

from __future__ import annotations

import _thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.vmm.bus import Bus
    from kvik.vmm.machine import Machine

    State = dict[str, Any]  # of int, str, bytes, bool, None, list, dict: what msgpack can carry

__all__ = ["Device", "MmioDevice", "PortDevice"]


class Device:
    """Base of all devices. `name` is unique in its machine; `kind` says what it is."""

    kind = "device"

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = _thread.RLock()  # held by the bus around reads and writes; take it where other threads come in
        self.reset()

    def attach(self, machine: Machine) -> None:
        """Claim what is needed of the machine. Called once."""

    def reset(self) -> None:
        """Back to how it is at power-on. Called when made, and with all vCPUs stopped."""

    def state(self) -> State:
        """All that the guest can see of the device or relies on. Called while the machine is paused."""
        return {}

    def restore(self, state: State) -> None:
        """Become what `state()` told; the machine is paused. What is malformed raises ValueError or KeyError."""

    def pause(self) -> None:
        """Finish or hold what the host does for the device, so that memory and state stand still."""

    def resume(self) -> None:
        """Go on after `pause`."""

    def close(self) -> None:
        """Give everything back. May be called twice, and on a device that was never attached."""

    def stats(self) -> dict[str, int]:
        """Counters since the machine's start."""
        return {}

    def read(self, offset: int, size: int) -> int:
        """What the guest reads `size` bytes at `offset` from the device's base."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes."""


class _BusDevice(Device):
    """Registers at a fixed place of a bus."""

    base = 0
    size = 0

    def __init__(self, name: str, base: int | None = None) -> None:
        if base is not None:
            self.base = base
        self._bus: Bus | None = None
        super().__init__(name)

    def _claim(self, bus: Bus) -> None:
        bus.attach(self.base, self.size, self, self.name)
        self._bus = bus

    def close(self) -> None:
        if self._bus is not None:
            self._bus.detach(self.base)
            self._bus = None


class PortDevice(_BusDevice):
    """A device behind I/O ports."""

    def attach(self, machine: Machine) -> None:
        self._claim(machine.ports)


class MmioDevice(_BusDevice):
    """A device behind guest-physical addresses that are no RAM."""

    def attach(self, machine: Machine) -> None:
        self._claim(machine.mmio)
