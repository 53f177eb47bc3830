"""pvpanic: what a guest tells, and what the machine does about it."""

from __future__ import annotations

import pytest

from kvik.vmm.devices.pvpanic import Pvpanic
from unit.vmm.devices.machine import FakeMachine


@pytest.fixture
def machine() -> FakeMachine:
    made = FakeMachine()
    Pvpanic().attach(made)
    return made


def test_a_read_tells_the_known_events(machine: FakeMachine) -> None:
    assert machine.ports.read(0x505, 1) == 7


@pytest.mark.parametrize(
    ("action", "told", "calls", "code"),
    [
        ("pause", "pause", ["hold", "stop guest-panicked"], 0),
        ("shutdown", "poweroff", ["hold", "shutdown guest-panic"], 0),
        ("exit-failure", "poweroff", ["hold", "shutdown guest-panic"], 1),
        ("none", "run", [], 0),
    ],
)
def test_a_panic_does_what_is_configured(
    machine: FakeMachine, action: str, told: str, calls: list[str], code: int
) -> None:
    machine.config.on_panic = action
    machine.ports.write(0x505, 1, 1)
    assert machine.events == [("GUEST_PANICKED", {"action": told})]
    assert (machine.calls, machine.exit_code) == (calls, code)


def test_a_crash_kernel_is_not_disturbed(machine: FakeMachine) -> None:
    machine.ports.write(0x505, 1, 2)
    assert machine.events == [("GUEST_CRASHLOADED", {"action": "run"})] and machine.calls == []


def test_a_shutdown_is_one(machine: FakeMachine) -> None:
    machine.ports.write(0x505, 1, 4)
    assert machine.events == [("GUEST_PVSHUTDOWN", {})] and machine.calls == ["hold", "shutdown guest-shutdown"]


def test_a_storm_is_told_once_until_the_reset() -> None:
    machine, device = FakeMachine(), Pvpanic()
    device.attach(machine)
    machine.config.on_panic = "none"
    for _ in range(1000):
        machine.ports.write(0x505, 1, 1)
        machine.ports.write(0x505, 1, 0xF8)
    assert len(machine.events) == 1 and device.stats() == {"panics": 1}
    other = Pvpanic()
    other.restore(device.state())
    assert other.state() == device.state() == {"told": 1}
    device.reset()
    machine.ports.write(0x505, 1, 1)
    assert len(machine.events) == 2
