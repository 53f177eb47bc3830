"""virtio-net on sockets, driven by the mock: the card, its control queue, its life, its enemies."""

from __future__ import annotations

import os
import random
import socket
import struct

import pytest

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.backends.netsocket import DatagramBackend, StreamBackend, socket_backend
from kvik.vmm.ratelimit import RateLimiter
from kvik.vmm.virtio import net
from kvik.vmm.virtio.net import NetDevice, parse_mac

from .netrig import FULL, MAC, RINGS, FakeTransport


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


def test_a_socket_that_listens_takes_one_peer_after_the_other(rig, tmp_path):
    """As QEMU's `-netdev stream,server=on`: a switch that was killed and started again finds its machine."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "net0.net"))
    listener.listen(1)
    r = rig(FULL, backend=socket_backend(listener.detach()))
    up = []
    for number in range(2):
        r.rx.add([], [2048])
        r.kick(0)
        r.turn()
        up.append(r.device.config["status"] & net.S_LINK_UP)
        r.send(b"x" * 60)  # nobody is there: dropped, and given back to the driver
        r.turn()
        assert len(r.tx.collect()) == 1
        switch = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        switch.connect(str(tmp_path / "net0.net"))
        switch.settimeout(10)
        r.turn()
        up.append(r.device.config["status"] & net.S_LINK_UP)
        frame = bytes([number]) * 60
        switch.sendall(struct.pack(">I", len(frame)) + frame)
        r.turn()
        assert [item.data[12:] for item in r.rx.collect()] == [frame]
        r.send(frame)
        r.turn()
        assert switch.recv(100) == struct.pack(">I", len(frame)) + frame
        assert len(r.tx.collect()) == 1
        switch.close()
    assert up == [0, 1, 0, 1]
    r.device.set_link(False)  # the user's wish outlives the peers
    r.rx.add([], [2048])
    r.turn()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as switch:
        switch.connect(str(tmp_path / "net0.net"))
        r.turn()
        assert not r.device.link
        assert r.device.state()["link"] is False
        r.device.set_link(True)
        assert r.device.link
    assert not r.device.gone
    assert not r.machine.events


def test_a_peer_that_waits_already_is_there_from_the_beginning(rig, tmp_path):
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "net0.net"))
    listener.listen(1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as switch:
        switch.connect(str(tmp_path / "net0.net"))
        r = rig(FULL, backend=socket_backend(listener.detach()))
        assert r.device.link
        r.device.close()
        assert switch.recv(1) == b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as late, pytest.raises(ConnectionRefusedError):
        late.connect(str(tmp_path / "net0.net"))  # the listening socket is closed with the device


def test_a_datapath_that_ends_leaves_the_buffers_to_the_next(rig):
    """The link goes down under the kernel's datapath: ours takes over, and pops ahead. The kernel then comes back."""
    r = rig(FULL)
    r.turn()
    for _ in range(8):
        r.rx.add([], [256])
    r.kick(0)
    r.turn()
    assert r.device.queues[0].state()["next_avail"] == 8
    r.device._end()
    assert r.device.queues[0].state()["next_avail"] == 0


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


# --- the control queue


def test_commands_of_the_control_queue(rig):
    r = rig(FULL | net.F_CTRL_VLAN)
    assert r.command(net.CTRL_RX, 0, b"\1")
    assert r.command(net.CTRL_RX, 1, b"\1")
    assert r.command(net.CTRL_VLAN, 0, struct.pack("<H", 42))
    assert r.command(net.CTRL_MAC, 1, b"\x52\x54\0\0\0\1")
    table = struct.pack("<I", 1) + b"\x52\x54\0\0\0\2" + struct.pack("<I", 1) + b"\1\0\x5e\0\0\1"
    assert r.command(net.CTRL_MAC, 0, table)
    assert r.device.rx_filter() == {
        "name": "net0",
        "main-mac": "52:54:00:00:00:01",
        "promiscuous": True,
        "multicast": "all",
        "unicast": "normal",
        "vlan": "normal",
        "broadcast-allowed": True,
        "multicast-overflow": False,
        "unicast-overflow": False,
        "unicast-table": ["52:54:00:00:00:02"],
        "multicast-table": ["01:00:5e:00:00:01"],
        "vlan-table": [42],
    }
    assert r.command(net.CTRL_VLAN, 1, struct.pack("<H", 42))
    assert r.device.rx_filter()["vlan-table"] == []


def test_a_change_of_the_receive_filter_is_told_once_until_somebody_asks(rig):
    r = rig(FULL)

    def told():
        return [data for name, data in r.machine.events if name == "NIC_RX_FILTER_CHANGED"]

    assert not told()
    for number in range(50):
        assert r.command(net.CTRL_RX, 0, bytes([number & 1]))
    assert told() == [{"name": "net0", "path": "/machine/peripheral/net0"}]
    assert r.device.rx_filter()["promiscuous"] is True
    assert not r.command(net.CTRL_MAC, 1, b"short")
    assert len(told()) == 1, "what is refused changes nothing"
    assert r.command(net.CTRL_MAC, 1, b"\x52\x54\0\0\0\1")
    assert len(told()) == 2
    many = struct.pack("<I", 65) + b"\x52\x54\0\0\0\2" * 65 + struct.pack("<I", 0)
    assert r.command(net.CTRL_MAC, 0, many)
    assert len(told()) == 2
    found = r.device.rx_filter()
    assert found["unicast-overflow"] and found["unicast"] == "all" and len(found["unicast-table"]) == 64


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
    assert other.rx_filter()["vlan-table"] == [7]
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
    assert r.device.rx_filter()["vlan-table"] == []
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
