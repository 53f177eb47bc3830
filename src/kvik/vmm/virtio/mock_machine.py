"""A machine without KVM, and a driver for its virtio devices: for unit tests and fuzzers, never part of a machine.

machine = MockMachine()
driver = machine.add_virtio(Echo("echo0"))   # on the PCI bus, reached through its configuration space
driver.start()                               # negotiates, sets all queues up, DRIVER_OK
driver.queues[0].add([b"ping"], [4])         # a MockDriver for each queue
driver.kick(0)                               # as the guest would; runs the loop
assert driver.queues[0].collect()[0].data == b"ping"
"""

from __future__ import annotations

from kvik.vmm import layout
from kvik.vmm.bus import Bus
from kvik.vmm.interrupts import Doorbells, Interrupts
from kvik.vmm.loop import EventLoop
from kvik.vmm.memory import GuestMemory
from kvik.vmm.pci.bus import PciBus
from kvik.vmm.pci.device import PciDevice
from kvik.vmm.virtio import transport as t
from kvik.vmm.virtio.mock import MockDriver

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.vmm.memory import Region
    from kvik.vmm.virtio.device import VirtioDevice

__all__ = ["MockMachine", "VirtioDriver"]


class MockMachine:
    """What a device needs of a machine. `logged`, `events` and `interrupts.sent` hold what came out."""

    still = False

    def __init__(self, memory: int = 16 << 20, hotplug: int = 0) -> None:
        self.memory = GuestMemory.allocate(memory, hotplug=hotplug)
        self.mmio = Bus("memory", 1 << 52)
        self.ports = Bus("port", 1 << 16)
        self.interrupts = Interrupts(None)
        self.doorbells = Doorbells(None)
        self.loop = EventLoop()
        self.devices: dict[str, Any] = {}
        self.logged: list[str] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.pci = PciBus()
        self.pci.attach(self)  # type: ignore[arg-type]  # quacks like one

    def log(self, text: str) -> None:
        self.logged.append(text)

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        self.events.append((name, data or {}))

    def back(self, region: Region, flags: int = 0) -> None:
        """No KVM that would want to know of it."""

    def unback(self, region: Region) -> None: ...

    def add(self, device: Any) -> None:
        """A port or MMIO device, or one on the PCI bus."""
        if isinstance(device, PciDevice):
            self.pci.add(device)
        else:
            device.attach(self)
        self.devices[device.name] = device

    def add_virtio(self, device: VirtioDevice, slot: int | None = None) -> VirtioDriver:
        self.pci.add(t.VirtioPci(device), slot)
        self.devices[device.name] = device
        return VirtioDriver(self, self.pci.find(device.name))

    def remove(self, name: str) -> None:
        self.devices.pop(name).close()

    def turn(self, rounds: int = 4) -> None:
        """Let the loop deal with what is there."""
        for _ in range(rounds):
            self.loop.run_once(0)

    def close(self) -> None:
        for device in list(self.devices.values()):
            device.close()
        self.pci.close()
        self.loop.close()
        self.memory.close()


class VirtioDriver:
    """Finds a virtio device's registers as a guest does: through ECAM, its capabilities and BARs."""

    def __init__(self, machine: MockMachine, device: PciDevice) -> None:
        self.machine = machine
        self.pci = device
        self.place = layout.ECAM + (device.slot << 15 | device.function << 12)
        self.regions: dict[int, tuple[int, int]] = {}  # cfg_type -> address, length
        self.multiplier = 0
        self.queues: list[MockDriver] = []
        self.config(0x04, 2, 0x406)  # memory, bus master, no INTx
        self.find()

    def config(self, offset: int, size: int, value: int | None = None) -> int:
        """Read, or write, configuration space."""
        if value is None:
            return self.machine.mmio.read(self.place + offset, size)
        self.machine.mmio.write(self.place + offset, size, value)
        return value

    def capabilities(self) -> list[tuple[int, int]]:
        """(id, offset) of each capability."""
        found, at = [], self.config(0x34, 1)
        while at:
            found.append((self.config(at, 1), at))
            at = self.config(at + 1, 1)
        return found

    def find(self) -> None:
        for kind, at in self.capabilities():
            if kind == 0x09:
                bar = self.config(0x10 + 4 * self.config(at + 4, 1), 4) & ~0xF
                self.regions[self.config(at + 3, 1)] = (bar + self.config(at + 8, 4), self.config(at + 12, 4))
                if self.config(at + 3, 1) == t.CAP_NOTIFY:
                    self.multiplier = self.config(at + 16, 4)

    def common(self, offset: int, size: int, value: int | None = None) -> int:
        """Read, or write, a register of the common configuration."""
        address = self.regions[t.CAP_COMMON][0] + offset
        if value is None:
            return self.machine.mmio.read(address, size)
        self.machine.mmio.write(address, size, value)
        return value

    @property
    def status(self) -> int:
        return self.common(t.DEVICE_STATUS, 1)

    def offered(self) -> int:
        value = 0
        for half in range(2):
            self.common(t.DEVICE_FEATURE_SELECT, 4, half)
            value |= self.common(t.DEVICE_FEATURE, 4) << 32 * half
        return value

    def negotiate(self, features: int) -> bool:
        """Reset, choose features; whether the device accepted them."""
        self.common(t.DEVICE_STATUS, 1, 0)
        self.common(t.DEVICE_STATUS, 1, t.ACKNOWLEDGE)
        self.common(t.DEVICE_STATUS, 1, t.ACKNOWLEDGE | t.DRIVER)
        for half in range(2):
            self.common(t.DRIVER_FEATURE_SELECT, 4, half)
            self.common(t.DRIVER_FEATURE, 4, features >> 32 * half & 0xFFFFFFFF)
        self.common(t.DEVICE_STATUS, 1, t.ACKNOWLEDGE | t.DRIVER | t.FEATURES_OK)
        return bool(self.status & t.FEATURES_OK)

    def start(self, features: int | None = None, *, size: int = 0, base: int = 0x10000, area: int = 1 << 20) -> None:
        """Everything until DRIVER_OK. Queue i has its rings and buffers at base + i * area; `size`: of its ring."""
        if features is None:
            features = self.offered()
        assert self.negotiate(features), "FEATURES_OK was refused"
        device: VirtioDevice = self.pci.device  # type: ignore[attr-defined]  # a virtio one
        self.queues = []
        for index, queue in enumerate(device.queues):
            self.common(t.QUEUE_SELECT, 2, index)
            if size:
                self.common(t.QUEUE_SIZE, 2, size)
            driver = MockDriver(
                self.machine.memory, queue, base=base + index * area, area=area, features=features, start=False
            )
            self.set_queue(driver)
            self.queues.append(driver)
        self.common(t.DEVICE_STATUS, 1, t.ACKNOWLEDGE | t.DRIVER | t.FEATURES_OK | t.DRIVER_OK)

    def set_queue(self, driver: MockDriver) -> None:
        """Tell the selected queue's addresses in halves, as drivers do, and enable it."""
        for offset, address in (
            (t.QUEUE_DESC, driver.desc),
            (t.QUEUE_DRIVER, driver.avail),
            (t.QUEUE_DEVICE, driver.used),
        ):
            self.common(offset, 4, address & 0xFFFFFFFF)
            self.common(offset + 4, 4, address >> 32)
        self.common(t.QUEUE_ENABLE, 2, 1)

    def kick(self, index: int, turn: bool = True) -> None:
        """Notify a queue, and let the loop work."""
        self.machine.mmio.write(self.regions[t.CAP_NOTIFY][0] + self.multiplier * index, 2, index)
        if turn:
            self.machine.turn()

    def request(self, index: int, readable: list[bytes], writable: list[int]) -> bytes:
        """One request, start to end; what the device wrote. AssertionError if it was not answered."""
        self.queues[index].add(readable, writable)
        if self.queues[index].wants_kick():  # else the device promised to look
            self.kick(index)
        done = self.queues[index].collect()
        assert len(done) == 1, f"{len(done)} requests answered; {self.machine.logged}"
        return done[0].data

    def use_msix(self, vectors: int) -> None:
        """Enable MSI-X: vector i sends (0xFEE00000, i); queue i gets vector i + 1, configuration changes 0."""
        for kind, at in self.capabilities():
            if kind == 0x11:
                word = self.config(at + 4, 4)
                table = (self.config(0x10 + 4 * (word & 7), 4) & ~0xF) + (word & ~7)
                for vector in range(vectors):
                    for position, value in enumerate((0xFEE00000, 0, vector, 0)):
                        self.machine.mmio.write(table + 16 * vector + 4 * position, 4, value)
                self.config(at + 2, 2, 0x8000)
        self.common(t.CONFIG_VECTOR, 2, 0)
        for index in range(self.common(t.NUM_QUEUES, 2)):
            self.common(t.QUEUE_SELECT, 2, index)
            self.common(t.QUEUE_VECTOR, 2, index + 1)
