"""The firmware's tick and its power management registers."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from kvik.vmm.devices.piix4_pm import FREQUENCY, Piix4Pm
from kvik.vmm.devices.pit import MASKED, Pit
from kvik.vmm.layout import PIT_PORT, PM_PORT
from unit.vmm.devices.machine import FakeMachine


class Clock:
    """Timers that a test fires."""

    def __init__(self) -> None:
        self.due: list[tuple[float, Any]] = []

    def call_soon(self, callback: Any) -> None:
        callback()

    def call_later(self, seconds: float, callback: Any) -> Any:
        entry = seconds, callback
        self.due.append(entry)
        return SimpleNamespace(cancel=lambda: entry in self.due and self.due.remove(entry))

    def fire(self) -> float:
        """The one timer that there is; how long it was set for."""
        ((seconds, callback),) = self.due
        self.due.clear()
        callback()
        return seconds


class Guest:
    def __init__(self) -> None:
        self.machine = FakeMachine()
        self.machine.loop = self.clock = Clock()
        self.pic = bytearray(16)
        self.machine.vm = SimpleNamespace(irqchip=lambda chip: bytes(self.pic))
        self.pit = Pit()
        self.pit.attach(self.machine)

    def program(self, mode: int, count: int) -> None:
        self.machine.ports.write(PIT_PORT + 3, 1, 0x30 | mode << 1)
        self.machine.ports.write(PIT_PORT, 1, count & 0xFF)
        self.machine.ports.write(PIT_PORT, 1, count >> 8)

    @property
    def ticks(self) -> int:
        return self.machine.lines[0].rises


def test_a_repeating_mode_ticks_and_one_shot_ticks_once() -> None:
    guest = Guest()
    guest.program(3, 11932)
    assert guest.clock.fire() == pytest.approx(0.01, rel=1e-3) and guest.ticks == 1
    assert guest.clock.fire() == pytest.approx(0.01, rel=1e-3) and guest.ticks == 2
    guest.program(0, 0)  # 65536
    assert guest.clock.fire() == pytest.approx(0.0549, rel=1e-2) and guest.ticks == 3
    assert not guest.clock.due


def test_a_tick_waits_until_the_one_before_has_been_dealt_with() -> None:
    guest = Guest()
    guest.program(2, 11932)
    guest.clock.fire()
    guest.pic[3] = 1  # in service
    guest.clock.fire()
    assert guest.clock.fire() < 0.005 and guest.ticks == 1
    guest.pic[3] = 0
    guest.clock.fire()
    assert guest.ticks == 1  # it may be on its way back
    guest.clock.fire()
    assert guest.ticks == 2


def test_a_masked_line_costs_a_look_now_and_then() -> None:
    guest = Guest()
    guest.program(2, 11932)
    guest.pic[2] = 1
    guest.clock.fire()
    assert guest.clock.fire() == MASKED and guest.ticks == 0
    guest.pic[2] = 0
    guest.clock.fire()
    assert guest.ticks == 1


def test_it_is_never_faster_than_a_thousand_ticks_a_second() -> None:
    guest = Guest()
    guest.program(2, 1)
    assert guest.clock.fire() == 0.001


def test_a_control_word_stops_it_until_a_count_is_there_and_pause_holds_it() -> None:
    guest = Guest()
    guest.program(2, 11932)
    guest.machine.ports.write(PIT_PORT + 3, 1, 0x34)
    guest.clock.fire()
    assert guest.ticks == 0 and not guest.clock.due
    guest.program(2, 11932)
    guest.pit.pause()
    assert not guest.clock.due
    guest.pit.resume()
    guest.clock.fire()
    assert guest.ticks == 1


def test_the_count_is_read_low_byte_first_and_latched() -> None:
    guest = Guest()
    guest.program(2, 0x1234)
    guest.machine.ports.write(PIT_PORT + 3, 1, 0)  # latch channel 0
    low, high = (guest.machine.ports.read(PIT_PORT, 1) for _ in range(2))
    assert 0 < (high << 8 | low) <= 0x1234


def test_a_restored_timer_goes_on() -> None:
    guest, other = Guest(), Guest()
    guest.program(2, 11932)
    other.pit.restore(guest.pit.state())
    other.pit.resume()
    other.clock.fire()
    assert other.ticks == 1
    with pytest.raises(ValueError):
        other.pit.restore({"channels": [[0]], "running": True})


def test_the_pm_timer_counts_and_the_guest_powers_off_by_the_control_register() -> None:
    machine = FakeMachine()
    device = Piix4Pm()
    device.attach(machine)
    first = machine.ports.read(PM_PORT + 8, 4)
    time.sleep(0.01)
    passed = machine.ports.read(PM_PORT + 8, 4) - first & 0xFFFFFF
    assert passed >= FREQUENCY // 100
    machine.ports.write(PM_PORT + 4, 2, 1)
    assert machine.ports.read(PM_PORT + 4, 2) == 1 and not machine.calls
    machine.ports.write(PM_PORT + 4, 2, 1 << 13 | 5 << 10 | 1)  # another sleep
    assert not machine.calls
    machine.ports.write(PM_PORT + 4, 2, 1 << 13 | 1)
    assert machine.calls == ["hold", "shutdown guest-shutdown"]
    other = Piix4Pm()
    other.restore(device.state())
    assert other.read(4, 2) == 1 and 0 <= other.started - device.started < 1_000_000_000  # ns: it goes on from there
