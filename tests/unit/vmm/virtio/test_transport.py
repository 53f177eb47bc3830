"""A virtio device as its driver meets it: configuration space, BAR, queues, interrupts."""

import os
import random
import struct

import pytest

from kvik.vmm import layout
from kvik.vmm.faults import GuestFault
from kvik.vmm.virtio import transport as t
from kvik.vmm.virtio.device import RING_FEATURES, Field, VirtioDevice
from kvik.vmm.virtio.mock_machine import MockMachine
from kvik.vmm.virtio.queue import EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED, RING_RESET, VERSION_1


class Echo(VirtioDevice):
    kind, device_id, queue_sizes = "echo", 0x3F, (64, 16)
    features = 1 << 3 | 1 << 5
    ring_features = RING_FEATURES | IN_ORDER | RING_PACKED
    config_fields = (Field("speed", 0, 8), Field("mode", 8, 1, writable=True), Field("mac", 9, 6))

    def __init__(self, name="echo0"):
        self.calls = []
        super().__init__(name)
        self.config["speed"] = 0x1122334455667788

    def accepts(self, features):
        return not features & 1 << 5 or bool(features & 1 << 3)  # 5 needs 3

    def activate(self):
        self.calls.append("activate")

    def deactivate(self):
        self.calls.append("deactivate")

    def queue_kicked(self, index):
        queue = self.queues[index]
        for chain in queue:
            queue.push(chain, chain.write(chain.read_all(4096)))
        queue.flush()

    def queue_reset(self, index):
        self.calls.append(("reset", index))

    def queue_enabled(self, index):
        self.calls.append(("enabled", index))

    def config_written(self, offset, size):
        self.calls.append(("config", offset, size))


@pytest.fixture
def machine():
    machine = MockMachine()
    yield machine
    machine.close()


@pytest.fixture
def driver(machine):
    return machine.add_virtio(Echo())


def test_a_guest_finds_a_modern_virtio_device(driver):
    assert driver.config(0, 4) == (0x1040 + 0x3F) << 16 | 0x1AF4
    assert driver.config(8, 1) >= 1  # revision (4.1.2.1)
    assert {t.CAP_COMMON, t.CAP_NOTIFY, t.CAP_ISR, t.CAP_DEVICE, t.CAP_PCI} == set(driver.regions)
    assert [kind for kind, _ in driver.capabilities()].count(0x11) == 1
    assert driver.common(t.NUM_QUEUES, 2) == 2
    assert driver.offered() == Echo.features | Echo.ring_features
    assert driver.machine.mmio.read(driver.regions[t.CAP_DEVICE][0], 8) == 0x1122334455667788


@pytest.mark.parametrize("features", [0, EVENT_IDX, INDIRECT_DESC | EVENT_IDX, RING_PACKED, RING_PACKED | IN_ORDER])
def test_requests_travel(driver, features):
    driver.start(features | VERSION_1)
    driver.use_msix(3)
    for number in range(200):
        driver.queues[number % 2].ask(interrupts=True)
        assert driver.request(number % 2, [b"%d" % number], [8]) == b"%d" % number
    sent = driver.machine.interrupts.sent
    assert {data for _, data in sent} == {1, 2}
    assert len(sent) == 200


def test_features_that_do_not_fit_are_refused(driver):
    assert not driver.negotiate(0)  # without VERSION_1
    assert not driver.negotiate(VERSION_1 | 1 << 7)  # never offered
    assert not driver.negotiate(VERSION_1 | 1 << 5)  # the device says no
    assert driver.status == t.ACKNOWLEDGE | t.DRIVER
    assert driver.negotiate(VERSION_1 | 1 << 5 | 1 << 3)
    driver.common(t.DRIVER_FEATURE_SELECT, 4, 1)
    driver.common(t.DRIVER_FEATURE, 4, 0xFFFFFFFF)  # too late
    assert driver.common(t.DRIVER_FEATURE, 4) == 1


def test_driver_ok_needs_features_ok(driver):
    driver.common(t.DEVICE_STATUS, 1, 0)
    driver.common(t.DEVICE_STATUS, 1, t.ACKNOWLEDGE | t.DRIVER | t.DRIVER_OK)
    assert not driver.status & t.DRIVER_OK
    assert driver.pci.device.calls == []


def test_what_the_guest_breaks_needs_a_reset_and_heals_by_it(driver):
    driver.start(VERSION_1)
    driver.use_msix(3)
    driver.queues[0].add_raw([(1 << 40, 16, 0)])
    driver.kick(0)
    device = driver.pci.device
    assert driver.status & t.NEEDS_RESET
    assert device.calls == ["activate", "deactivate"]
    assert (0xFEE00000, 0) in driver.machine.interrupts.sent  # told as a configuration change (2.1.2)
    logged = len(driver.machine.logged)
    assert logged == 1 and "echo0" in driver.machine.logged[0]
    for _ in range(10):
        driver.kick(0)
        driver.kick(1)
    assert len(driver.machine.logged) == logged  # once
    driver.start(VERSION_1)
    assert not driver.status & t.NEEDS_RESET
    assert driver.request(0, [b"again"], [5]) == b"again"


def test_a_queue_outside_of_ram_needs_a_reset(driver):
    assert driver.negotiate(VERSION_1)
    driver.common(t.QUEUE_SELECT, 2, 0)
    driver.common(t.QUEUE_DESC + 4, 4, 0xFFFFFFFF)
    driver.common(t.QUEUE_ENABLE, 2, 1)
    assert driver.common(t.QUEUE_ENABLE, 2) == 0
    assert driver.status & t.NEEDS_RESET


def test_a_live_queue_cannot_be_moved(driver):
    driver.start(VERSION_1)
    driver.common(t.QUEUE_SELECT, 2, 0)
    before = [driver.common(t.QUEUE_DESC + 4 * word, 4) for word in range(6)]
    for word in range(6):
        driver.common(t.QUEUE_DESC + 4 * word, 4, 0x5000)
    driver.common(t.QUEUE_SIZE, 2, 8)
    driver.common(t.QUEUE_ENABLE, 2, 0)
    assert [driver.common(t.QUEUE_DESC + 4 * word, 4) for word in range(6)] == before
    assert driver.common(t.QUEUE_SIZE, 2) == 64
    assert driver.request(0, [b"x"], [1]) == b"x"


def test_one_queue_is_reset_and_enabled_again(driver):
    driver.start(VERSION_1 | RING_RESET)
    for size in (16, 32):
        driver.common(t.QUEUE_SELECT, 2, 0)
        driver.common(t.QUEUE_RESET, 2, 1)
        assert driver.common(t.QUEUE_RESET, 2) == 0
        assert driver.common(t.QUEUE_ENABLE, 2) == 0
        assert driver.common(t.QUEUE_SIZE, 2) == 64
        driver.common(t.QUEUE_SIZE, 2, size)
        driver.queues[0].rewind()
        driver.queues[0].size = size
        from kvik.vmm.virtio.mock import MockDriver

        driver.queues[0] = MockDriver(
            driver.machine.memory, driver.pci.device.queues[0], features=VERSION_1, start=False
        )
        driver.set_queue(driver.queues[0])
        assert driver.request(0, [b"x" * size], [size]) == b"x" * size
        assert driver.request(1, [b"other"], [5]) == b"other"
    assert driver.pci.device.calls == ["activate", ("reset", 0), ("enabled", 0), ("reset", 0), ("enabled", 0)]


def test_the_configuration_space(driver):
    machine, device = driver.machine, driver.pci.device
    place = driver.regions[t.CAP_DEVICE][0]
    machine.mmio.write(place, 4, 0)  # read-only
    machine.mmio.write(place + 8, 1, 5)
    assert device.config["speed"] == 0x1122334455667788
    assert device.config["mode"] == 5
    assert device.calls == [("config", 8, 1)]
    driver.start(VERSION_1)
    driver.use_msix(3)
    generation = driver.common(t.CONFIG_GENERATION, 1)

    def change():
        device.config["speed"] = 9

    device.config_changed(change)
    assert machine.mmio.read(place, 8) == 9
    assert driver.common(t.CONFIG_GENERATION, 1) != generation
    assert machine.interrupts.sent == [(0xFEE00000, 0)]


def test_intx_is_a_level_that_reading_the_isr_lowers(driver):
    machine = driver.machine
    driver.config(0x04, 2, 0x006)
    driver.start(VERSION_1)
    gsi = layout.pci_gsi(driver.pci.slot)
    driver.request(0, [b"x"], [1])
    assert machine.interrupts.level(gsi)
    assert driver.config(0x06, 2) & 8
    driver.config(0x04, 2, 0x406)  # disabled: the status bit stays
    assert not machine.interrupts.level(gsi)
    assert driver.config(0x06, 2) & 8
    driver.config(0x04, 2, 0x006)
    assert machine.interrupts.level(gsi)
    assert machine.mmio.read(driver.regions[t.CAP_ISR][0], 1) == 1
    assert not machine.interrupts.level(gsi)
    assert machine.mmio.read(driver.regions[t.CAP_ISR][0], 1) == 0


def test_the_bar_through_configuration_space(driver):
    """4.1.4.9: how firmware reaches a device whose BAR it cannot map."""
    at = next(at for kind, at in driver.capabilities() if kind == 9 and driver.config(at + 3, 1) == t.CAP_PCI)

    def reach(offset, size, value=None):
        driver.config(at + 4, 1, 0)
        driver.config(at + 8, 4, offset)
        driver.config(at + 12, 4, size)
        return driver.config(at + 16, 4, value)

    assert reach(t.NUM_QUEUES, 2) == 2
    reach(t.QUEUE_SELECT, 2, 1)
    assert driver.common(t.QUEUE_SELECT, 2) == 1
    assert reach(t.QUEUE_SIZE, 2) == 16
    for offset, size in ((0x7FFE, 4), (1, 4), (0, 3), (0xFFFFFFFC, 4), (0, 0)):
        reach(offset, size, 0xFFFFFFFF)
    assert driver.status == 0


def test_registers_of_no_queue_read_as_nothing(driver):
    driver.common(t.QUEUE_SELECT, 2, 99)
    assert driver.common(t.QUEUE_SIZE, 2) == 0  # "unavailable" (4.1.4.3.2)
    driver.common(t.QUEUE_ENABLE, 2, 1)
    driver.common(t.QUEUE_SIZE, 2, 4)
    assert driver.common(t.QUEUE_SIZE, 2) == 0


def test_vhost_takes_the_kicks_and_gives_them_back(driver):
    driver.start(VERSION_1)
    driver.use_msix(3)
    transport = driver.pci
    fd = transport.notifier_fd(0)
    driver.queues[0].add([b"x"], [1])
    driver.kick(0)
    assert os.eventfd_read(fd) == 1
    assert not driver.queues[0].collect()
    call = transport.interrupt_fd(0)
    os.eventfd_write(call, 1)
    transport.release_notifier(0)
    driver.machine.turn()
    assert len(driver.queues[0].collect()) == 1


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | RING_PACKED | EVENT_IDX])
def test_a_device_goes_on_in_another_machine(driver, features):
    driver.start(features)
    driver.use_msix(3)
    assert driver.request(0, [b"before"], [6]) == b"before"
    driver.pci.pause()
    driver.queues[0].add([b"during"], [6])
    driver.kick(0)
    assert not driver.queues[0].collect()
    other = MockMachine()
    try:
        moved = other.add_virtio(Echo())
        moved.pci.restore(driver.pci.state())
        assert moved.pci.state() == driver.pci.state()
        other.memory.write(0, driver.machine.memory.read(0, 16 << 20))
        moved.pci.resume()
        other.turn()
        moved.queues = driver.queues
        for queue in moved.queues:
            queue.memory = other.memory
        assert [done.data for done in moved.queues[0].collect()] == [b"during"]
        assert moved.request(1, [b"after"], [5]) == b"after"
        assert other.interrupts.sent[-1] == (0xFEE00000, 2)
    finally:
        other.close()


def test_a_state_of_another_device_is_refused(driver, machine):
    class Other(Echo):
        device_id = 0x40

    other = machine.add_virtio(Other("other0"))
    with pytest.raises(ValueError, match="PCI device"):
        other.pci.restore(driver.pci.state())


def test_reset_is_power_on(driver):
    fresh = driver.pci.state()
    driver.start()
    driver.use_msix(3)
    driver.request(0, [b"x"], [1])
    driver.machine.pci.reset()
    driver.config(0x04, 2, 0x406)
    after = driver.pci.state()
    assert {key: after[key] for key in ("msix", "virtio", "interrupt", "config")} == {
        key: fresh[key] for key in ("msix", "virtio", "interrupt", "config")
    }


def test_random_register_writes_do_nothing_worse_than_break_the_device():
    """Configuration space, the whole BAR, queues: 20,000 random accesses, then a reset must bring the device back."""
    machine = MockMachine()
    try:
        driver = machine.add_virtio(Echo())
        dice = random.Random(7)
        bar = driver.regions[t.CAP_COMMON][0]
        for number in range(20_000):
            size = dice.choice((1, 2, 4, 8))
            value = dice.choice((0, 1, 2, 3, 0xFFFFFFFF, dice.getrandbits(8), dice.getrandbits(8 * size)))
            value &= (1 << 8 * size) - 1
            kind = dice.random()
            if kind < 0.6:
                machine.mmio.write(bar + dice.choice((dice.randrange(64), dice.randrange(0x8000))), size, value)
            elif kind < 0.7:
                machine.mmio.read(bar + dice.randrange(0x8000), size)
            elif kind < 0.8:
                driver.config(dice.randrange(4096), size, value)
            elif kind < 0.9:
                machine.memory.write(dice.randrange(1 << 16), struct.pack("<Q", dice.getrandbits(64)))
            else:
                machine.turn(1)
            if number % 500 == 0:
                machine.pci.reset()
                driver.config(0x04, 2, 0x406)
                driver.start(VERSION_1 | dice.choice((0, RING_PACKED, EVENT_IDX | INDIRECT_DESC)))
        machine.pci.reset()
        driver.config(0x04, 2, 0x406)
        driver.start(VERSION_1)
        assert driver.request(0, [b"alive"], [5]) == b"alive"
    finally:
        machine.close()


def test_a_fault_in_activate_is_contained(machine):
    class Broken(Echo):
        def activate(self):
            raise GuestFault("cannot be")

    driver = machine.add_virtio(Broken("broken0"))
    driver.start(VERSION_1)
    assert driver.status & t.NEEDS_RESET
