"""auto-converge: a guest that writes faster than it can be sent is slowed down until a migration keeps up.

As QEMU does it (migration/ram.c, softmmu/cpu-throttle.c): when a round leaves more than half of what was sent in it to
be sent again, for the second time, its vCPUs sleep for a part of the time, and for more of it each further time.
"""

from __future__ import annotations

from kvik.vmm.vcpu import SLEEP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.loop import Timer
    from kvik.vmm.machine import Machine

__all__ = ["Throttle"]

PERIOD = 0.05  # seconds of a turn: running, then asleep


class Throttle:
    """Belongs to the machine's thread. `percentage` of the time its vCPUs sleep, 0: never."""

    def __init__(self, machine: Machine, initial: int, increment: int, most: int) -> None:
        self.machine, self.initial, self.increment, self.most = machine, initial, increment, most
        self.percentage = 0
        self._too_much = 0  # rounds
        self._timer: Timer | None = None

    def round_done(self, sent: int, dirty: int) -> None:
        """A round sent so many bytes, and so many were written meanwhile."""
        if 2 * dirty <= sent:
            return
        self._too_much += 1
        if self._too_much >= 2:
            self._too_much = 0
            self.percentage = min(self.percentage + self.increment if self.percentage else self.initial, self.most)
            if self._timer is None:
                self._sleep()

    def _sleep(self) -> None:
        for thread in self.machine.vcpus:
            thread.ask_to_park(SLEEP)
        self._timer = self.machine.loop.call_later(PERIOD * self.percentage / 100, self._wake)

    def _wake(self) -> None:
        self._unpark()
        self._timer = self.machine.loop.call_later(PERIOD * (100 - self.percentage) / 100, self._sleep)

    def _unpark(self) -> None:
        for thread in self.machine.vcpus:
            thread.unpark(SLEEP)

    def stop(self) -> None:
        """At full speed again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._unpark()
