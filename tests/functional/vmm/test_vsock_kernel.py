"""virtio-vsock on the kernel's vhost-vsock: AF_VSOCK sockets of the host at one end, the mock as guest at the other."""

from __future__ import annotations

import os
import select
import socket

import pytest

from kvik.errors import HostError
from kvik.vmm.loop import EventLoop
from kvik.vmm.memory import GuestMemory
from kvik.vmm.virtio.mock import MockDriver
from kvik.vmm.virtio.queue import VERSION_1
from kvik.vmm.virtio.vsock import REQUEST, RESPONSE, RST, RW, SHUTDOWN
from kvik.vmm.virtio.vsock_vhost import VhostVsockDevice
from kvik.vmm.virtio.vsockstream import HEADER_SIZE, Header

pytestmark = pytest.mark.root
CID = 77


class Machine:
    still = False

    def __init__(self):
        self.memory, self.loop, self.logged = GuestMemory.allocate(16 << 20), EventLoop(), []

    def log(self, text):
        self.logged.append(text)


class Transport:
    def __init__(self):
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]

    def notifier_fd(self, index):
        return self.kicks[index]

    def release_notifier(self, index):
        pass

    def interrupt_fd(self, index):
        return self.calls[index]

    def signal_queue(self, index):
        os.eventfd_write(self.calls[index], 1)

    def needs_reset(self):
        raise AssertionError("the device broke")


class Guest:
    def __init__(self):
        self.machine = Machine()
        self.device = VhostVsockDevice("vsock0", CID)
        self.transport = self.device.transport = Transport()
        self.device.attach(self.machine)
        self.device.make_queues()
        self.drivers = [
            MockDriver(self.machine.memory, queue, base=(1 + index) << 22, area=4 << 20)
            for index, queue in enumerate(self.device.queues)
        ]
        for driver in self.drivers:
            driver.ask(interrupts=True)
        for _ in range(32):
            self.drivers[0].add([], [4096])
        self.device.start(VERSION_1)
        self.turn()
        self.kick(0)

    def turn(self):
        for _ in range(5):
            self.machine.loop.run_once(0)

    def kick(self, index):
        os.eventfd_write(self.transport.kicks[index], 1)

    def send(self, op, source, target, data=b"", flags=0):
        header = Header(CID, 2, source, target, len(data), 1, op, flags, 65536, 0)
        self.drivers[1].add([header.pack() + data])
        self.kick(1)

    def receive(self, op):
        """Wait for the next packet of that kind."""
        while True:
            for done in self.drivers[0].collect():
                header = Header.unpack(done.data[:HEADER_SIZE])
                if header.op == op:
                    return header, done.data[HEADER_SIZE:]
            assert select.select([self.transport.calls[0]], [], [], 20)[0], f"no packet of kind {op}"
            os.eventfd_read(self.transport.calls[0])

    def close(self):
        self.device.close()
        self.machine.loop.close()


@pytest.fixture
def guest():
    if not os.path.exists("/dev/vhost-vsock"):
        pytest.skip("this kernel has no vhost-vsock: runs in the lab")
    one = Guest()
    yield one
    one.close()


def test_the_guest_reaches_a_program_of_the_host(guest):
    with socket.socket(socket.AF_VSOCK) as server:
        server.bind((socket.VMADDR_CID_ANY, 4000))
        server.listen()
        server.settimeout(20)
        guest.send(REQUEST, 1000, 4000)
        guest.receive(RESPONSE)
        peer, address = server.accept()
        assert address == (CID, 1000)
        guest.send(RW, 1000, 4000, b"hello")
        assert peer.recv(10) == b"hello"
        peer.send(b"welcome")
        assert guest.receive(RW)[1] == b"welcome"
        peer.close()
        guest.receive(SHUTDOWN)


def test_nobody_listens(guest):
    guest.send(REQUEST, 1000, 4001)
    header, _ = guest.receive(RST)
    assert (header.source_port, header.target_port) == (4001, 1000)


def test_the_position_survives_a_pause(guest):
    for number in range(10):
        guest.send(REQUEST, 1000 + number, 4001)
        guest.receive(RST)
        guest.device.pause()
        assert guest.device.state()["queues"][1]["next_avail"] == number + 1
        guest.device.resume()
        guest.turn()


def test_an_address_that_is_taken(guest):
    with pytest.raises(HostError, match="77"):
        VhostVsockDevice("other", CID)
