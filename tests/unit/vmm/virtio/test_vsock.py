"""virtio-vsock over Unix sockets, with the mock as the guest."""

from __future__ import annotations

import os
import random
import socket

import pytest

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.loop import EventLoop
from kvik.vmm.memory import GuestMemory
from kvik.vmm.virtio import vsock
from kvik.vmm.virtio.mock import MockDriver
from kvik.vmm.virtio.queue import EVENT_IDX, VERSION_1
from kvik.vmm.virtio.vsock import CREDIT_REQUEST, CREDIT_UPDATE, REQUEST, RESPONSE, RST, RW, SHUTDOWN, VsockDevice
from kvik.vmm.virtio.vsockstream import BUFFER, HEADER_SIZE, Header

CID = 5


class FakeMachine:
    still = False

    def __init__(self, memory, loop):
        self.memory, self.loop, self.logged = memory, loop, []

    def log(self, text):
        self.logged.append(text)


class FakeTransport:
    broken = False

    def needs_reset(self):
        self.broken = True

    def signal_queue(self, index):
        pass


class Guest:
    """A device, the guest's driver, and the host's end of its sockets."""

    def __init__(self, tmp_path, features=0, buffers=16, **named):
        self.path = str(tmp_path / "vsock")
        self.memory = GuestMemory.allocate(16 << 20)
        self.loop = EventLoop()
        self.device = VsockDevice("vsock0", CID, self.path, **named)
        self.device.transport = self.transport = FakeTransport()
        self.device.attach(FakeMachine(self.memory, self.loop))
        self.device.make_queues(features)
        self.drivers = [
            MockDriver(self.memory, queue, base=(1 + index) << 22, area=4 << 20, features=features)
            for index, queue in enumerate(self.device.queues)
        ]
        self.buffers(buffers)
        self.device.start(features | VERSION_1)
        self.forwarded = 0
        self.got = []
        self.turn()

    def buffers(self, count, size=4096):
        for _ in range(count):
            self.drivers[0].add([], [size])
        self.device.kick(0)

    def turn(self, times=6):
        for _ in range(times):
            self.loop.run_once(0)

    def send(self, op, source, target, data=b"", *, flags=0, kind=1, cid=CID, alloc=65536, length=None):
        header = Header(
            cid, 2, source, target, len(data) if length is None else length, kind, op, flags, alloc, self.forwarded
        )
        self.drivers[1].add([header.pack() + data])
        self.device.kick(1)
        self.drivers[1].collect()
        self.turn()

    def packets(self, refill=True):
        """What the device sent to the guest since the last call: (header, data)."""
        self.turn()
        found = []
        for done in self.drivers[0].collect():
            header = Header.unpack(done.data[:HEADER_SIZE])
            assert done.written == HEADER_SIZE + header.length
            found.append((header, done.data[HEADER_SIZE:]))
            if refill:
                self.buffers(1)
        return found

    def ops(self):
        return [header.op for header, _ in self.packets()]

    def dial(self, port):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(10)
        client.connect(self.path)
        client.send(b"CONNECT %d\n" % port)
        return client

    def connected(self, port=1024):
        """A stream from the host that the guest accepted: (the host's end, its port)."""
        client = self.dial(port)
        ((header, _),) = self.packets()
        assert (header.op, header.target_port, header.source_cid, header.target_cid) == (REQUEST, port, 2, CID)
        self.send(RESPONSE, port, header.source_port)
        assert client.recv(100) == b"OK %d\n" % header.source_port
        return client, header.source_port


@pytest.fixture
def guest(tmp_path):
    made = []

    def make(*args, **named):
        made.append(Guest(tmp_path, *args, **named))
        return made[-1]

    yield make
    for one in made:
        one.device.close()
        one.loop.close()


@pytest.mark.parametrize("ring", [0, EVENT_IDX])
def test_echo_from_the_host(guest, ring):
    g = guest(ring)
    client, port = g.connected(1024)
    for number in range(100):
        word = b"word %d" % number
        client.send(word)
        ((header, data),) = g.packets()
        assert header.op == RW and data == word
        g.forwarded += len(data)
        g.send(RW, 1024, port, data[::-1])
        assert client.recv(100) == word[::-1]
    assert g.device.stats()["rx_bytes"] == g.device.stats()["tx_bytes"]


def test_the_guest_connects_to_a_port_of_the_host(guest):
    g = guest()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(g.path + "_77")
        server.listen()
        g.send(REQUEST, 5000, 77)
        ((header, _),) = g.packets()
        assert (header.op, header.source_port, header.target_port) == (RESPONSE, 77, 5000)
        assert header.buf_alloc == BUFFER
        peer, _ = server.accept()
        g.send(RW, 5000, 77, b"hello")
        assert peer.recv(10) == b"hello"
        peer.send(b"bye")
        peer.close()
        (header, data), (end, _) = g.packets()
        assert data == b"bye" and end.op == SHUTDOWN
        g.send(SHUTDOWN, 5000, 77, flags=3)
        assert g.ops() == [RST]
        assert g.device.streams == {}


def test_nobody_listens(guest):
    g = guest()
    g.send(REQUEST, 5000, 78)
    ((header, _),) = g.packets()
    assert (header.op, header.source_port, header.target_port) == (RST, 78, 5000)


def test_the_guest_refuses(guest):
    g = guest()
    client = g.dial(99)
    ((header, _),) = g.packets()
    g.send(RST, 99, header.source_port)
    assert client.recv(10) == b""
    assert g.packets() == []


def test_the_host_never_sends_more_than_the_guest_has_room_for(guest):
    g = guest(buffers=64)
    client, port = g.connected()
    client.setblocking(False)
    g.send(CREDIT_UPDATE, 1024, port, alloc=10000)
    sent = client.send(os.urandom(100000))
    assert sum(header.length for header, _ in g.packets()) == 10000
    g.forwarded += 4000
    g.send(CREDIT_UPDATE, 1024, port, alloc=10000)
    assert sum(header.length for header, _ in g.packets()) == 4000
    g.forwarded += 10000
    g.send(CREDIT_UPDATE, 1024, port, alloc=1 << 20)
    total = 14000
    while total < sent:
        got = sum(header.length for header, _ in g.packets())
        assert got
        total += got
    assert total == sent


def test_what_a_slow_host_has_not_read_is_bounded_and_told_as_credit(guest):
    g = guest(buffers=64)
    client, port = g.connected()
    data = os.urandom(4000)
    for _ in range(BUFFER // 4000):
        g.send(RW, 1024, port, data)
    got, total = b"", BUFFER // 4000 * 4000
    updates = []
    while len(got) < total:
        got += client.recv(1 << 16)
        updates += [header for header, _ in g.packets() if header.op == CREDIT_UPDATE]
    assert got == data * (total // 4000)
    assert updates and updates[-1].fwd_cnt >= BUFFER // 2
    g.send(CREDIT_REQUEST, 1024, port)
    ((header, _),) = g.packets()
    assert header.op == CREDIT_UPDATE and header.fwd_cnt == total


def test_a_guest_that_ignores_its_credit_loses_the_stream(guest):
    g = guest(buffers=64)
    _client, port = g.connected()
    for _ in range(400):
        g.send(RW, 1024, port, bytes(4000))
        if not g.device.streams:
            break
    assert RST in g.ops()
    assert not g.device.streams and g.device.active


def test_no_buffers_then_buffers(guest):
    g = guest(buffers=1)
    client, _port = g.connected()
    for _ in range(3):
        client.send(b"x")
        g.turn()
    assert len(g.packets(refill=False)) == 1
    g.buffers(4)
    assert b"".join(data for _, data in g.packets()) == b"xx"


def test_half_closed_by_the_guest_still_delivers_to_it(guest):
    g = guest()
    client, port = g.connected()
    g.send(RW, 1024, port, b"last words")
    g.send(SHUTDOWN, 1024, port, flags=2)
    assert client.recv(100) == b"last words" and client.recv(100) == b""
    client.send(b"answer")
    assert [data for _, data in g.packets()] == [b"answer"]
    client.close()
    assert g.ops() == [SHUTDOWN]


@pytest.mark.parametrize(
    "line", [b"HELLO\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT -1\n", b"CONNECT 4294967295\n", b"A" * 100]
)
def test_a_wrong_handshake_is_hung_up(guest, line):
    g = guest()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(g.path)
        client.send(line)
        g.turn()
        try:
            assert client.recv(10) == b""
        except ConnectionResetError:
            pass
    assert not g.device.shaking and g.packets() == []


def test_streams_are_limited(guest):
    g = guest(max_streams=3)
    clients = [g.dial(port) for port in range(1, 6)]
    assert g.ops() == [REQUEST] * 3
    for client in clients[3:]:
        try:
            assert client.recv(1) == b""
        except ConnectionResetError:
            pass
    g.send(REQUEST, 1, 2)
    assert g.ops() == [RST]


@pytest.mark.parametrize(
    ("op", "kind"), [(RW, 1), (RESPONSE, 1), (SHUTDOWN, 1), (REQUEST, 2), (RW, 9), (0, 1), (99, 1), (CREDIT_UPDATE, 1)]
)
def test_packets_of_no_stream_are_reset(guest, op, kind):
    g = guest()
    g.send(op, 1, 2, kind=kind)
    assert g.ops() == [RST]


def test_resets_do_not_pile_up(guest):
    g = guest(buffers=0)
    for _ in range(600):
        g.send(RW, 1, 2)
    assert len(g.device.resets) <= 256
    g.send(RST, 1, 2)
    assert g.device.active


def test_packets_of_another_address_are_ignored(guest):
    g = guest()
    g.send(REQUEST, 1, 2, cid=CID + 1)
    assert g.packets() == []


@pytest.mark.parametrize("case", ["length", "short", "receive"])
def test_malformed_requests_stop_the_device(guest, case):
    g = guest(buffers=0)
    if case == "length":
        g.send(RW, 1, 2, b"abc", length=0xFFFFFFFF)
    elif case == "short":
        g.drivers[1].add([b"short"])
        g.device.kick(1)
    else:
        g.buffers(1, size=10)
        g.send(RW, 1, 2)
    assert g.transport.broken and not g.device.active
    assert not g.loop._readers


def test_noise(guest):
    g = guest()
    noise = random.Random(3)
    for _ in range(500):
        header = noise.randbytes(32) + noise.randbytes(12) if noise.random() < 0.2 else Header(
            CID, 2, noise.randrange(4), noise.randrange(4), 0, 1, noise.randrange(9), noise.randrange(5),
            noise.getrandbits(32), noise.getrandbits(32),
        ).pack()  # fmt: skip
        g.drivers[1].add([header])
        g.device.kick(1)
        g.drivers[1].collect()
        g.packets()
        if not g.device.active:
            break


def test_a_restored_guest_is_told_that_its_streams_are_gone(guest, tmp_path):
    g = guest()
    g.connected()
    g.drivers[2].add([], [8])
    g.device.pause()
    state = g.device.state()
    assert not g.loop._readers
    (tmp_path / "other").mkdir()
    other = VsockDevice("vsock0", CID + 1, str(tmp_path / "other/vsock"))
    other.transport = FakeTransport()
    other.attach(g.device.machine)
    other.restore(state)
    other.activate()
    g.turn()
    (event,) = g.drivers[2].collect()
    assert event.data == bytes(4)
    assert other.config["guest_cid"] == CID + 1
    other.close()


def test_what_cannot_be(tmp_path):
    for cid in (0, 2, 0xFFFFFFFF):
        with pytest.raises(InvalidArgument):
            VsockDevice("v", cid, str(tmp_path / "x"))
    with pytest.raises(HostError, match="listen"):
        VsockDevice("v", 3, str(tmp_path / "missing/x"))
    vsock.listen(str(tmp_path / "s")).close()
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
