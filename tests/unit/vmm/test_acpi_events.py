"""The ACPI registers as the guest's AML uses them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvik.errors import InvalidArgument, OperationInvalid
from kvik.vmm.acpi.dsdt import CPU_HOTPLUG, POWER_BUTTON, SLEEP_BUTTON, VMGENID
from kvik.vmm.bus import Bus
from kvik.vmm.devices.acpi_events import AcpiEvents, CpuHotplug
from kvik.vmm.devices.vmgenid import ADDRESS, VmGenId
from kvik.vmm.interrupts import Interrupts
from kvik.vmm.layout import ACPI_GSI, MIB
from kvik.vmm.memory import GuestMemory

EVENTS, SLEEP, STATUS, RESET = 0x604, 0x600, 0x601, 0x602
SELECT, STATE, NEXT = 0x620, 0x624, 0x628


class FakeMachine:
    def __init__(self) -> None:
        self.ports = Bus("port", 0x10000)
        self.interrupts = Interrupts(None)
        self.memory = GuestMemory.allocate(2 * MIB)
        self.power_button: Any = None
        self.calls: list[str] = []

    def hold_caller(self) -> None:
        self.calls.append("hold")

    def request_shutdown(self, reason: str) -> None:
        self.calls.append(reason)

    request_reset = request_shutdown


@pytest.fixture
def machine() -> Iterator[Any]:
    made = FakeMachine()
    yield made
    made.memory.close()


@pytest.fixture
def events(machine: Any) -> AcpiEvents:
    device = AcpiEvents()
    device.attach(machine)
    return device


def test_reading_the_events_takes_them_and_lowers_the_line(machine: Any, events: AcpiEvents) -> None:
    machine.power_button()
    events.press_sleep_button()
    assert machine.interrupts.level(ACPI_GSI)
    assert machine.ports.read(EVENTS, 4) == POWER_BUTTON | SLEEP_BUTTON
    assert not machine.interrupts.level(ACPI_GSI) and machine.ports.read(EVENTS, 4) == 0


def test_sleep_type_5_powers_off(machine: Any, events: AcpiEvents) -> None:
    machine.ports.write(SLEEP, 1, 5 << 2)  # not enabled
    machine.ports.write(SLEEP, 1, 3 << 2 | 1 << 5)  # another state
    assert machine.calls == []
    machine.ports.write(SLEEP, 1, 5 << 2 | 1 << 5)
    assert machine.calls == ["hold", "guest-shutdown"]


def test_the_reset_register_takes_its_value_only(machine: Any, events: AcpiEvents) -> None:
    machine.ports.write(RESET, 1, 0xFF)
    assert machine.calls == []
    machine.ports.write(RESET, 1, 1)
    assert machine.calls == ["hold", "guest-reset"]


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_odd_accesses_do_nothing_worse(machine: Any, events: AcpiEvents, offset: int, size: int) -> None:
    for value in (0, 1, 0xFF, 0xFFFFFFFF):
        machine.ports.write(0x600 + offset, size, value & (1 << 8 * size) - 1)
        assert 0 <= machine.ports.read(0x600 + offset, size) < 1 << 8 * size


def test_events_survive_save_and_restore(machine: Any, events: AcpiEvents) -> None:
    events.press_power_button()
    saved = events.state()
    events.reset()
    assert not machine.interrupts.level(ACPI_GSI)
    events.restore(saved)
    assert machine.interrupts.level(ACPI_GSI) and machine.ports.read(EVENTS, 4) == POWER_BUTTON


@pytest.fixture
def hotplug(machine: Any, events: AcpiEvents) -> CpuHotplug:
    device = CpuHotplug(events, 2, 4)
    device.attach(machine)
    return device


def test_a_processor_comes_and_goes(machine: Any, hotplug: CpuHotplug) -> None:
    ports, gone = machine.ports, []
    hotplug.on_eject = gone.append
    assert ports.read(NEXT, 4) == 0xFFFFFFFF
    hotplug.plug(3)
    assert ports.read(EVENTS, 4) == CPU_HOTPLUG
    assert ports.read(NEXT, 4) == 3
    ports.write(SELECT, 4, 3)
    assert ports.read(STATE, 4) == 1 | 2
    ports.write(STATE, 4, 2 | 4)  # seen
    assert ports.read(STATE, 4) == 1 and ports.read(NEXT, 4) == 0xFFFFFFFF
    hotplug.request_unplug(3)
    assert ports.read(NEXT, 4) == 3 and ports.read(STATE, 4) == 1 | 4 and gone == []
    ports.write(STATE, 4, 4)
    ports.write(STATE, 4, 8)  # eject
    assert gone == [3] and ports.read(STATE, 4) == 0
    ports.write(STATE, 4, 8)  # again: nobody there
    assert gone == [3]


def test_the_boot_processor_stays(machine: Any, hotplug: CpuHotplug) -> None:
    machine.ports.write(SELECT, 4, 0)
    machine.ports.write(STATE, 4, 8)
    assert hotplug.present[0]
    with pytest.raises(OperationInvalid):
        hotplug.request_unplug(0)


def test_a_processor_that_cannot_be_is_neither_seen_nor_plugged(machine: Any, hotplug: CpuHotplug) -> None:
    machine.ports.write(SELECT, 4, 0xFFFFFFFF)
    machine.ports.write(STATE, 4, 0xFFFFFFFF)
    assert machine.ports.read(STATE, 4) == 0
    with pytest.raises(InvalidArgument, match="at most 4"):
        hotplug.plug(4)
    with pytest.raises(OperationInvalid, match="already"):
        hotplug.plug(1)


def test_hotplug_state_is_restored_into_a_machine_of_the_same_size_only(machine: Any, hotplug: CpuHotplug) -> None:
    hotplug.plug(2)
    saved = hotplug.state()
    other = CpuHotplug(hotplug.events, 2, 4, "other")
    other.restore(saved)
    assert other.present == [True, True, True, False] and other.inserted == {2}
    with pytest.raises(ValueError, match="processors"):
        CpuHotplug(hotplug.events, 2, 8, "more").restore(saved)


def test_a_restored_machine_has_a_new_generation(machine: Any, events: AcpiEvents) -> None:
    device = VmGenId(events)
    device.attach(machine)
    first = machine.memory.read(ADDRESS, 16)
    assert first == device.guid != bytes(16)
    device.reset()
    assert machine.memory.read(ADDRESS, 16) == first and machine.ports.read(EVENTS, 4) == 0
    device.restore(device.state())
    assert machine.memory.read(ADDRESS, 16) not in (first, bytes(16))
    assert machine.ports.read(EVENTS, 4) == VMGENID
    with pytest.raises(ValueError, match="16 bytes"):
        device.restore({"guid": b"short"})
