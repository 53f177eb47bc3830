"""A network card between a mock driver and the far end of a socket: no KVM, no tap, no network of the host."""

from __future__ import annotations

import os
import socket

from kvik.vmm.backends.netsocket import socket_backend
from kvik.vmm.loop import EventLoop
from kvik.vmm.memory import GuestMemory
from kvik.vmm.virtio import net
from kvik.vmm.virtio.mock import MockDriver
from kvik.vmm.virtio.net import NetDevice
from kvik.vmm.virtio.queue import EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED, VERSION_1

HEADER = bytes(12)
MAC = "52:54:00:12:34:56"
RINGS = [0, EVENT_IDX, EVENT_IDX | INDIRECT_DESC, RING_PACKED, RING_PACKED | EVENT_IDX, EVENT_IDX | IN_ORDER]
FULL = net.F_MRG_RXBUF | net.F_CTRL_VQ | net.F_STATUS | net.F_MAC | net.F_GUEST_ANNOUNCE


class FakeMachine:
    still = False

    def __init__(self, memory, loop):
        self.memory, self.loop = memory, loop
        self.logged, self.events = [], []

    def log(self, text):
        self.logged.append(text)

    def emit(self, name, data=None):
        self.events.append((name, data))


class FakeTransport:
    """Counts interrupts; `bells[i]` is what the driver waits on."""

    def __init__(self, device, count):
        self.device = device
        self.bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        self.changes = 0
        self.broken = False

    def config_changed(self, change=None):
        if change is not None:
            change()
        self.changes += 1

    def signal_queue(self, index):
        os.eventfd_write(self.bells[index], 1)

    def needs_reset(self):
        self.broken = True


class Rig:
    """A device between a mock driver and the far end of a socket."""

    def __init__(self, features=0, *, backend=None, kind=socket.SOCK_DGRAM, loop=None, size=64, **named):
        self.far, near = socket.socketpair(socket.AF_UNIX, kind)
        self.far.settimeout(10)
        self.memory = GuestMemory.allocate(16 << 20)
        self.loop = loop or EventLoop()
        self.machine = FakeMachine(self.memory, self.loop)
        self.device = NetDevice("net0", backend or socket_backend(near.detach()), MAC, queue_size=size, **named)
        self.transport = self.device.transport = FakeTransport(self.device, 3)
        self.device.attach(self.machine)
        self.start(features)

    def start(self, features):
        device = self.device
        device.make_queues(features)
        self.drivers = []
        for index, queue in enumerate(device.queues):
            driver = MockDriver(self.memory, queue, base=(1 + index) << 22, area=4 << 20, features=features)
            driver.ask(interrupts=True)
            queue.notify = lambda index=index: self.transport.signal_queue(index)
            self.drivers.append(driver)
        self.rx, self.tx, self.control = self.drivers
        device.start(features | VERSION_1)

    def turn(self, times=8):
        for _ in range(times):
            self.loop.run_once(0)

    def kick(self, index):
        if self.drivers[index].wants_kick():
            self.device.kick(index)

    def command(self, kind, number, data=b""):
        self.control.add([bytes([kind, number]), data] if data else [bytes([kind, number])], [1])
        self.device.kick(2)
        (done,) = self.control.collect()
        return done.data == b"\0"

    def send(self, *frames):
        for frame in frames:
            self.tx.add([HEADER + frame])
        self.kick(1)

    def close(self):
        self.device.close()
        self.loop.close()
        self.far.close()
