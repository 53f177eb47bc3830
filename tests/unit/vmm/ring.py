"""A driver for unit tests: builds descriptor chains in guest memory by hand, also ones that no driver would build."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from kvik.vmm.layout import MIB
from kvik.vmm.loop import EventLoop
from kvik.vmm.memory import GuestMemory
from kvik.vmm.virtio.device import VirtioDevice
from kvik.vmm.virtio.queue import DESC_NEXT, DESC_WRITE, EVENT_IDX, VERSION_1

RING_SPACE = 0x8000
DATA = 0x20_0000


class FakeMachine:
    """What a device asks of a machine."""

    def __init__(self, size: int = 32 * MIB, **more: Any) -> None:
        self.memory = GuestMemory.allocate(size, **more)
        self.loop = EventLoop()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.lines: list[str] = []
        self.stopped = ""
        self.regions: list[Any] = []

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        self.events.append((name, data or {}))

    def log(self, text: str) -> None:
        self.lines.append(text)

    def request_stop(self, status: str, event: str = "", data: dict[str, Any] | None = None) -> None:
        self.stopped = status
        self.emit(event, data)

    def back(self, region: Any) -> None:
        self.regions.append(region)

    def unback(self, region: Any) -> None:
        self.regions.remove(region)


class FakeTransport:
    def __init__(self) -> None:
        self.signals: list[int] = []
        self.config_changes = 0
        self.resets = 0

    def config_changed(self, change: Any = None) -> None:
        if change is not None:
            change()
        self.config_changes += 1

    def signal_queue(self, index: int) -> None:
        self.signals.append(index)

    def signal_config(self) -> None:
        self.config_changes += 1

    def needs_reset(self) -> None:
        self.resets += 1

    def notifier_fd(self, index: int) -> int:
        raise NotImplementedError

    def release_notifier(self, index: int) -> None:
        raise NotImplementedError

    def interrupt_fd(self, index: int) -> int | None:
        raise NotImplementedError


class Driver:
    """Drives one device: `put` a chain, `kick`, `take` what came back. Descriptors are never reused."""

    transport_class = FakeTransport

    def __init__(self, device: VirtioDevice, features: int = -1, *, machine: Any = None) -> None:
        self.device = device
        self.machine = machine if machine is not None else FakeMachine()
        self.memory = self.machine.memory
        self.transport = self.transport_class()
        device.transport = self.transport
        device.attach(self.machine)
        self.start(features)
        self.next_data = DATA

    def start(self, features: int = -1, before: Callable[[], None] = lambda: None) -> None:
        """`before`: what the driver does before DRIVER_OK."""
        device = self.device
        acked = (device.features if features < 0 else features) | VERSION_1 | device.ring_features & EVENT_IDX
        device.make_queues(acked)
        self.free = [0] * len(device.queues)
        self.avail = [0] * len(device.queues)
        self.kicked = [0] * len(device.queues)
        self.used = [0] * len(device.queues)
        for queue in device.queues:
            base = RING_SPACE * (1 + queue.index)
            self.memory.write(base, bytes(RING_SPACE))
            queue.desc, queue.avail, queue.used = base, base + 0x5000, base + 0x6000
            queue.notify = lambda index=queue.index: self.transport.signals.append(index)
            queue.start(acked)
        before()
        device.start(acked)

    def space(self, size: int, content: bytes = b"") -> int:
        address = self.next_data
        self.next_data += (size + 4095) & -4096
        if content:
            self.memory.write(address, content)
        return address

    def put(self, index: int, parts: list[tuple[int, int, bool]]) -> int:
        """A chain of (address, length, device writes); the head's number."""
        queue = self.device.queues[index]
        head = slot = self.free[index]
        for number, (address, length, writable) in enumerate(parts):
            last = number == len(parts) - 1
            flags = (DESC_WRITE if writable else 0) | (0 if last else DESC_NEXT)
            packed = struct.pack("<QIHH", address, length, flags, (slot + 1) % queue.size if not last else 0)
            self.memory.write(queue.desc + 16 * slot, packed)
            slot = (slot + 1) % queue.size
        self.free[index] = slot
        self.memory.put_u16(queue.avail + 4 + 2 * (self.avail[index] % queue.size), head)
        self.avail[index] += 1
        self.memory.put_u16(queue.avail + 2, self.avail[index] & 0xFFFF)
        return head

    def kick(self, index: int) -> None:
        """Kick, if the device asked for it as 2.7.10 has it: a device that forgets to ask stands still here too."""
        queue = self.device.queues[index]
        new, old = self.avail[index], self.kicked[index]
        if queue.event_idx:
            event = self.memory.u16(queue.used + 4 + 8 * queue.size)
            wanted = (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            wanted = not self.memory.u16(queue.used) & 1
        self.kicked[index] = new
        if wanted:
            self.device.kick(index)

    def take(self, index: int) -> list[tuple[int, int]]:
        """(head, written) of what the device gave back since."""
        queue = self.device.queues[index]
        out = []
        while self.used[index] & 0xFFFF != self.memory.u16(queue.used + 2):
            entry = queue.used + 4 + 8 * (self.used[index] % queue.size)
            out.append((self.memory.u32(entry), self.memory.u32(entry + 4)))
            self.used[index] += 1
        return out

    def spin(self, rounds: int = 3) -> None:
        """Let the loop do what is due."""
        for _ in range(rounds):
            self.machine.loop.run_once(0.01)

    def close(self) -> None:
        self.device.close()
        for queue in self.device.queues:
            queue.reset()
