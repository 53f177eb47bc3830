"""A hostile guest for each virtio and PCI device: registers, configuration space, BARs and rings at random.

    PYTHONPATH=src python fuzz/vmm_devices.py                       # every device, 20,000 operations
    PYTHONPATH=src python fuzz/vmm_devices.py --operations 1000000 --device rng --seed 5

A device may break (needs reset), nothing else: an exception that reaches the machine ends the run, with the seed that
brings it back. Once it broke, and after every thousand operations, the machine is
reset, and the device must start again and take a kick.

A new device is a line in TARGETS: a name and a function that makes it (it may keep files in `directory`).
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kvik.vmm import layout
from kvik.vmm.pci.device import Bar, PciDevice
from kvik.vmm.virtio import transport as t
from kvik.vmm.virtio.device import VirtioDevice
from kvik.vmm.virtio.mock_machine import MockMachine, VirtioDriver
from kvik.vmm.virtio.queue import EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED, RING_RESET, VERSION_1

MEMORY = 16 << 20
RINGS = 0x10000
AREA = 1 << 18
ROUND = 1000  # operations between two resets
REGISTERS = (*range(0, 40, 4), 16, 20, 20, 20, 22, 22, 24, 26, 28, 28, 32, 36, 40, 48, 58)


class Plain(PciDevice):
    """A PCI device with every kind of BAR."""

    kind, device_id = "plain", 0x0001
    bars = (Bar(0, 4096), Bar(1, 64, "io"), Bar(2, 1 << 16, "mem64"))
    msix_vectors, intx, express = 4, True, True

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        self.msix.signal(value & 7)


def rng(directory: Path) -> VirtioDevice:
    from kvik.vmm.virtio.rng import Rng

    return Rng("fuzzed")


def blk(directory: Path) -> VirtioDevice:
    from kvik.vmm.backends.block import BlockImage
    from kvik.vmm.virtio.blk import Blk

    disk = directory / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    return Blk("fuzzed", BlockImage(str(disk), locking=False), queues=2)


def balloon(directory: Path) -> VirtioDevice:
    from kvik.vmm.virtio.balloon import Balloon

    return Balloon("fuzzed")


def plain(directory: Path) -> PciDevice:
    return Plain("fuzzed")


TARGETS: dict[str, Callable[[Path], VirtioDevice | PciDevice]] = {
    "rng": rng,
    "blk": blk,
    "balloon": balloon,
    "pci": plain,
}


class HostileGuest:
    """One device in one machine, and a guest that does to it what comes to its mind."""

    def __init__(self, make: Callable[[Path], VirtioDevice | PciDevice], directory: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.machine = MockMachine(MEMORY)
        self.machine.loop.on_error = self._failed
        device = make(directory)
        self.driver: VirtioDriver | None = None
        if isinstance(device, VirtioDevice):
            self.driver = self.machine.add_virtio(device)
            self.pci = self.driver.pci
        else:
            self.machine.add(device)
            self.pci = device
        self.place = layout.ECAM + (self.pci.slot << 15)
        self.error: BaseException | None = None
        self.faults = 0

    def _failed(self, error: BaseException) -> None:
        self.error = error

    def run(self, operations: int) -> None:
        """Raises what the device raised."""
        actions: list[Callable[[], None]] = [self.registers, self.configuration, self.bar, self.moves]
        if self.driver is not None:
            actions += [
                self.rings,
                self.rings,
                self.chain,
                self.chain,
                self.chain,
                self.kick,
                self.kick,
                self.registers,
            ]
        for number in range(operations):
            if number % ROUND == 0:
                self.again()
            self.dice.choice(actions)()
            if self.error is not None:
                raise self.error
            if self.driver is not None and not self.pci.device.active and self.dice.random() < 0.1:  # type: ignore[attr-defined]
                self.again()
        self.again()

    def again(self) -> None:
        """Power-on; what broke before must work now."""
        self.machine.turn(2)
        self.machine.pci.reset()
        self.machine.mmio.write(self.place + 4, 2, 0x406)
        if self.driver is None:
            return
        device = self.pci.device  # type: ignore[attr-defined]
        self.faults = device.faults
        chosen = self.driver.offered() & ~(RING_PACKED | IN_ORDER | EVENT_IDX | INDIRECT_DESC | RING_RESET)
        for feature in (RING_PACKED, IN_ORDER, EVENT_IDX, INDIRECT_DESC, RING_RESET):
            if self.dice.random() < 0.5:
                chosen |= self.driver.offered() & feature
        size = min(self.dice.choice((4, 16, 64)), *device.queue_sizes)
        self.driver.start(chosen | VERSION_1, size=size, base=RINGS, area=AREA)
        assert device.active, f"it does not come back after a reset: {device.broken}"
        self.driver.kick(0)

    # --- what it does

    def _value(self, size: int) -> int:
        dice = self.dice
        value = dice.choice(
            (0, 1, 2, 3, 4, 8, 15, 0xFF, 0xFFFF, 0xFFFFFFFF, dice.getrandbits(16), dice.getrandbits(64))
        )
        return value & (1 << 8 * size) - 1

    def registers(self) -> None:
        bar = self.pci.bar_address(0)
        size = self.dice.choice((1, 2, 4, 4, 8))
        offset = self.dice.choice((*REGISTERS, self.dice.randrange(0x8000)))
        if self.dice.random() < 0.9:
            self.machine.mmio.write(bar + offset, size, self._value(size))
        else:
            self.machine.mmio.read(bar + offset, size)

    def configuration(self) -> None:
        size = self.dice.choice((1, 2, 4))
        offset = self.dice.choice((0x04, 0x10, 0x3C, self.dice.randrange(0x100), self.dice.randrange(4096)))
        self.machine.mmio.write(self.place + offset, size, self._value(size))
        self.machine.mmio.read(self.place + offset, size)

    def bar(self) -> None:
        start, size, _ = self.dice.choice(self.machine.mmio.ranges())
        width = self.dice.choice((1, 2, 4, 8))
        self.machine.mmio.write(start + self.dice.randrange(size), width, self._value(width))

    def moves(self) -> None:
        """The BAR elsewhere, and mostly back where it is found."""
        place = self.dice.choice((layout.PCI32, layout.PCI32 + 0x100000, 0xD0000000, 0, layout.ECAM))
        self.machine.mmio.write(self.place + 0x10, 4, place)
        self.machine.mmio.write(self.place + 4, 2, self.dice.choice((0x406, 0x6, 0x2, 0x407)))

    def rings(self) -> None:
        """Anything anywhere in the first queue's rings."""
        assert self.driver is not None
        queue = self.dice.choice(self.driver.queues)
        place = self.dice.randrange(queue.desc, queue.buffers - 8)
        self.machine.memory.write(place, struct.pack("<Q", self._value(8)))

    def chain(self) -> None:
        """A request that is nearly right."""
        assert self.driver is not None
        dice, queue = self.dice, self.dice.choice(self.driver.queues)
        parts = []
        for _ in range(dice.randrange(1, 6)):
            address = dice.choice((queue.buffers, queue.buffers + dice.randrange(4096), dice.randrange(MEMORY + 4096)))
            length = dice.choice(
                (1, 8, 16, 512, 4096, dice.randrange(1, 1 << 16), 0xFFFFFFFF if dice.random() < 0.1 else 4)
            )
            parts.append((address, length, dice.choice((0, 2, 2))))
        if dice.random() < 0.9:
            parts.sort(key=lambda part: part[2])
        header = struct.pack("<IIQ", dice.choice((0, 1, 4, 8, 11, 13, dice.getrandbits(32))), 0, dice.randrange(4096))
        self.machine.memory.write(queue.buffers, header)
        try:
            queue.add_raw(parts)
        except (ValueError, IndexError):
            queue.rewind()  # the driver's own view of its ring is worn out

    def kick(self) -> None:
        assert self.driver is not None
        index = self.dice.randrange(len(self.driver.queues))
        self.machine.mmio.write(self.pci.bar_address(0) + t.NOTIFY + 4 * index, self.dice.choice((2, 2, 4)), index)
        self.machine.turn(1)


def fuzz(name: str, operations: int, seed: int) -> int:
    """Faults that the device reported. Raises what it should have caught."""
    with tempfile.TemporaryDirectory() as directory:
        guest = HostileGuest(TARGETS[name], Path(directory), seed)
        try:
            guest.run(operations)
            return guest.faults
        finally:
            guest.machine.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--operations", type=int, default=20_000)
    parser.add_argument("--device", choices=sorted(TARGETS), action="append")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    for name in arguments.device or sorted(TARGETS):
        began = time.monotonic()
        try:
            faults = fuzz(name, arguments.operations, arguments.seed)
        except BaseException:
            print(f"{name}: failed; again with --device {name} --seed {arguments.seed}", file=sys.stderr)
            raise
        seconds = time.monotonic() - began
        print(
            f"{name:12} {arguments.operations:9} operations, {faults:6} faults contained, {seconds:6.1f} s", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
