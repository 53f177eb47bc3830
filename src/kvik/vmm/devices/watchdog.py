"""A watchdog: Intel's 6300ESB, which every distribution's kernel drives (i6300esb.ko).

Two timers in a row: the driver has to ping before both have run out. Registers as in the 6300ESB I/O controller hub's
data sheet (Intel 300641-004), chapter 18. The action when it fires is the configuration's, as in QEMU and libvirt.
"""

from __future__ import annotations

import time

from kvik.errors import InvalidArgument
from kvik.vmm.pci.device import Bar, PciDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State
    from kvik.vmm.loop import Timer
    from kvik.vmm.machine import Machine

__all__ = ["ACTIONS", "Watchdog"]

ACTIONS = ("reset", "shutdown", "poweroff", "pause", "none", "inject-nmi")

CONFIG, LOCK = 0x60, 0x68  # configuration space, 16 and 8 bits
CONFIG_BITS = 0x0027
CONFIG_NO_REBOOT, CONFIG_1MHZ = 1 << 5, 1 << 2
LOCK_LOCKED, LOCK_ENABLE, LOCK_FREE_RUN = 1 << 0, 1 << 1, 1 << 2
TIMER_1, TIMER_2, INTERRUPT_STATUS, RELOAD = 0x0, 0x4, 0x8, 0xC  # BAR 0
RELOAD_PING, RELOAD_TIMEOUT = 1 << 8, 1 << 9
UNLOCK = (0x80, 0x86)  # written to RELOAD, byte by byte, before each write to a register
PRELOAD_MAX = 0xFFFFF
PCI_CLOCK = 33_000_000  # Hz; divided by 2^15 or 2^5


class Watchdog(PciDevice):
    """`action`: one of ACTIONS."""

    kind = "i6300esb"
    vendor, device_id, class_code = 0x8086, 0x25AB, 0x088000
    bars = (Bar(0, 16),)

    def __init__(self, name: str, action: str = "reset") -> None:
        if action not in ACTIONS:
            raise InvalidArgument(f"{name}: a watchdog's action is one of {', '.join(ACTIONS)}, not {action!r}")
        self.action = action
        self.fired = 0
        self.timed_out = False  # told by RELOAD after the reset that it caused
        self._machine: Machine | None = None
        self._timer: Timer | None = None
        self._left = 0.0  # seconds, while paused
        self._queued = False
        super().__init__(name)

    def add_capabilities(self) -> None:
        self.config.set(CONFIG, 2, 0, CONFIG_BITS)
        self.config.set(LOCK, 1, 0, LOCK_LOCKED | LOCK_ENABLE | LOCK_FREE_RUN)

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self._machine = machine

    def reset(self) -> None:
        super().reset()
        self.preload = [PRELOAD_MAX, PRELOAD_MAX]
        self.stage = 0  # 1 or 2: which timer runs; 0: none
        self._unlocked = 0
        self._lock = 0
        self._stop()

    def close(self) -> None:
        self._stop()
        self._machine = None
        super().close()

    # Registers ---------------------------------------------------------------------------------------------------

    def config_written(self, offset: int, size: int) -> None:
        if not offset <= LOCK < offset + size:
            return
        if self._lock & LOCK_LOCKED:  # until the next reset nothing turns it off
            self.config.put(LOCK, 1, self._lock)
            return
        before, self._lock = self._lock, self.config.get(LOCK, 1)
        if self._lock & LOCK_ENABLE and not before & LOCK_ENABLE:
            self._start_soon(1)
        elif not self._lock & LOCK_ENABLE:
            self._start_soon(0)

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        return RELOAD_TIMEOUT if offset == RELOAD and size == 2 and self.timed_out else 0

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        if offset == RELOAD and value == UNLOCK[0]:
            self._unlocked = 1
        elif offset == RELOAD and value == UNLOCK[1] and self._unlocked == 1:
            self._unlocked = 2
        elif self._unlocked == len(UNLOCK):
            self._unlocked = 0
            if offset == RELOAD:
                if value & RELOAD_PING and self._lock & LOCK_ENABLE:
                    self._start_soon(1)
                if value & RELOAD_TIMEOUT:
                    self.timed_out = False
            elif offset in (TIMER_1, TIMER_2) and size == 4:
                self.preload[offset // 4] = value & PRELOAD_MAX

    # Timers; they belong to the loop's thread --------------------------------------------------------------------

    def _seconds(self, stage: int) -> float:
        divider = 1 << (5 if self.config.get(CONFIG, 2) & CONFIG_1MHZ else 15)
        return self.preload[stage - 1] * divider / PCI_CLOCK

    def _start_soon(self, stage: int) -> None:
        self.stage = stage
        if self._machine is not None and not self._queued:
            self._queued = True  # once, however often the guest pings meanwhile
            self._machine.loop.call_soon(self._restart)

    def _restart(self) -> None:
        with self.lock:
            self._queued = False
            self._stop()
            if self.stage and self._machine is not None and not self._machine.still:
                self._start(self._seconds(self.stage))
            elif self.stage:
                self._left = self._seconds(self.stage)  # `resume` starts it

    def _start(self, seconds: float) -> None:
        assert self._machine is not None
        self._timer = self._machine.loop.call_later(seconds, self._expired)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._left = 0.0

    def _expired(self) -> None:
        with self.lock:
            self._timer = None
            if self.stage == 1:  # the first stage's interrupt is for systems without ACPI; no driver asks for it
                self.stage = 2
                self._restart()
                return
            fires = not self.config.get(CONFIG, 2) & CONFIG_NO_REBOOT
            self.stage = 1 if self._lock & LOCK_FREE_RUN else 0
            self._restart()
            if fires:
                self.fired += 1
                self.timed_out = True
        if fires:
            self._act()

    def _act(self) -> None:
        """On the loop's thread, without the lock: the machine's methods stop vCPUs that may wait for it."""
        machine = self._machine
        if machine is None:
            return
        machine.emit("WATCHDOG", {"action": self.action})
        machine.log(f"watchdog {self.name} fired: {self.action}")
        if self.action == "reset":
            machine.reset("guest-reset")
        elif self.action == "shutdown":
            machine.powerdown()
        elif self.action == "poweroff":
            machine.quit("guest-shutdown")
        elif self.action == "pause":
            machine.pause("watchdog")
        elif self.action == "inject-nmi":
            for thread in machine.vcpus:
                thread.vcpu.nmi()

    def pause(self) -> None:
        """A guest that stands still cannot ping: the time left is kept."""
        with self.lock:
            if self._timer is not None and self._machine is not None:
                left = max(self._timer.due - time.monotonic(), 0.0)
                self._stop()
                self._left = left

    def resume(self) -> None:
        with self.lock:
            if self.stage and self._timer is None and self._machine is not None:
                left, self._left = self._left, 0.0
                self._start(left)

    # State -------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """`left` in ms, of the stage that runs; taken while the machine is paused."""
        return super().state() | {
            "preload": list(self.preload),
            "stage": self.stage,
            "unlocked": self._unlocked,
            "lock": self._lock,
            "timed_out": self.timed_out,
            "left": round(self._left * 1000),
        }

    def restore(self, state: State) -> None:
        super().restore(state)
        first, second = state["preload"]
        self._stop()
        self.preload = [int(first) & PRELOAD_MAX, int(second) & PRELOAD_MAX]
        self.stage = min(max(int(state["stage"]), 0), 2)
        self._unlocked = min(max(int(state["unlocked"]), 0), 2)
        self._lock = int(state["lock"]) & 7
        self.timed_out = bool(state["timed_out"])
        self._left = max(int(state["left"]) / 1000, 0.0)
        if self._machine is not None:
            self._machine.loop.call_soon(self._restored)

    def _restored(self) -> None:
        if self._machine is not None and not self._machine.still:
            self.resume()

    def stats(self) -> dict[str, int]:
        return {"fired": self.fired}
