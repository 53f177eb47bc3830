"""The five devices of examples/devices, each used as its guest would."""

import errno
import sys
import time
from pathlib import Path

import pytest

from kvik.vmm.virtio.blk import Blk
from kvik.vmm.virtio.mock_machine import MockMachine

EXAMPLES = Path(__file__).parents[3] / "examples" / "devices"


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def machine():
    machine = MockMachine()
    yield machine
    machine.close()


def test_the_dice(machine):
    from dice import Dice

    machine.add(Dice("dice0"))
    assert {machine.ports.read(0x5F0, 1) for _ in range(300)} == {1, 2, 3, 4, 5, 6}
    machine.ports.write(0x5F0, 1, 0)
    assert machine.ports.read(0x5F0, 1) == 1
    device = machine.devices["dice0"]
    assert device.stats() == {"throws": 301}
    other = Dice("dice1")
    other.restore(device.state())
    assert other.sides == 1


def test_the_metronome(machine):
    from metronome import Metronome

    machine.add(Metronome("metronome0"))
    machine.mmio.write(0xFEB80000, 4, 200)
    end = time.monotonic() + 10
    while not machine.interrupts.level(10) and time.monotonic() < end:
        machine.loop.run_once(0.01)
    assert machine.interrupts.level(10)
    assert machine.mmio.read(0xFEB80004, 4) >= 1
    assert not machine.interrupts.level(10)
    machine.mmio.write(0xFEB80000, 4, 1)
    assert machine.mmio.read(0xFEB80000, 4) == 100
    machine.mmio.write(0xFEB80000, 4, 0)
    machine.turn()
    machine.mmio.read(0xFEB80004, 4)
    machine.loop.run_once(0.02)
    assert machine.mmio.read(0xFEB80004, 4) == 0


def test_the_adder(machine):
    from adder import Adder

    device = Adder("adder0")
    machine.add(device)
    place = 0xE0000000 + (device.slot << 15)
    machine.mmio.write(place + 4, 2, 2)
    table, bar = device.bar_address(4), device.bar_address(0)
    for position, value in enumerate((0xFEE00000, 0, 0x55, 0)):
        machine.mmio.write(table + 4 * position, 4, value)
    machine.mmio.write(place + machine.mmio.read(place + 0x34, 1) + 2, 2, 0x8000)
    machine.mmio.write(bar, 4, 0xFFFFFFFF)
    assert machine.interrupts.sent == []
    machine.mmio.write(bar, 4, 3)
    assert machine.interrupts.sent == [(0xFEE00000, 0x55)]
    assert (machine.mmio.read(bar + 4, 4), machine.mmio.read(bar + 8, 4)) == (2, 1)


def test_the_repeatable_entropy(machine):
    from repeatable_entropy import RepeatableEntropy

    first = machine.add_virtio(RepeatableEntropy("one", seed=7))
    second = machine.add_virtio(RepeatableEntropy("two", seed=7))
    first.start()
    second.start(base=0x400000)
    a = first.request(0, [], [100])
    assert a == second.request(0, [], [100]) != bytes(100)
    third = RepeatableEntropy("three")
    machine.add_virtio(third).pci.restore(first.pci.state())
    assert third.source.randbytes(8) == machine.devices["one"].source.randbytes(8)


def test_the_faulty_disk(machine, tmp_path):
    from faulty_disk import FaultyImage

    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    image = FaultyImage(str(path))
    driver = machine.add_virtio(Blk("disk0", image, rerror="report", werror="report"))
    driver.start()

    def request(kind, sector, data=b"", size=0):
        header = kind.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little")
        driver.queues[0].add([header, data] if data else [header], [size, 1] if size else [1])
        driver.kick(0)
        end = time.monotonic() + 10
        while not (done := driver.queues[0].collect()) and time.monotonic() < end:
            machine.loop.run_once(0.01)
        return done[0].data[-1]

    assert request(1, 5, b"x" * 512) == 0
    image.fail(first=4, last=8)
    assert request(1, 5, b"y" * 512) == 1  # VIRTIO_BLK_S_IOERR
    assert request(0, 5, size=512) == 1
    assert request(0, 9, size=512) == 0
    image.fail(every=2, number=errno.ENOSPC)
    assert sorted(request(1, 100, b"z" * 512) for _ in range(4)) == [0, 0, 1, 1]
    image.heal()
    assert request(0, 5, size=512) == 0
    assert path.read_bytes()[5 * 512 : 6 * 512] == b"x" * 512
