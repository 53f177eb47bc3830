"""UDP from the host's loopback into a machine and back, with real sockets on the host's side."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvik.conf.devices.interface import PortForward, PortRange
from kvik.errors import ConfigUnsupported, HostError, OperationFailed
from kvik.network.switch import udp
from kvik.network.switch.control import Switch
from kvik.network.switch.packets import UDP, ip_bytes, read_ip, read_udp, write_ip, write_udp
from kvik.network.switch.udp import Flows, Forward
from kvik.network.switch.uplink import bind_udp, forward_arguments, loopback_udp, passt_udp
from unit.network.switch.guest import Guest
from unit.network.switch.wire import SETTINGS, Machine, Wire, mac

HERE, MACHINE = ip_bytes("10.0.0.1"), ip_bytes("10.0.0.10")


class Forwarded:
    """A machine with an address, and a socket of the host's that leads to its port 53."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.machine = self.wire.add("one", 1)
        self.bound = bind_udp("127.0.0.1", 0)
        self.address = self.bound.getsockname()
        self.machine.port.flows = self.flows = Flows()
        self.forward = Forward(self.bound, self.machine.port, 53)
        self.flows.forwards.append(self.forward)

    def client(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(10)
        sock.connect(self.address)
        return sock

    def receive(self) -> list[tuple[tuple[bytes, int], int, bytes]]:
        """What the machine gets of what clients have sent."""
        self.flows.receive(self.forward, self.wire.gateway)
        found = []
        for frame in self.machine.received():
            packet = read_ip(frame)
            datagram = read_udp(packet.payload) if packet is not None and packet.protocol == UDP else None
            if packet is not None and datagram is not None:
                found.append(((packet.source, datagram[0]), datagram[1], bytes(datagram[2])))
        return found

    def close(self) -> None:
        self.flows.close()
        self.wire.close()


@pytest.fixture
def forwarded() -> Iterator[Forwarded]:
    made = Forwarded()
    yield made
    made.close()


def say(machine: Machine, source: int, target: int, data: bytes) -> bytes:
    return machine.udp((MACHINE, source), (HERE, target), data)


def test_each_client_is_a_flow_of_its_own_and_nobody_else_may_answer(forwarded: Forwarded) -> None:
    machine, wire = forwarded.machine, forwarded.wire
    with forwarded.client() as one, forwarded.client() as two:
        one.send(b"from one")
        two.send(b"from two")
        first, second = forwarded.receive()
        ports = [sock.getsockname()[1] for sock in (one, two)]
        assert (first, second) == (((HERE, ports[0]), 53, b"from one"), ((HERE, ports[1]), 53, b"from two"))
        assert wire.ask(machine, say(machine, 53, ports[1], b"to two"), say(machine, 53, ports[0], b"to one")) == []
        assert (one.recv(99), two.recv(99)) == (b"to one", b"to two")
        # From another port of the machine, or to no flow: as to any port of the gateway's where nobody is.
        answers = wire.ask(machine, say(machine, 54, ports[0], b"forged"), say(machine, 53, 9, b"begun"))
        assert [packet.payload[0] for frame in answers if (packet := read_ip(frame))] == [3, 3]  # ICMP unreachable
        one.settimeout(0.05)
        with pytest.raises(TimeoutError):
            one.recv(99)


def test_a_flow_is_forgotten_in_time_and_there_are_never_too_many(
    forwarded: Forwarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, wire = forwarded.machine, forwarded.wire
    monkeypatch.setattr(udp, "FLOWS", 2)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(forwarded.client()) for _ in range(3)]
        ports = [client.getsockname()[1] for client in clients]
        for client in clients:
            client.send(b"hello")
            assert len(forwarded.receive()) == 1
            wire.plane.now += 1
        (answer,) = wire.ask(machine, say(machine, 53, ports[0], b"too late"))
        assert answer[23] == 1, "ICMP: the oldest made room"
        assert wire.ask(machine, say(machine, 53, ports[2], b"in time")) == []
        assert clients[2].recv(99) == b"in time"
        wire.plane.now += udp.IDLE + 1
        wire.gateway.tick()
        assert len(wire.ask(machine, say(machine, 53, ports[2], b"too late"))) == 1


def test_what_a_machine_cannot_take_is_lost_and_counted(forwarded: Forwarded) -> None:
    with forwarded.client() as client:
        client.send(bytes(1473))
        assert forwarded.receive() == []
        assert forwarded.machine.port.dropped == 1
        client.send(bytes(1472))
        assert len(forwarded.receive()) == 1


def test_which_forwards_are_the_switchs_and_which_are_passts() -> None:
    def forward(address: str | None, proto: str = "udp") -> PortForward:
        ranges = [PortRange(start=5000, end=5003, to=53), PortRange(start=5001, exclude=True)]
        return PortForward(proto=proto, address=address, ranges=ranges)

    leads = [("127.0.0.1", 5000, 53), ("127.0.0.1", 5002, 55), ("127.0.0.1", 5003, 56)]
    assert loopback_udp([forward("127.0.0.1"), forward("192.0.2.1"), forward("127.0.0.1", "tcp")]) == leads
    assert forward_arguments([forward("127.0.0.1")]) == []
    assert loopback_udp([forward(None)]) == leads
    assert forward_arguments([forward(None)])[0] == "--udp-ports", "from other addresses passt leads"
    assert passt_udp([forward(None)]) == [(53, 56)], "and their answers go by passt"
    assert passt_udp([forward("127.0.0.1"), forward(None, "tcp")]) == []
    many = PortForward(proto="udp", address="127.0.0.1", ranges=[PortRange(start=2000, end=2256)])
    with pytest.raises(ConfigUnsupported, match="256 are the most"):
        loopback_udp([many])
    with bind_udp("127.0.0.1", 0) as taken, pytest.raises(HostError, match="in use"):
        bind_udp("127.0.0.1", taken.getsockname()[1])


def test_the_confined_process_relays(tmp_path: Path) -> None:
    switch = Switch.start(tmp_path / "control", SETTINGS)
    card, theirs = socket.socketpair()
    bound = bind_udp("127.0.0.1", 0)
    with contextlib.closing(Guest(card, mac(1).hex(":"))) as guest, bound, theirs:
        try:
            number, _ = switch.add_port("one", mac(1).hex(":"), theirs.fileno())
            switch.call("udp", (bound.fileno(),), port=number, to=7)
            guest.boot()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.settimeout(10)
                client.connect(bound.getsockname())
                client.send(b"ping")
                source, port, data = guest.datagram()
                assert (source[0], port, data) == (guest.gateway, 7, b"ping")
                answer = write_udp((guest.ip, 7), source, b"pong")
                card_of_gateway = guest.where(guest.gateway)
                guest.send(write_ip((card_of_gateway, guest.mac), guest.ip, guest.gateway, UDP, answer))
                assert client.recv(99) == b"pong"
            for given, fd in (
                ({"port": 99, "to": 7}, bound), ({"port": number, "to": 0}, bound), ({"port": number, "to": 7}, card),
            ):  # fmt: skip
                with pytest.raises(OperationFailed):
                    switch.call("udp", (fd.fileno(),), **given)
        finally:
            switch.stop()
