"""virtio-net on sockets, driven by the mock: no KVM, no tap, no network of the host."""

from __future__ import annotations

import _thread
import os
import random
import select
import socket
import struct
import sys

import pytest

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.backends.netsocket import DatagramBackend, StreamBackend, socket_backend
from kvik.vmm.loop import EventLoop
from kvik.vmm.memory import GuestMemory
from kvik.vmm.ratelimit import RateLimiter
from kvik.vmm.virtio import net
from kvik.vmm.virtio.mock import MockDriver
from kvik.vmm.virtio.net import NetDevice, parse_mac
from kvik.vmm.virtio.queue import EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED, VERSION_1

HEADER = bytes(12)
MAC = "52:54:00:12:34:56"
RINGS = [0, EVENT_IDX, EVENT_IDX | INDIRECT_DESC, RING_PACKED, RING_PACKED | EVENT_IDX, EVENT_IDX | IN_ORDER]


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


@pytest.fixture
def rig(request):
    made = []

    def make(*args, **named):
        made.append(Rig(*args, **named))
        return made[-1]

    yield make
    for one in made:
        one.close()


FULL = net.F_MRG_RXBUF | net.F_CTRL_VQ | net.F_STATUS | net.F_MAC | net.F_GUEST_ANNOUNCE


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_frames_go_both_ways(rig, ring, kind):
    r = rig(FULL | ring, kind=kind)
    r.turn()
    for number in range(200):  # several times round the ring
        frame = bytes([number]) * (60 + number)
        r.send(frame)
        r.turn(1)
        assert r.far.recv(4096) == frame
        assert len(r.tx.collect()) == 1
        r.rx.add([], [2048])
        r.kick(0)
        r.far.send(frame)
        r.turn(2)
        (done,) = r.rx.collect()
        assert done.written == 12 + len(frame)
        assert done.data == bytes(10) + b"\1\0" + frame
    stats = r.device.stats()
    assert stats["rx_packets"] == stats["tx_packets"] == 200
    assert stats["rx_dropped"] == stats["tx_dropped"] == stats["faults"] == 0


@pytest.mark.parametrize("size", [60, 1514, 1600, 9000, 65536, 65550])
@pytest.mark.parametrize("buffer", [64, 1536, 4096, 70000])
def test_a_large_frame_is_merged_over_many_buffers(rig, size, buffer):
    r = rig(FULL, kind=socket.SOCK_SEQPACKET, size=512)
    r.far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    frame = random.Random(size).randbytes(size)
    needed = -(-(size + 12) // buffer)
    if needed > 500:
        pytest.skip("more buffers than the ring has")
    for _ in range(3):  # the spread adapts after the first
        for _ in range(needed + 1):
            r.rx.add([], [buffer])
        r.kick(0)
        r.far.send(frame)
        r.turn()
        done = r.rx.collect()
        data = b"".join(d.data for d in done)
        assert data[12:] == frame
        assert struct.unpack_from("<H", data, 10)[0] == len(done) == needed
        assert r.device.stats()["rx_dropped"] == 0
    assert r.memory is not None


def test_a_frame_waits_for_the_buffers_it_still_needs(rig):
    r = rig(FULL, kind=socket.SOCK_SEQPACKET)
    frame = os.urandom(5000)
    r.rx.add([], [1500])
    r.kick(0)
    r.far.send(frame)
    r.turn()
    assert r.rx.collect() == []
    for _ in range(3):
        r.rx.add([], [1500])
        r.kick(0)
        r.turn()
    done = r.rx.collect()
    assert b"".join(d.data for d in done)[12:] == frame
    assert len(done) == 4


def test_without_merging_a_frame_that_does_not_fit_is_dropped(rig):
    r = rig(0)
    r.rx.add([], [1526])
    r.kick(0)
    r.turn()
    r.far.send(bytes(3000))
    r.far.send(b"x" * 100)
    r.turn()
    (done,) = r.rx.collect()
    assert done.data[12:] == b"x" * 100
    assert r.device.stats()["rx_dropped"] == 1


def test_a_header_cut_in_pieces(rig):
    r = rig(FULL)
    r.tx.add([HEADER[:5], HEADER[5:] + b"ab", b"cdef" * 20])
    r.device.kick(1)
    assert r.far.recv(4096) == b"ab" + b"cdef" * 20


def test_a_stream_carries_lengths_and_survives_any_cut(rig):
    r = rig(FULL, kind=socket.SOCK_STREAM)
    r.turn()
    frames = [os.urandom(size) for size in (60, 1514, 9000)]
    for _ in range(4):
        r.rx.add([], [12000])
    r.kick(0)
    stream = b"".join(struct.pack(">I", len(f)) + f for f in frames)
    for at in range(0, len(stream), 7):
        r.far.send(stream[at : at + 7])
        r.turn(1)
    r.turn()
    assert [d.data[12:] for d in r.rx.collect()] == frames
    r.send(*frames)
    r.turn()
    got = b""
    while len(got) < len(stream):
        got += r.far.recv(65536)
    assert got == stream


def test_a_full_stream_blocks_the_transmitter_and_then_goes_on(rig):
    r = rig(FULL | EVENT_IDX, kind=socket.SOCK_STREAM)
    frame = os.urandom(60000)
    total, got, sent = 200, b"", 0
    while sent < total or len(got) < total * 60004:
        r.tx.collect()
        while sent < total and len(r.tx.in_flight) < 30:
            r.tx.add([HEADER + frame])
            sent += 1
        r.kick(1)
        for _ in range(3):
            r.turn(1)
        while select.select([r.far], [], [], 0)[0] and len(got) < total * 60004:
            got += r.far.recv(1 << 17)
    assert got == (struct.pack(">I", len(frame)) + frame) * total
    assert r.device.stats()["tx_packets"] == total


@pytest.mark.parametrize("length", [0, 65555, 0xFFFFFFFF])
def test_a_peer_that_lies_about_a_length_loses_the_connection(rig, length):
    r = rig(FULL, kind=socket.SOCK_STREAM)
    r.rx.add([], [2048])
    r.kick(0)
    r.turn()
    r.far.send(struct.pack(">I", length) + bytes(100))
    r.turn()
    assert "announced" in r.device.gone
    assert not r.device.config["status"] & net.S_LINK_UP


def test_a_backend_that_ends_takes_the_link_down_and_no_more(rig):
    r = rig(FULL, kind=socket.SOCK_SEQPACKET)
    r.rx.add([], [2048])
    r.kick(0)
    r.turn()
    r.far.close()
    r.turn()
    assert r.device.active and not r.transport.broken
    assert r.machine.events == [("NETDEV_GONE", {"device": "net0", "reason": r.device.gone})]
    assert r.device.config["status"] & net.S_LINK_UP == 0
    r.send(b"x" * 60)  # dropped, and given back to the driver
    r.turn()
    assert len(r.tx.collect()) == 1
    assert r.device.stats()["tx_dropped"] == 1
    r.device.set_link(True)
    assert r.device.config["status"] & net.S_LINK_UP == 0
    assert len(r.machine.logged) == 1


def test_a_sender_learns_of_the_end_too(rig):
    r = rig(FULL, kind=socket.SOCK_STREAM)
    r.turn()
    r.far.close()
    r.send(b"x" * 60, b"y" * 60)
    r.turn()
    assert r.device.gone
    assert len(r.tx.collect()) == 2


def test_link_down_drops_both_ways_and_up_works_again(rig):
    r = rig(FULL)
    r.rx.add([], [2048])
    r.kick(0)
    r.turn()
    r.device.set_link(False)
    assert r.transport.changes == 1
    r.far.send(b"lost" * 20)
    r.send(b"lost too" * 10)
    r.turn()
    assert r.rx.collect() == [] and len(r.tx.collect()) == 1
    r.device.set_link(True)
    r.far.send(b"found" * 20)
    r.turn()
    assert r.rx.collect()[0].data[12:] == b"found" * 20
    assert r.device.stats()["rx_dropped"] == 1


def test_rate_limit_of_the_transmitter(rig):
    now = [0]
    limiter = RateLimiter(0, 10, ops_burst=4, clock=lambda: now[0])
    r = rig(FULL, transmit_limit=limiter)
    r.turn()
    r.send(*[bytes(60)] * 6)
    r.turn()
    assert len(r.tx.collect()) == 4
    now[0] += 10**9
    for half in r.device.transmitters:
        assert half.timer is not None
        half.timer.callback()
    assert len(r.tx.collect()) == 2
    assert r.device.stats()["throttled"] == 1


def test_rate_limit_of_the_receiver_holds_packets_back(rig):
    now = [0]
    limiter = RateLimiter(0, 10, ops_burst=3, clock=lambda: now[0])
    r = rig(FULL, receive_limit=limiter)
    for _ in range(10):
        r.rx.add([], [2048])
    r.kick(0)
    for _ in range(5):
        r.far.send(bytes(60))
    r.turn()
    assert len(r.rx.collect()) == 3
    now[0] += 10**9
    r.device.receivers[0].timer.callback()
    r.turn()
    assert len(r.rx.collect()) == 2
    assert r.device.stats()["rx_dropped"] == 0


# --- the control queue


def test_commands_of_the_control_queue(rig):
    r = rig(FULL)
    assert r.command(net.CTRL_RX, 0, b"\1")
    assert r.command(net.CTRL_RX, 1, b"\1")
    assert r.command(net.CTRL_VLAN, 0, struct.pack("<H", 42))
    assert r.command(net.CTRL_MAC, 1, b"\x52\x54\0\0\0\1")
    table = struct.pack("<I", 1) + b"\x52\x54\0\0\0\2" + struct.pack("<I", 1) + b"\1\0\x5e\0\0\1"
    assert r.command(net.CTRL_MAC, 0, table)
    assert r.device.rx_filter() == {
        "name": "net0",
        "main-mac": "52:54:00:00:00:01",
        "modes": ["promiscuous", "all-multicast"],
        "macs": ["52:54:00:00:00:02", "01:00:5e:00:00:01"],
        "vlans": [42],
    }
    assert r.command(net.CTRL_VLAN, 1, struct.pack("<H", 42))
    assert r.device.rx_filter()["vlans"] == []


@pytest.mark.parametrize(
    ("kind", "number", "data"),
    [
        (0, 9, b"\1"), (0, 0, b""), (0, 0, b"\1\1"), (1, 1, b"123"), (1, 0, b"\xff\xff\xff\xff"),
        (1, 0, b"\2\0\0\0abc"),
        (1, 7, b""), (2, 0, b"\xff\xff"), (2, 5, b"\0\0"), (3, 1, b""), (4, 0, b"\1\0"), (5, 0, bytes(8)), (77, 0, b""),
    ],
)  # fmt: skip
def test_a_wrong_command_is_refused(rig, kind, number, data):
    r = rig(FULL)
    assert not r.command(kind, number, data)
    assert r.device.active


def test_announce_until_the_guest_has_done_it(rig):
    r = rig(FULL)
    r.device.announce()
    assert r.device.config["status"] & net.S_ANNOUNCE and r.transport.changes == 1
    assert r.command(net.CTRL_ANNOUNCE, 0)
    assert not r.device.config["status"] & net.S_ANNOUNCE


# --- life


def test_pause_leaves_nothing_in_flight_and_state_moves_to_another_device(rig):
    r = rig(FULL, receive_limit=RateLimiter(10**6))
    for _ in range(8):
        r.rx.add([], [2048])
    r.kick(0)
    r.far.send(b"a" * 60)
    r.turn()
    r.command(net.CTRL_VLAN, 0, struct.pack("<H", 7))
    r.device.pause()
    assert r.device.queues[0].state()["next_avail"] == 1  # one buffer used, seven given back
    state = r.device.state()
    r.far.send(b"b" * 60)
    r.turn()
    assert len(r.rx.collect()) == 1
    r.device.resume()
    r.turn()
    assert r.rx.collect()[0].data[12:] == b"b" * 60

    far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    other = NetDevice("net0", DatagramBackend(near.detach()), "52:54:00:00:00:99", queue_size=64)
    other.transport = FakeTransport(other, 3)
    other.attach(r.machine)
    other.restore(state)
    other.activate()
    assert other.config.raw("mac") == parse_mac(MAC)
    assert other.rx_filter()["vlans"] == [7]
    assert {**other.state(), "queues": 0} == {**state, "queues": 0}
    other.close()
    far.close()


def test_a_state_of_another_shape_is_refused(rig):
    r = rig(FULL)
    r.device.pause()
    state = r.device.state()
    for change in ({"active_pairs": 9}, {"acked": state["acked"] | 1 << 7}, {"queues": []}):
        with pytest.raises(ValueError, match="net0"):
            r.device.restore({**state, **change})


def test_reset_forgets_what_the_driver_told(rig):
    r = rig(FULL)
    r.command(net.CTRL_MAC, 1, b"\x52\x54\0\0\0\1")
    r.command(net.CTRL_VLAN, 0, b"\1\0")
    r.device.reset()
    assert r.device.config.raw("mac") == parse_mac(MAC)
    assert r.device.rx_filter()["vlans"] == []
    r.start(FULL)
    r.rx.add([], [2048])
    r.kick(0)
    r.turn()
    r.far.send(b"x" * 60)
    r.turn()
    assert len(r.rx.collect()) == 1


def test_readers_are_gone_after_deactivation(rig):
    r = rig(FULL)
    r.rx.add([], [2048])
    r.kick(0)
    r.turn()
    assert r.loop._readers
    r.device.stop()
    assert not r.loop._readers and not r.loop._writers


# --- hostile guests


def hostile_receive(r):
    r.rx.add([b"readable"], [])
    r.kick(0)


def tiny_receive(r):
    r.rx.add([], [11])
    r.kick(0)


def beyond_memory(r):
    r.tx.add_raw([(1 << 40, 100, 0)])
    r.device.kick(1)


def huge_length(r):
    r.tx.add_raw([(0x1000, 0xFFFFFFFF, 0)])
    r.device.kick(1)


def no_status(r):
    r.control.add([b"\0\0\1"], [])
    r.device.kick(2)


@pytest.mark.parametrize("attack", [hostile_receive, tiny_receive, beyond_memory, huge_length, no_status])
def test_a_malformed_request_stops_this_device_only(rig, attack):
    r = rig(FULL)
    r.turn()
    attack(r)
    r.turn()
    assert r.transport.broken and not r.device.active
    assert len(r.machine.logged) == 1
    assert not r.loop._readers
    r.turn()


@pytest.mark.parametrize("data", [b"", bytes(11), bytes(12), bytes(12 + 65555)])
def test_a_packet_of_an_impossible_size_is_dropped(rig, data):
    r = rig(FULL)
    parts = [(0x40_0000 + (1 << 20), len(data), 0)] if data else [(0x50_0000, 1, 0)]
    r.tx.add_raw(parts)
    r.device.kick(1)
    assert len(r.tx.collect()) == 1
    assert r.device.stats()["tx_dropped"] == 1


def test_random_rings_never_raise(rig):
    """Rings full of noise: the device stops or works, and the machine lives."""
    noise = random.Random(1)
    for ring in RINGS * 3:
        r = rig(FULL | ring)
        r.turn()
        for _ in range(60):
            for driver in r.drivers:
                place = driver.desc + noise.randrange(driver.buffers - driver.desc)
                r.memory.write(place, noise.randbytes(noise.choice((1, 2, 4, 16))))
            if noise.random() < 0.3:
                r.far.send(bytes(noise.randrange(1, 2000)))
            r.device.kick(noise.randrange(3))
            r.turn(1)


# --- wake-ups


@pytest.mark.parametrize("ring", RINGS)
def test_no_wake_up_is_lost(ring):
    """A driver on another thread, which kicks and waits only as the rings tell it to, and a far end that echoes.

    Any wake-up that is lost, in either direction, ends the exchange: the deadline is the only clock here.
    """
    loop = EventLoop()
    r = Rig(FULL | ring, loop=loop, size=16)
    rounds, window = 3000, 12
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    errors: list[BaseException] = []
    done = _thread.allocate_lock()
    done.acquire()

    def kicked(index):
        try:
            os.eventfd_read(kicks[index])
        except BlockingIOError:
            return
        r.device.kick(index)

    def wait(*indices):
        """Sleep until an interrupt; the driver asked for it and looked again before, as 2.7.13.3.1 says."""
        ready = select.select([r.transport.bells[index] for index in indices], [], [], 20)[0]
        assert ready, "no interrupt within 20 s: a wake-up was lost"
        for bell in ready:
            os.eventfd_read(bell)

    def driver():
        noise = random.Random(ring)
        try:
            sent = received = 0
            for _ in range(16):
                r.rx.add([], [256])
            if r.rx.wants_kick():
                os.eventfd_write(kicks[0], 1)
            while received < rounds:
                burst = noise.randrange(1, window)
                while burst and sent < rounds and sent - received < window and r.tx._room:
                    r.tx.add([HEADER + struct.pack("<I", sent) * 16])
                    sent, burst = sent + 1, burst - 1
                if r.tx.wants_kick():
                    os.eventfd_write(kicks[1], 1)
                progress = False
                for index, ring_driver in enumerate((r.rx, r.tx)):
                    ring_driver.ask(interrupts=True)
                    found = ring_driver.collect()
                    progress = progress or bool(found)
                    if index == 0:
                        for one in found:
                            assert one.data[12:16] == struct.pack("<I", received), "out of order"
                            received += 1
                            r.rx.add([], [256])
                if r.rx.wants_kick():
                    os.eventfd_write(kicks[0], 1)
                if not progress and (sent == rounds or sent - received >= window or not r.tx._room):
                    wait(0, 1)
        except BaseException as error:
            errors.append(error)
        finally:
            loop.stop()
            done.release()

    def echo():
        try:
            while True:
                r.far.send(r.far.recv(4096))
        except OSError:
            pass

    try:
        for index in range(2):
            loop.add_reader(kicks[index], lambda index=index: kicked(index))
        _thread.start_new_thread(echo, ())
        _thread.start_new_thread(driver, ())
        loop.run()
        assert done.acquire(timeout=30)
        assert not errors, errors
        stats = r.device.stats()
        assert stats["rx_packets"] == stats["tx_packets"] == rounds
    finally:
        sys.setswitchinterval(interval)
        r.close()


# --- what cannot be made


@pytest.mark.parametrize("mac", ["", "01:00:00:00:00:00", "00:00:00:00:00:00", "52:54:00:12:34", "zz:54:00:12:34:56"])
def test_addresses_that_no_card_has(mac):
    with pytest.raises(InvalidArgument):
        parse_mac(mac)


@pytest.mark.parametrize("named", [{"mtu": 67}, {"mtu": 65536}, {"queue_size": 100}, {"queue_size": 1024}])
def test_settings_that_cannot_be(named):
    near, far = socket.socketpair()
    with near, far, pytest.raises(InvalidArgument):
        NetDevice("net0", StreamBackend(os.dup(near.fileno())), MAC, **named)


def test_a_backend_without_a_kernel_datapath_says_why():
    near, far = socket.socketpair()
    with near, far:
        device = NetDevice("net0", StreamBackend(os.dup(near.fileno())), MAC, vhost="auto")
        assert "kernel datapath" in device.vhost_reason
        device.close()
        with pytest.raises(HostError, match="kernel datapath"):
            NetDevice("net0", StreamBackend(os.dup(near.fileno())), MAC, vhost="on")


def test_what_is_no_socket():
    with open(os.devnull) as file, pytest.raises(HostError, match="no socket"):
        socket_backend(file.fileno())
    with pytest.raises(HostError, match="passt"):
        StreamBackend.connect("/nonexistent/socket")
