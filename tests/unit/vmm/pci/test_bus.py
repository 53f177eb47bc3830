"""The PCI bus: sizing, moving, sharing, interrupts, hot-plug, as a guest does it through ECAM and ports."""

import random

import pytest

from kvik.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    OperationFailed,
    OperationInvalid,
    OperationUnsupported,
)
from kvik.vmm import layout
from kvik.vmm.pci.device import Bar, Doorbell, PciDevice
from kvik.vmm.virtio.mock_machine import MockMachine


class Memory(PciDevice):
    """16 bytes of registers behind three kinds of BAR."""

    kind, device_id, class_code = "memory", 0x1234, 0xFF0000
    bars = (Bar(0, 0x1000), Bar(1, 0x20, "io"), Bar(2, 0x100000, "mem64", prefetch=True))
    msix_vectors, intx, express = 3, True, True

    def __init__(self, name):
        self.written = []
        super().__init__(name)

    def read_bar(self, bar, offset, size):
        return bar << 8 | offset & 0xFF

    def write_bar(self, bar, offset, size, value):
        self.written.append((bar, offset, size, value))


@pytest.fixture
def machine():
    machine = MockMachine()
    yield machine
    machine.close()


@pytest.fixture
def device(machine):
    device = Memory("memory0")
    machine.add(device)
    return device


def ecam(device, offset, size, value=None):
    mmio = device.bus.machine.mmio
    place = layout.ECAM + (device.slot << 15 | device.function << 12) + offset
    return mmio.read(place, size) if value is None else mmio.write(place, size, value)


def legacy(machine, slot, offset, size, value=None):
    machine.ports.write(0xCF8, 4, 1 << 31 | slot << 11 | offset & 0xFC)
    port = 0xCFC + (offset & 3)
    return machine.ports.read(port, size) if value is None else machine.ports.write(port, size, value)


def test_slot_0_is_the_host_bridge_and_absent_slots_are_all_ones(machine):
    assert machine.mmio.read(layout.ECAM + 8, 4) >> 8 == 0x060000
    for slot in range(1, 32):
        assert machine.mmio.read(layout.ECAM + (slot << 15), 4) == 0xFFFFFFFF
        assert legacy(machine, slot, 0, 4) == 0xFFFFFFFF


def test_both_ways_lead_to_one_configuration_space(machine, device):
    assert ecam(device, 0, 4) == 0x12341B36 == legacy(machine, device.slot, 0, 4)
    assert legacy(machine, device.slot, 2, 2) == 0x1234
    legacy(machine, device.slot, 0x3C, 1, 0x55)
    assert ecam(device, 0x3C, 1) == 0x55
    machine.ports.write(0xCF8, 1, 0xFF)  # not an address: another size
    assert legacy(machine, device.slot, 0, 2) == 0x1B36
    machine.ports.write(0xCF8, 4, device.slot << 11)  # not enabled
    assert machine.ports.read(0xCFC, 4) == 0xFFFFFFFF
    machine.ports.write(0xCF8, 4, 1 << 31 | 1 << 16 | device.slot << 11)  # another bus
    assert machine.ports.read(0xCFC, 4) == 0xFFFFFFFF


def test_read_only_registers_stay(device):
    before = [ecam(device, offset, 4) for offset in (0x00, 0x08, 0x2C, 0x34)]
    for offset in (0x00, 0x08, 0x2C, 0x34):
        ecam(device, offset, 4, 0xFFFFFFFF)
    assert [ecam(device, offset, 4) for offset in (0x00, 0x08, 0x2C, 0x34)] == before


def test_capabilities_are_listed(device):
    kinds, at = [], ecam(device, 0x34, 1)
    while at:
        kinds.append(ecam(device, at, 1))
        at = ecam(device, at + 1, 1)
    assert kinds == [0x11, 0x10]  # MSI-X, PCI Express
    assert ecam(device, 0x06, 2) & 0x10


def test_bars_tell_their_sizes(device):
    sizes = []
    for index in (0, 1, 2, 3, 4, 5):
        offset = 0x10 + 4 * index
        old = ecam(device, offset, 4)
        ecam(device, offset, 4, 0xFFFFFFFF)
        sizes.append(ecam(device, offset, 4))
        ecam(device, offset, 4, old)
    assert sizes == [0xFFFFF000, 0xFFE1, 0xFFF0000C, 0xFFFFFFFF, 0xFFFFE000, 0]


def test_bars_answer_where_they_are_put_and_only_while_decoding_is_on(machine, device):
    mmio, ports = machine.mmio, machine.ports
    first = device.bar_address(0)
    assert layout.PCI32 <= first < layout.PCI32_END
    assert mmio.read(first + 4, 4) == 0xFFFFFFFF  # off after reset
    ecam(device, 0x04, 2, 0x3)
    assert mmio.read(first + 4, 4) == 4
    assert ports.read(device.bar_address(1) + 4, 1) == 4
    low = device.bar_address(2)
    assert machine.memory.layout.pci64[0] <= low
    assert mmio.read(low + 4, 4) == 0x204
    ecam(device, 0x10, 4, 0xD0000000)  # moved while decoding is on
    assert mmio.read(first + 4, 4) == 0xFFFFFFFF
    assert mmio.read(0xD0000004, 4) == 4
    ecam(device, 0x18, 4, 0)  # halves, one by one
    ecam(device, 0x1C, 4, (machine.memory.layout.pci64[0] + (1 << 33)) >> 32)
    assert mmio.read(device.bar_address(2) + 8, 4) == 0x208
    mmio.write(0xD0000010, 2, 7)
    assert device.written == [(0, 0x10, 2, 7)]
    ecam(device, 0x04, 2, 0x1)  # memory off, I/O stays
    assert mmio.read(0xD0000004, 4) == 0xFFFFFFFF
    assert ports.read(device.bar_address(1) + 4, 1) == 4


@pytest.mark.parametrize("address", [0, 0x1000, layout.ECAM, layout.LAPIC, 0xFFFFF000, layout.PCI32 - 0x1000])
def test_a_bar_outside_of_the_windows_answers_nowhere(machine, device, address):
    ecam(device, 0x04, 2, 0x2)
    before = machine.mmio.ranges()
    ecam(device, 0x10, 4, address)
    assert len(machine.mmio.ranges()) == len(before) - 1
    assert not any(start == address and "memory0" in name for start, _, name in machine.mmio.ranges())


def test_of_overlapping_bars_the_first_wins_until_it_leaves(machine, device):
    other = Memory("memory1")
    machine.add(other)
    for one in (device, other):
        ecam(one, 0x04, 2, 0x2)
    place = device.bar_address(0)
    ecam(other, 0x10, 4, place)
    machine.mmio.write(place, 1, 1)
    assert (len(device.written), len(other.written)) == (1, 0)
    ecam(device, 0x04, 2, 0)
    machine.mmio.write(place, 1, 2)
    assert (len(device.written), len(other.written)) == (1, 1)


def test_doorbells_follow_their_bar(machine):
    class Bell(Memory):
        def __init__(self, name):
            super().__init__(name)
            self.doorbells = [Doorbell(0, 0x40, 4, 99)]

    device = Bell("bell0")
    machine.add(device)
    ecam(device, 0x04, 2, 0x2)
    assert list(machine.doorbells.rung) == [(device.bar_address(0) + 0x40, 4, None, False)]
    ecam(device, 0x10, 4, 0xD0000000)
    assert list(machine.doorbells.rung) == [(0xD0000040, 4, None, False)]
    ecam(device, 0x04, 2, 0)
    assert not machine.doorbells.rung


def table(device, vector, word, value=None):
    place = device.bar_address(4) + 16 * vector + 4 * word
    mmio = device.bus.machine.mmio
    return mmio.read(place, 4) if value is None else mmio.write(place, 4, value)


def test_msix_masks_and_pending_bits(machine, device):
    sent = machine.interrupts.sent
    ecam(device, 0x04, 2, 0x2)
    control = ecam(device, 0x34, 1) + 2
    assert ecam(device, control, 2) == 2  # three vectors, disabled
    for vector in range(3):
        assert table(device, vector, 3) == 1  # masked after reset
        for word, value in enumerate((0xFEE00000, 0, 0x40 + vector)):
            table(device, vector, word, value)
    device.msix.signal(0)  # disabled: lost
    ecam(device, control, 2, 0x8000)
    device.msix.signal(1)  # masked: pending
    pending = device.bar_address(4) + 0x1000
    assert (sent, machine.mmio.read(pending, 8)) == ([], 2)
    table(device, 1, 3, 0)
    assert (sent, machine.mmio.read(pending, 8)) == ([(0xFEE00000, 0x41)], 0)
    device.msix.signal(1)
    assert len(sent) == 2
    ecam(device, control, 2, 0xC000)  # the whole function masked
    device.msix.signal(1)
    device.msix.signal(1)
    assert len(sent) == 2 and machine.mmio.read(pending, 4) == 2
    table(device, 1, 2, 0x99)
    ecam(device, control, 2, 0x8000)
    assert sent[2:] == [(0xFEE00000, 0x99)]
    for vector in (-1, 3, 0xFFFF):
        device.msix.signal(vector)
    assert len(sent) == 3
    table(device, 0, 3, 0xFFFFFFFE)  # reserved bits do not stay
    assert table(device, 0, 3) == 0
    machine.mmio.write(device.bar_address(4) + 1, 2, 0xFFFF)  # neither aligned nor a double word
    assert table(device, 0, 0) == 0xFEE00000


def test_pins_are_shared_as_levels(machine):
    devices = [Memory(f"memory{number}") for number in range(9)]
    for device in devices:
        machine.add(device)
    first, last = devices[0], devices[8]
    assert (first.slot, last.slot) == (1, 9)
    gsi = layout.pci_gsi(1)
    first.raise_intx()
    last.raise_intx()
    first.lower_intx()
    assert machine.interrupts.level(gsi)
    assert ecam(last, 6, 2) & 8 and not ecam(first, 6, 2) & 8
    ecam(last, 4, 2, 0x400)
    assert not machine.interrupts.level(gsi)
    ecam(last, 4, 2, 0)
    assert machine.interrupts.level(gsi)
    last.close()
    assert not machine.interrupts.level(gsi)


def test_functions_of_one_slot(machine, device):
    machine.pci.add(Memory("second"), device.slot, 1)
    assert ecam(device, 0x0E, 1) == 0x80
    assert machine.mmio.read(layout.ECAM + (device.slot << 15 | 1 << 12), 4) == 0x12341B36
    with pytest.raises(InvalidArgument):
        machine.pci.add(Memory("third"), 9, 1)
    machine.pci.find("second").close()
    machine.pci.reset()
    assert ecam(device, 0x0E, 1) == 0x80


def test_the_bus_refuses_what_does_not_fit(machine, device):
    with pytest.raises(AlreadyExists):
        machine.pci.add(Memory("again"), device.slot)
    with pytest.raises(InvalidArgument):
        machine.pci.add(Memory("beyond"), 32)
    for number in range(30):
        machine.pci.add(Memory(f"more{number}"))
    with pytest.raises(OperationFailed):
        machine.pci.add(Memory("too-many"))
    for bar in ((0, 3), (0, 1 << 30), (6, 16), (5, 16, "mem64"), (0, 512, "io"), (0, 16, "what")):
        with pytest.raises(InvalidArgument):
            Bar(*bar)


def test_hot_plug_and_unplug(machine, device):
    told = []
    machine.pci.hotplug.on_event = lambda: told.append(1)
    late = Memory("late0")
    machine.pci.plug(late)
    machine.devices["late0"] = late
    assert told == [1]
    assert machine.ports.read(0x610, 4) == 1 << late.slot
    assert machine.ports.read(0x610, 4) == 0
    assert ecam(late, 0, 4) == 0x12341B36
    assert late.bar_address(0) == 0  # for the guest to assign
    machine.pci.request_unplug(late)
    with pytest.raises(OperationInvalid):
        machine.pci.request_unplug(late)
    assert machine.ports.read(0x614, 4) == 1 << late.slot
    slot = late.slot
    machine.ports.write(0x618, 4, 1 << slot)
    assert machine.mmio.read(layout.ECAM + (slot << 15), 4) == 0xFFFFFFFF
    assert machine.events == []  # on the loop
    machine.turn()
    assert machine.events == [("DEVICE_DELETED", {"device": "late0", "path": "/machine/peripheral/late0"})]
    assert "late0" not in machine.devices
    with pytest.raises(NotFound):
        machine.pci.request_unplug(late)
    assert machine.pci.free_slot() == slot


def test_what_cannot_be_unplugged(machine):
    with pytest.raises(OperationUnsupported):
        machine.pci.request_unplug(machine.pci.find("host-bridge"))
    machine.ports.write(0x618, 4, 0xFFFFFFFF)
    assert machine.mmio.read(layout.ECAM, 4) != 0xFFFFFFFF


def test_a_reset_completes_an_unplug(machine, device):
    machine.pci.request_unplug(device)
    machine.pci.reset()
    machine.turn()
    assert machine.events[0][0] == "DEVICE_DELETED"


def test_state_brings_bars_and_interrupts_back(machine, device):
    ecam(device, 0x04, 2, 0x3)
    ecam(device, 0x10, 4, 0xD0000000)
    control = ecam(device, 0x34, 1) + 2
    table(device, 0, 0, 0xFEE00000)
    table(device, 0, 2, 0x40)
    ecam(device, control, 2, 0x8000)
    device.msix.signal(0)
    device.raise_intx()
    state = device.state()
    other = MockMachine()
    try:
        copy = Memory("memory0")
        other.add(copy)
        copy.restore(state)
        assert copy.state() == state
        assert other.mmio.read(0xD0000004, 4) == 4
        assert other.interrupts.level(layout.pci_gsi(copy.slot))
        table(copy, 0, 3, 0)
        assert other.interrupts.sent == [(0xFEE00000, 0x40)]
    finally:
        other.close()


def test_random_writes_leave_a_bus_that_works(machine):
    """Everything a guest can write to: 20,000 times at random, with two devices that fight for addresses."""
    devices = [Memory("memory0"), Memory("memory1")]
    for device in devices:
        machine.add(device)
    dice = random.Random(3)
    places = [0xC0000000, 0xC0100000, 0xD0000000, 0x1000, 0x2000, 0, 0xFFFFFFFF, machine.memory.layout.pci64[0]]
    for _ in range(20_000):
        size = dice.choice((1, 2, 4, 8))
        value = dice.choice((*places, dice.getrandbits(64), 3, 0x407)) & (1 << 8 * size) - 1
        offset = dice.choice((4, 0x10, 0x14, 0x18, 0x1C, 0x20, 0x42, dice.randrange(4096)))
        kind = dice.random()
        if kind < 0.6:
            machine.mmio.write(layout.ECAM + (dice.randrange(4) << 15) + offset, size, value)
        elif kind < 0.7:
            machine.ports.write(0xCF8 + dice.randrange(8), min(size, 4), value & 0xFFFFFFFF)
        elif kind < 0.9:
            machine.mmio.write(dice.choice(places) + dice.randrange(0x2000), size, value)
            machine.mmio.read(dice.choice(places) + dice.randrange(0x2000), size)
        else:
            dice.choice(devices).msix.signal(dice.randrange(4))
    machine.pci.reset()
    for device in devices:
        ecam(device, 0x04, 2, 0x3)
        assert machine.mmio.read(device.bar_address(0) + 4, 4) == 4
