"""The i6300ESB, driven as Linux's driver does it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.errors import InvalidArgument
from kvik.vmm.devices import watchdog as w
from kvik.vmm.devices.watchdog import Watchdog
from unit.vmm.devices.machine import FakeMachine


def attached(action: str = "reset") -> tuple[Watchdog, FakeMachine]:
    machine, device = FakeMachine(), Watchdog("dog", action)
    device.attach(machine)
    return device, machine


def unlock(device: Watchdog) -> None:
    device.bar_write(0, w.RELOAD, 2, 0x80)
    device.bar_write(0, w.RELOAD, 2, 0x86)


def set_up(device: Watchdog, machine: FakeMachine, preload: int = 1024) -> None:
    """esb_initdevice, esb_timer_set_heartbeat, esb_timer_start of i6300esb.c."""
    device.config_write(w.CONFIG, 2, 0x0003)  # no interrupt, 1 kHz, reboot
    for register in (w.TIMER_1, w.TIMER_2):
        unlock(device)
        device.bar_write(0, register, 4, preload)
    unlock(device)
    device.bar_write(0, w.RELOAD, 2, w.RELOAD_PING)
    device.config_write(w.LOCK, 1, w.LOCK_ENABLE)
    machine.turn()


def expire(device: Watchdog, machine: FakeMachine) -> None:
    """Both stages."""
    for _ in range(2):
        device._expired()
        machine.turn()


def test_it_is_what_the_driver_looks_for() -> None:
    device, _ = attached()
    assert (device.config.get(0, 2), device.config.get(2, 2)) == (0x8086, 0x25AB)
    assert device.config_read(w.LOCK, 1) == 0 and device.bar_read(0, w.RELOAD, 2) == 0


def test_both_stages_have_the_time_that_was_set() -> None:
    device, machine = attached()
    set_up(device, machine, 15 << 10)
    assert device.stage == 1 and device._seconds(1) == device._seconds(2) == pytest.approx(15.25, abs=0.01)
    device.config_write(w.CONFIG, 2, w.CONFIG_1MHZ)
    assert device._seconds(1) == pytest.approx(0.0149, abs=0.0001)


@pytest.mark.parametrize(
    ("action", "call"),
    [
        ("reset", ["reset guest-reset"]),
        ("shutdown", ["powerdown"]),
        ("poweroff", ["quit guest-shutdown"]),
        ("pause", ["pause watchdog"]),
        ("none", []),
    ],
)
def test_it_does_what_is_configured(action: str, call: list[str]) -> None:
    device, machine = attached(action)
    set_up(device, machine)
    expire(device, machine)
    assert machine.events == [("WATCHDOG", {"action": action})] and machine.calls == call
    assert device.stage == 0 and device._timer is None and device.stats() == {"fired": 1}


def test_it_can_give_every_vcpu_an_nmi() -> None:
    device, machine = attached("inject-nmi")
    nmis: list[int] = []
    machine.vcpus = [SimpleNamespace(vcpu=SimpleNamespace(nmi=lambda n=n: nmis.append(n))) for n in range(2)]
    set_up(device, machine)
    expire(device, machine)
    assert nmis == [0, 1]


def test_a_ping_begins_again_and_needs_the_unlock_sequence() -> None:
    device, machine = attached()
    set_up(device, machine)
    device._expired()
    assert device.stage == 2
    device.bar_write(0, w.RELOAD, 2, w.RELOAD_PING)
    assert device.stage == 2, "not unlocked"
    unlock(device)
    device.bar_write(0, w.RELOAD, 2, w.RELOAD_PING)
    machine.turn()
    assert device.stage == 1 and device._timer is not None
    for _ in range(1000):
        unlock(device)
        device.bar_write(0, w.RELOAD, 2, w.RELOAD_PING)
    assert len(machine.loop._soon) == 1, "a storm of pings costs one restart"


def test_after_the_reset_the_driver_learns_why() -> None:
    device, machine = attached()
    set_up(device, machine)
    expire(device, machine)
    device.reset()
    assert device.bar_read(0, w.RELOAD, 2) & w.RELOAD_TIMEOUT
    unlock(device)
    device.bar_write(0, w.RELOAD, 2, w.RELOAD_TIMEOUT)
    assert device.bar_read(0, w.RELOAD, 2) == 0


def test_it_can_be_stopped_unless_it_is_locked() -> None:
    device, machine = attached()
    set_up(device, machine)
    device.config_write(w.LOCK, 1, 0)
    machine.turn()
    assert device.stage == 0 and device._timer is None
    device.config_write(w.LOCK, 1, w.LOCK_ENABLE | w.LOCK_LOCKED)
    device.config_write(w.LOCK, 1, 0)
    machine.turn()
    assert device.stage == 1 and device.config_read(w.LOCK, 1) == w.LOCK_ENABLE | w.LOCK_LOCKED
    device.reset()
    machine.turn()
    assert device.config_read(w.LOCK, 1) == 0 and device._timer is None


def test_a_paused_guest_is_not_punished() -> None:
    device, machine = attached()
    set_up(device, machine, 15 << 10)
    machine.still = True
    device.pause()
    assert device._timer is None and 15 < device._left <= 15.26
    device.resume()
    assert device._timer is not None
    device.pause()
    state = device.state()
    other, second = attached()
    second.still = True
    other.restore(state)
    second.turn()
    assert other._timer is None and other.stage == 1
    assert other.state()["left"] == state["left"] and other.preload == device.preload
    second.still = False
    other.resume()
    assert other._timer is not None
    device.close()
    device.close()


def test_an_unknown_action_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="inject-nmi"):
        Watchdog("dog", "bark")


registers = st.tuples(
    st.sampled_from(["bar", "config"]), st.integers(0, 0x70), st.sampled_from([1, 2, 4]), st.integers(0)
)


@given(st.lists(registers, max_size=40))
def test_nothing_that_a_guest_writes_breaks_it(writes: list[tuple[str, int, int, int]]) -> None:
    device, machine = attached("none")
    for where, offset, size, value in writes:
        value &= (1 << 8 * size) - 1
        if where == "bar":
            device.bar_write(0, offset & 0xF, size, value)
            device.bar_read(0, offset & 0xF, size)
        else:
            device.config_write(offset, size, value)
    machine.turn(2)
    Watchdog("other").restore(device.state())
    device.close()
    machine.loop.close()
