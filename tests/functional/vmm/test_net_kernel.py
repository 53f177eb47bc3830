"""virtio-net on a real tap, and on the kernel's vhost-net, in a network namespace of its own; the mock drives.

The far end of the tap is a packet socket: what it sends, the device receives.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import time

import pytest

from kvik.errors import HostError
from kvik.host.netlink import Netlink
from kvik.vmm import parts
from kvik.vmm.backends.tap import TapBackend
from kvik.vmm.loop import EventLoop
from kvik.vmm.machine import Machine
from kvik.vmm.memory import GuestMemory
from kvik.vmm.options import parse
from kvik.vmm.virtio import net
from kvik.vmm.virtio.mock import MockDriver
from kvik.vmm.virtio.net import NetDevice
from kvik.vmm.virtio.queue import EVENT_IDX, VERSION_1

pytestmark = pytest.mark.root

CLONE_NEWNET = 0x40000000
HEADER = bytes(12)
FULL = net.F_MRG_RXBUF | net.F_CTRL_VQ | net.F_STATUS | net.F_MAC
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def namespace():
    if os.geteuid() or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("needs root and /dev/net/tun")
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    if libc.unshare(CLONE_NEWNET):
        os.close(home)
        pytest.skip("cannot make a network namespace")
    with open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as off:
        off.write("1")  # no neighbour discovery among the packets of the tests
    yield
    assert libc.setns(home, CLONE_NEWNET) == 0
    os.close(home)


class FakeMachine:
    still = False

    def __init__(self):
        self.memory, self.loop = GuestMemory.allocate(32 << 20), EventLoop()
        self.logged, self.events = [], []

    def log(self, text):
        self.logged.append(text)

    def emit(self, name, data=None):
        self.events.append(name)


class Transport:
    def __init__(self, machine, count, irqfd):
        self.machine, self.irqfd = machine, irqfd
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        self.taken = [False] * count
        self.broken = False

    def config_changed(self, change=None):
        if change:
            change()

    def signal_queue(self, index):
        os.eventfd_write(self.calls[index], 1)

    def notifier_fd(self, index):
        self.taken[index] = True
        return self.kicks[index]

    def release_notifier(self, index):
        self.taken[index] = False

    def interrupt_fd(self, index):
        return self.calls[index] if self.irqfd else None

    def needs_reset(self):
        self.broken = True


class Rig:
    def __init__(self, vhost="off", irqfd=True, pairs=1, features=FULL):
        self.machine = FakeMachine()
        self.backend = TapBackend.open("t0", pairs)
        with Netlink() as netlink:
            self.index = netlink.link("t0").index
            netlink.set_link(self.index, up=True, mtu=9000)
        self.far = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.far.bind(("t0", 3))
        self.far.settimeout(10)
        self.device = NetDevice("net0", self.backend, "52:54:00:00:00:01", queue_size=256, vhost=vhost)
        self.transport = self.device.transport = Transport(self.machine, 2 * pairs + 1, irqfd)
        self.device.attach(self.machine)
        self.features = features & (self.device.features | self.device.ring_features) | VERSION_1
        self.device.make_queues(self.features)
        self.drivers = []
        for index, queue in enumerate(self.device.queues):
            driver = MockDriver(
                self.machine.memory, queue, base=(1 + index) << 22, area=4 << 20, features=self.features
            )
            driver.ask(interrupts=True)
            queue.notify = lambda index=index: self.transport.signal_queue(index)
            self.drivers.append(driver)
        self.rx, self.tx = self.drivers[:2]
        self.device.start(self.features)
        self.turn()

    def turn(self, times=5):
        for _ in range(times):
            self.machine.loop.run_once(0)

    def kick(self, index):
        if self.drivers[index].wants_kick():
            if self.transport.taken[index]:
                os.eventfd_write(self.transport.kicks[index], 1)
            else:
                self.device.kick(index)

    def buffers(self, count, size=2048):
        for _ in range(count):
            self.rx.add([], [size])
        self.kick(0)

    def send(self, frame, header=HEADER):
        self.tx.add([header + frame])
        self.kick(1)
        self.turn()

    def receive(self):
        """Wait for an interrupt of the receive queue, as a driver would."""
        done = self.rx.collect()
        while not done:
            self.rx.ask(interrupts=True)
            done = self.rx.collect()
            if done:
                break
            ready = select.select([self.transport.calls[0], self.machine.loop._epoll], [], [], 10)[0]
            assert ready, "no interrupt"
            if self.transport.calls[0] in ready:
                os.eventfd_read(self.transport.calls[0])
            self.turn()
            done = self.rx.collect()
        return b"".join(one.data for one in done)

    def hear(self, frame):
        while (got := self.far.recvfrom(70000))[0] != frame:
            assert got[1][2] == socket.PACKET_OUTGOING, got

    def close(self):
        self.device.close()
        self.machine.loop.close()
        self.far.close()


@pytest.fixture
def rig(namespace):
    made = []

    def make(*args, **named):
        made.append(Rig(*args, **named))
        return made[-1]

    yield make
    for one in made:
        one.close()


def frame(number, size=100):
    return b"\xff" * 6 + b"\x52\x54\0\0\0\2" + b"\x88\xb5" + struct.pack("<I", number) * (size // 4)


def need_vhost():
    if not os.path.exists("/dev/vhost-net"):
        pytest.skip("this kernel has no vhost-net: runs in the lab")


MODES = [("off", True), ("on", True), ("on", False)]


@pytest.mark.parametrize(("vhost", "irqfd"), MODES)
@pytest.mark.parametrize("ring", [0, EVENT_IDX])
def test_frames_both_ways(rig, vhost, irqfd, ring):
    if vhost == "on":
        need_vhost()
    r = rig(vhost, irqfd, features=FULL | ring)
    assert r.device.stats()["vhost"] == (vhost == "on"), r.machine.logged
    r.buffers(32)
    for number in range(400):  # past the end of the ring
        r.send(frame(number))
        r.hear(frame(number))
        r.tx.collect()
        r.far.send(frame(number, 1400))
        data = r.receive()
        assert data[12:] == frame(number, 1400)
        r.buffers(1)
    assert not r.transport.broken


@pytest.mark.parametrize(("vhost", "irqfd"), MODES[:2])
def test_a_large_frame_is_merged(rig, vhost, irqfd):
    if vhost == "on":
        need_vhost()
    r = rig(vhost, irqfd)
    r.buffers(20, 1024)
    r.far.send(frame(1, 8000))
    data = b""
    while len(data) < 8000:
        data += r.receive()
    assert data[12:] == frame(1, 8000)
    assert struct.unpack_from("<H", data, 10)[0] == 8


def test_the_position_moves_between_the_kernel_and_us(rig):
    """Paused and resumed amid traffic: nothing is lost, nothing doubled."""
    need_vhost()
    r = rig("on")
    r.buffers(64)
    for number in range(300):
        if number % 50 == 25:
            r.device.pause()
            assert r.device.stats()["vhost"] == 0
            state = r.device.state()
            assert state["queues"][1]["next_avail"] == number
            r.device.resume()
            r.turn()
        r.send(frame(number))
        r.hear(frame(number))
        r.tx.collect()
        r.far.send(frame(number))
        assert r.receive()[12:] == frame(number)
        r.buffers(1)


def test_the_kernels_writes_are_logged(rig):
    need_vhost()
    r = rig("on")
    requests = [r.rx.add([], [2048]) for _ in range(8)]
    r.kick(0)
    touched = set()

    def dirty(address, size):
        touched.update(range(address // 4096, (address + size - 1) // 4096 + 1))

    rings = r.device.vhost.rings
    r.far.send(frame(1))
    r.receive()
    rings.start_log()
    r.machine.memory.dirty_log = dirty
    r.far.send(frame(2))
    r.receive()
    assert rings.take_log() > 0
    buffer, _ = requests[1].writable[0]
    assert buffer // 4096 in touched and r.rx.used // 4096 in touched
    touched.clear()
    assert rings.take_log() == 0 and not touched
    rings.stop_log()
    r.far.send(frame(3))
    r.receive()
    r.machine.memory.dirty_log = None


@pytest.mark.parametrize("vhost", ["off", "on"])
def test_link_down_and_up(rig, vhost):
    if vhost == "on":
        need_vhost()
    r = rig(vhost)
    r.buffers(8)
    r.device.set_link(False)
    r.turn()
    assert r.device.stats()["vhost"] == 0
    r.far.send(frame(1))
    r.turn()
    assert r.rx.collect() == []
    r.device.set_link(True)
    r.turn()
    r.far.send(frame(2))
    assert r.receive()[12:] == frame(2)


@pytest.mark.parametrize("vhost", ["off", "on"])
def test_the_tap_is_deleted_under_it(rig, vhost):
    if vhost == "on":
        need_vhost()
    r = rig(vhost)
    r.buffers(8)
    with Netlink() as netlink:
        netlink.delete_link(r.index)
    r.turn()
    r.send(frame(1))
    end = time.monotonic() + 10
    while not r.device.gone and time.monotonic() < end:
        r.machine.loop.run_once(0.1)
    assert not r.transport.broken and r.device.active
    assert "deleted" in r.device.gone and r.machine.events == ["NETDEV_GONE"]
    assert not r.device.config["status"] & net.S_LINK_UP
    if vhost == "off":
        assert len(r.tx.collect()) == 1


def test_twenty_machines_leave_no_descriptor_open(namespace, tmp_path):
    """KVM's descriptors, the tap, the kernel's datapath where there is one, sockets, the card's thread and its loop."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm")

    def one(number):
        path = str(tmp_path / f"vsock{number}")
        config = parse(["--memory", "16M", "--net", "tap,ifname=t0,vhost=auto", "--vsock", f"9,uds={path}"])
        with Machine(config) as machine:
            machine.add(parts.make(machine, "nets", config.nets[0], 0))
            machine.add(parts.make(machine, "vsock", config.vsock[0], 0))

    one(0)  # whatever the first one makes for all
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        one(number + 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_interface_that_is_down_is_an_unplugged_cable(rig):
    r = rig()
    r.buffers(8)
    with Netlink() as netlink:
        netlink.set_link(r.index, up=False)
        r.send(frame(1))
        r.turn()
        assert len(r.tx.collect()) == 1 and not r.device.gone
        netlink.set_link(r.index, up=True)
    with pytest.raises(OSError, match="down"):
        r.far.send(frame(2))  # the packet socket tells once that the interface was down
    r.far.send(frame(2))
    assert r.receive()[12:] == frame(2)


def test_a_header_that_the_kernel_refuses_costs_one_packet(rig):
    r = rig()
    r.send(frame(1), header=b"\x01\xee" + b"\xff" * 10)  # a GSO type that does not exist
    r.send(frame(2))
    r.hear(frame(2))
    assert len(r.tx.collect()) == 2
    stats = r.device.stats()
    assert stats["tx_dropped"] == 1 and stats["backend_errors"] == 1 and not r.device.gone


def test_queue_pairs(rig):
    features = FULL | net.F_MQ
    r = rig(pairs=2, features=features)
    assert r.device.control == 4
    r.drivers[4].add([b"\4\0" + struct.pack("<H", 2)], [1])
    r.device.kick(4)
    (done,) = r.drivers[4].collect()
    assert done.data == b"\0" and r.backend._attached == 2
    for pair in (0, 1):
        r.drivers[2 * pair + 1].add([HEADER + frame(pair)])
        r.device.kick(2 * pair + 1)
        r.hear(frame(pair))
    r.device.stop()
    r.turn()


def test_offloads_follow_the_driver(rig):
    r = rig(features=FULL | net.F_GUEST_CSUM | 1 << 7 | net.F_CSUM | 1 << 11 | net.F_CTRL_GUEST_OFFLOADS)
    assert r.device.guest_offloads == net.F_GUEST_CSUM | 1 << 7
    for wish, answer in ((0, 0), (net.F_GUEST_CSUM, 0), (1 << 8, 1)):
        r.drivers[2].add([b"\5\0" + struct.pack("<Q", wish)], [1])
        r.device.kick(2)
        (done,) = r.drivers[2].collect()
        assert done.data == bytes([answer])


def test_what_is_no_tap_with_a_header(namespace):
    with open(os.devnull) as file, pytest.raises(HostError, match="tap"):
        TapBackend([os.dup(file.fileno())])
    with pytest.raises(HostError, match="no name"):
        TapBackend.open("../x")
    first = TapBackend.open("t1")
    with pytest.raises(HostError, match="t1"):
        TapBackend.open("t1")
    first.close()
