"""The clock tick of UEFI firmware that does not take the local APIC's: channel 0 of an 8254 timer (Intel 231164), wired
to the first 8259's IRQ 0.

In user mode and not KVM's, for two reasons. An operating system on a hardware-reduced machine knows of no 8254 and
leaves it as the firmware had it: KVM's would tick for ever, this one looks now and then whether IRQ 0 is still
masked. And a tick waits here until the one before has been dealt with, and is not made up for: firmware asks for
100 a second and counts time by none of them, so on a slow host late ones would only keep it from its work.

The other channels remember what they were set to, and count nothing.
"""

from __future__ import annotations

from time import monotonic_ns

from kvik.kvm.constants import Irqchip
from kvik.vmm.device import PortDevice
from kvik.vmm.layout import PIT_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State
    from kvik.vmm.interrupts import Line
    from kvik.vmm.loop import Timer
    from kvik.vmm.machine import Machine

__all__ = ["Pit"]

FREQUENCY = 1_193_182  # Hz
CONTROL = 3
LATCH, LOW_BYTE, HIGH_BYTE, BOTH = range(4)  # access, bits 5:4 of the control word
RATE_GENERATOR, SQUARE_WAVE = 2, 3  # modes that repeat
READ_BACK = 3  # "channel" of the control word
IRQ_0 = 1 << 0
IMR, ISR = 2, 3  # offsets in struct kvm_pic_state: interrupts masked, in service
FASTEST = 0.001  # seconds between ticks that we are willing to give, and between looks whether one is dealt with
MASKED = 0.25  # seconds between looks at a line that is masked
SECOND = 1_000_000_000


class _Channel:
    __slots__ = ("access", "count", "latched", "low", "mode", "second", "started")

    def __init__(self) -> None:
        self.access, self.mode, self.count = BOTH, 0, 0
        self.low = -1  # the first byte of two that the guest writes; -1: none yet
        self.latched = -1
        self.second = False  # the next byte read is the high one
        self.started = monotonic_ns()

    def now(self) -> int:
        """The count, of 16 bits."""
        full = self.count or 0x10000
        passed = (monotonic_ns() - self.started) * FREQUENCY // SECOND
        return full - passed % full if self.mode in (RATE_GENERATOR, SQUARE_WAVE) else max(full - passed, 0)

    def values(self) -> list[int]:
        return [self.access, self.mode, self.count, self.low, self.latched, int(self.second)]


class Pit(PortDevice):
    kind, base, size = "i8254", PIT_PORT, 4

    def __init__(self, name: str = "pit") -> None:
        self.machine: Machine | None = None
        self.line: Line | None = None
        self.ticks = 0
        self._timer: Timer | None = None
        self._arming = False
        super().__init__(name)

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self.machine = machine
        self.line = machine.interrupts.line(0)

    def reset(self) -> None:
        self.channels = [_Channel() for _ in range(3)]
        self.running = False  # channel 0 was given a count
        self._waiting = False  # a tick waits for the one before
        self.pause()

    def pause(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def resume(self) -> None:
        self._arm()

    def close(self) -> None:
        super().close()
        self.pause()

    # The guest's side --------------------------------------------------------------------------------------------

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == CONTROL:
            self._control(value)
            return
        channel = self.channels[offset]
        if channel.access == BOTH and channel.low < 0:
            channel.low = value
            return
        if channel.access == BOTH:
            channel.count, channel.low = channel.low | value << 8, -1
        else:
            channel.count = value << 8 if channel.access == HIGH_BYTE else value
        channel.started = monotonic_ns()
        if offset == 0:
            self.running, self._waiting = True, False
            if self.machine is not None and not self._arming:  # timers belong to the loop's thread
                self._arming = True
                self.machine.loop.call_soon(self._arm)

    def _control(self, value: int) -> None:
        if value >> 6 == READ_BACK:
            return
        channel = self.channels[value >> 6]
        access = value >> 4 & 3
        if access == LATCH:
            channel.latched = channel.now() & 0xFFFF
            return
        channel.access, channel.mode = access, value >> 1 & 7
        if channel.mode > 5:  # bit 2 of modes 2 and 3 is of no meaning
            channel.mode -= 4
        channel.low, channel.latched, channel.second = -1, -1, False
        if channel is self.channels[0]:
            self.running = False  # until a count is written

    def read(self, offset: int, size: int) -> int:
        if offset == CONTROL:
            return 0xFF
        channel = self.channels[offset]
        value = channel.latched if channel.latched >= 0 else channel.now() & 0xFFFF
        high = channel.second if channel.access == BOTH else channel.access == HIGH_BYTE
        if channel.access == BOTH:
            channel.second = not channel.second
        if high or channel.access != BOTH:
            channel.latched = -1
        return value >> 8 if high else value & 0xFF

    # Ticks: on the loop's thread -----------------------------------------------------------------------------------

    @property
    def period(self) -> float:
        """Seconds between ticks."""
        return max((self.channels[0].count or 0x10000) / FREQUENCY, FASTEST)

    def _arm(self) -> None:
        with self.lock:
            self._arming = False
            self.pause()
            if self.running and self._bus is not None:
                self._in(self.period)

    def _in(self, seconds: float) -> None:
        assert self.machine is not None
        self._timer = self.machine.loop.call_later(seconds, self._tick)

    def _tick(self) -> None:
        with self.lock:
            self._timer = None
            if not self.running or self.machine is None or self.line is None:
                return
            pic = self.machine.vm.irqchip(Irqchip.PIC_MASTER)
            if pic[IMR] & IRQ_0:
                self._in(MASKED)
            elif pic[ISR] & IRQ_0 or self._waiting:
                # Once more after it was over: the guest may still be on its way back from there.
                self._waiting = bool(pic[ISR] & IRQ_0)
                self._in(FASTEST)
            else:
                self.line.pulse()
                self.ticks += 1
                if self.channels[0].mode in (RATE_GENERATOR, SQUARE_WAVE):
                    self._in(self.period)
                else:
                    self.running = False

    # State -----------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        return {"ticks": self.ticks}

    def state(self) -> State:
        return {"channels": [channel.values() for channel in self.channels], "running": self.running}

    def restore(self, state: State) -> None:
        saved = [[int(value) for value in values] for values in state["channels"]]
        if len(saved) != len(self.channels) or any(len(values) != 6 for values in saved):
            raise ValueError("the timer has three channels of six values")
        for channel, (access, mode, count, low, latched, second) in zip(self.channels, saved, strict=True):
            channel.access, channel.mode, channel.count = access & 3, mode & 7, count & 0xFFFF
            channel.low, channel.latched, channel.second = min(low, 0xFF), min(latched, 0xFFFF), bool(second)
        self.running = bool(state["running"])
