"""pvpanic: the guest's kernel tells that it panicked (QEMU's docs/specs/pvpanic.rst; Linux's drivers/misc/pvpanic).

One port. A read tells which events are known, a write tells of one. What a panic does to the machine is the
configuration's `on_panic`.
"""

from __future__ import annotations

from kvik.vmm.device import PortDevice
from kvik.vmm.layout import PVPANIC_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State
    from kvik.vmm.machine import Machine

__all__ = ["Pvpanic"]

PANICKED, CRASH_LOADED, SHUTDOWN = 1, 2, 4
EVENTS = PANICKED | CRASH_LOADED | SHUTDOWN


class Pvpanic(PortDevice):
    """Tells each event once between resets, however often the guest does."""

    kind, base, size = "pvpanic", PVPANIC_PORT, 1

    def __init__(self, name: str = "pvpanic") -> None:
        self.machine: Machine | None = None
        self.panics = 0
        self._told = 0
        super().__init__(name)

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self.machine = machine

    def reset(self) -> None:
        self._told = 0

    def read(self, offset: int, size: int) -> int:
        return EVENTS

    def write(self, offset: int, size: int, value: int) -> None:
        news = value & EVENTS & ~self._told
        if self.machine is None or not news:
            return
        self._told |= news
        if news & PANICKED:
            self.panics += 1
            self._panicked(self.machine)
        elif news & CRASH_LOADED:  # the guest boots its own crash kernel: not to be disturbed
            self.machine.emit("GUEST_CRASHLOADED", {"action": "run"})
        elif news & SHUTDOWN:
            self.machine.emit("GUEST_PVSHUTDOWN")
            self.machine.hold_caller()
            self.machine.request_shutdown("guest-shutdown")

    def _panicked(self, machine: Machine) -> None:
        action = machine.config.on_panic
        if action == "none":
            machine.emit("GUEST_PANICKED", {"action": "run"})
            return
        machine.hold_caller()
        if action == "pause":
            machine.request_stop("guest-panicked", "GUEST_PANICKED", {"action": "pause"})
            return
        if action == "exit-failure":
            machine.exit_code = 1
        machine.emit("GUEST_PANICKED", {"action": "poweroff"})
        machine.request_shutdown("guest-panic")

    def state(self) -> State:
        return {"told": self._told}

    def restore(self, state: State) -> None:
        self._told = int(state["told"]) & EVENTS

    def stats(self) -> dict[str, int]:
        return {"panics": self.panics}
