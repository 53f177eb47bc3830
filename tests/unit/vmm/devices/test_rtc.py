"""The CMOS clock, driven as a kernel drives it, with a host clock that the test turns."""

from __future__ import annotations

import calendar
import datetime
import time as real_time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.vmm.devices import rtc
from kvik.vmm.devices.rtc import SECOND, Rtc, days_from_civil
from unit.vmm.devices.machine import FakeMachine

BEGIN = calendar.timegm((2026, 7, 14, 21, 5, 9))  # a Tuesday


class Clock:
    def __init__(self) -> None:
        self.ns = BEGIN * SECOND

    def pass_(self, seconds: float) -> None:
        self.ns += round(seconds * SECOND)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    faked = SimpleNamespace(time_ns=lambda: made.ns, gmtime=real_time.gmtime, localtime=real_time.localtime)
    monkeypatch.setattr(rtc, "time", faked)
    return made


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


@pytest.fixture
def device(clock: Clock, machine: FakeMachine) -> Rtc:
    made = Rtc()
    made.attach(machine)
    return made


def read(machine: FakeMachine, register: int) -> int:
    machine.ports.write(0x70, 1, register)
    return machine.ports.read(0x71, 1)


def write(machine: FakeMachine, register: int, value: int) -> None:
    machine.ports.write(0x70, 1, register | 0x80)
    machine.ports.write(0x71, 1, value)


def flags(machine: FakeMachine) -> int:
    """Register C without the periodic flag, which the divider sets all the time."""
    return read(machine, rtc.C) & ~rtc.PF


def shown(machine: FakeMachine) -> list[int]:
    return [read(machine, register) for register in (rtc.CENTURY, 9, 8, 7, 6, 4, 2, 0)]


def test_the_time_in_bcd_and_24_hours(device: Rtc, machine: FakeMachine) -> None:
    assert shown(machine) == [0x20, 0x26, 0x07, 0x14, 3, 0x21, 0x05, 0x09]
    assert read(machine, rtc.D) == 0x80


def test_the_time_in_binary_and_12_hours(device: Rtc, machine: FakeMachine, clock: Clock) -> None:
    write(machine, rtc.B, rtc.BINARY)
    assert shown(machine) == [20, 26, 7, 14, 3, 9 | 0x80, 5, 9]
    for hour, value in ((0, 12), (1, 1), (11, 11), (12, 12 | 0x80), (13, 1 | 0x80)):
        clock.ns = (BEGIN // 86400 * 86400 + hour * 3600) * SECOND
        assert read(machine, rtc.HOURS) == value


def test_an_update_is_announced_before_it_happens(device: Rtc, machine: FakeMachine, clock: Clock) -> None:
    assert not read(machine, rtc.A) & rtc.UIP
    clock.pass_(1 - 0.000_200)
    assert read(machine, rtc.A) & rtc.UIP and read(machine, 0) == 0x09
    clock.pass_(0.000_200)
    assert not read(machine, rtc.A) & rtc.UIP and read(machine, 0) == 0x10
    assert flags(machine) == rtc.UF and flags(machine) == 0, "reading acknowledges"


def set_time(machine: FakeMachine, when: datetime.datetime) -> None:
    """As Linux's mc146818_set_time does."""
    control, divider = read(machine, rtc.B), read(machine, rtc.A)
    write(machine, rtc.B, control | rtc.SET)
    write(machine, rtc.A, divider | 0x70)
    bcd = lambda value: int(str(value), 16)  # noqa: E731
    for register, value in (
        *((9, when.year % 100), (8, when.month), (7, when.day), (4, when.hour), (2, when.minute), (0, when.second)),
        (rtc.CENTURY, when.year // 100),
    ):
        write(machine, register, bcd(value))
    write(machine, rtc.B, control)
    write(machine, rtc.A, divider)


@given(st.datetimes(min_value=datetime.datetime(1970, 1, 1), max_value=datetime.datetime(2199, 12, 31)))
def test_a_time_that_was_set_is_shown_and_goes_on(when: datetime.datetime) -> None:
    when = when.replace(microsecond=0)
    machine, device = FakeMachine(), Rtc()
    device.attach(machine)
    set_time(machine, when)
    assert device.now() // SECOND == calendar.timegm(when.timetuple())
    machine.loop.close()


def test_a_change_is_told_once(device: Rtc, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtc, "TELL_AFTER", 0)
    set_time(machine, datetime.datetime(2026, 7, 14, 22, 5, 9))
    set_time(machine, datetime.datetime(2026, 7, 14, 23, 5, 9))
    machine.turn()
    assert machine.events == [("RTC_CHANGE", {"offset": 7200})]


def test_while_it_is_set_the_time_stands(device: Rtc, machine: FakeMachine, clock: Clock) -> None:
    write(machine, rtc.B, rtc.SET | rtc.HOUR_24 | rtc.UIE)
    assert not read(machine, rtc.B) & rtc.UIE
    clock.pass_(100)
    assert read(machine, 2) == 0x05 and read(machine, 0) == 0x09 and not read(machine, rtc.A) & rtc.UIP
    assert flags(machine) == 0


def test_the_alarm_rings_on_line_8_until_it_is_acknowledged(device: Rtc, machine: FakeMachine, clock: Clock) -> None:
    for register, value in ((rtc.HOURS_ALARM, 0xC0), (rtc.MINUTES_ALARM, 0x06), (rtc.SECONDS_ALARM, 0x00)):
        write(machine, register, value)
    write(machine, rtc.B, rtc.HOUR_24 | rtc.AIE)
    machine.turn()
    assert device._timer is not None and 50 < device._timer.due - real_time.monotonic() < 52
    clock.pass_(51)
    device._fire()
    assert machine.lines[8].level
    assert flags(machine) == rtc.IRQ | rtc.AF | rtc.UF
    assert not machine.lines[8].level and machine.lines[8].rises == 1


@given(st.integers(0, 86399), *[st.one_of(st.integers(0, limit - 1), st.just(0xC0)) for limit in (24, 60, 60)])
def test_the_next_alarm_is_the_first_that_matches(now: int, hour: int, minute: int, second: int) -> None:
    device = Rtc()
    device.cmos[rtc.B] |= rtc.BINARY
    device.cmos[rtc.HOURS_ALARM], device.cmos[rtc.MINUTES_ALARM] = hour, minute
    device.cmos[rtc.SECONDS_ALARM] = second
    start = 20000 * 86400 + now
    found = device.next_alarm(start * SECOND) // SECOND
    fields = lambda at: ((hour, at // 3600 % 24), (minute, at // 60 % 60), (second, at % 60))  # noqa: E731
    matches = lambda at: all(wanted in (0xC0, value) for wanted, value in fields(at))  # noqa: E731
    assert start < found <= start + 86400 and matches(found)
    probes = {found - step for step in (1, 60, 3600) if found - step > start}
    assert not any(matches(at) for at in probes)


@pytest.mark.parametrize("value", [0x24, 0x60, 0x99, 0xAA])
def test_an_alarm_that_is_no_time_never_rings(device: Rtc, machine: FakeMachine, value: int) -> None:
    write(machine, rtc.HOURS_ALARM, value)
    assert device.next_alarm(device.now()) == -1


def test_the_periodic_interrupt_comes_and_is_not_repeated_unacknowledged(
    device: Rtc, machine: FakeMachine, clock: Clock
) -> None:
    write(machine, rtc.A, rtc.DIVIDER_RUNS | 15)  # 2 Hz
    write(machine, rtc.B, rtc.HOUR_24 | rtc.PIE)
    machine.turn()
    assert device._timer is not None
    clock.pass_(0.5)
    device._fire()
    assert machine.lines[8].level and device._timer is None, "nothing to wait for before it is acknowledged"
    assert read(machine, rtc.C) & (rtc.IRQ | rtc.PF) == rtc.IRQ | rtc.PF
    machine.turn()
    assert device._timer is not None


def test_the_fastest_periodic_rate_does_not_flood_the_host(device: Rtc, machine: FakeMachine) -> None:
    write(machine, rtc.A, rtc.DIVIDER_RUNS | 3)  # 8192 Hz
    write(machine, rtc.B, rtc.HOUR_24 | rtc.PIE)
    for _ in range(1000):
        read(machine, rtc.C)
    assert len(machine.loop._soon) == 1
    machine.loop._call(machine.loop._soon.popleft())
    assert device._timer is not None and device._timer.due - real_time.monotonic() > rtc.FASTEST / 2


def test_memory_is_kept_through_a_reset_and_interrupts_are_off(device: Rtc, machine: FakeMachine) -> None:
    write(machine, 0x40, 0xAB)
    write(machine, rtc.B, rtc.HOUR_24 | rtc.AIE | rtc.PIE | rtc.UIE)
    device.reset()
    assert read(machine, 0x40) == 0xAB and read(machine, rtc.B) == rtc.HOUR_24 and read(machine, 4) == 0x21


def test_a_restored_clock_goes_on(device: Rtc, machine: FakeMachine, clock: Clock) -> None:
    set_time(machine, datetime.datetime(2001, 2, 3, 4, 5, 6))
    write(machine, 0x50, 7)
    state = device.state()
    clock.pass_(10)
    other, second = Rtc("other"), FakeMachine()
    other.attach(second)
    other.restore(state)
    assert shown(second)[:4] == [0x20, 0x01, 0x02, 0x03] and read(second, 0) == 0x16 and read(second, 0x50) == 7
    for broken in ({**state, "cmos": b"short"}, {"cmos": state["cmos"]}):
        with pytest.raises((ValueError, KeyError)):
            other.restore(broken)


def test_the_clock_can_begin_anywhere(clock: Clock) -> None:
    assert Rtc("a", "86400").now() == 86400 * SECOND
    assert Rtc("b", "localtime").now() == clock.ns + real_time.localtime().tm_gmtoff * SECOND


@given(st.dates())
def test_days_are_counted_as_the_calendar_does(day: datetime.date) -> None:
    assert days_from_civil(day.year, day.month, day.day) == (day - datetime.date(1970, 1, 1)).days


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 255)), max_size=60))
def test_nothing_that_a_guest_writes_breaks_it(writes: list[tuple[int, int]]) -> None:
    machine, device = FakeMachine(), Rtc()
    device.attach(machine)
    for offset, value in writes:
        machine.ports.write(0x70 + offset, 1, value)
        assert 0 <= machine.ports.read(0x71, 1) <= 255
    machine.turn(2)
    state: dict[str, Any] = device.state()
    Rtc("other").restore(state)
    device.close()
    machine.loop.close()
