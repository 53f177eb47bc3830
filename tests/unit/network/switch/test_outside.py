"""UDP of machines to the world, by real sockets; the world is this host's loopback, let in for the test."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Iterator

import pytest

from kvik.network.switch import outside
from kvik.network.switch.packets import ICMP, Ip, checksum, ip_bytes, read_ip, read_udp, write_ip, write_udp
from unit.network.switch.wire import GATEWAY, Machine, Wire

MACHINE, LOOPBACK = ip_bytes("10.0.0.10"), ip_bytes("127.0.0.1")
PORT = 4000  # of the machine


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    monkeypatch.setattr(outside, "_HERE", (0,))  # nothing but loopback can be counted on where tests run
    made = Wire()
    yield made
    made.close()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(10)
        yield sock


def say(machine: Machine, server: socket.socket, data: bytes, port: int = PORT) -> bytes:
    return machine.udp((MACHINE, port), (LOOPBACK, server.getsockname()[1]), data)


def hear(wire: Wire, machine: Machine) -> list[Ip]:
    """What comes from outside, as the machine gets it."""
    poller = select.poll()
    for outlet in wire.outlets:
        poller.register(outlet.fileno(), select.POLLIN)
    for fd, mask in poller.poll(10_000):
        outlet = next(one for one in wire.outlets if one.fileno() == fd)
        wire.gateway.outside.receive(wire.gateway, outlet, mask)
    found = [read_ip(frame) for frame in machine.received()]
    return [packet for packet in found if packet is not None]


def datagrams(packets: list[Ip]) -> list[tuple[bytes, int, int, bytes]]:
    """Source, its port, the machine's port, data."""
    found = [(packet, read_udp(packet.payload)) for packet in packets]
    return [(packet.source, text[0], text[1], bytes(text[2])) for packet, text in found if text is not None]


def test_a_question_goes_out_and_its_answer_comes_back(wire: Wire, server: socket.socket) -> None:
    one = wire.add("one", 1)
    assert wire.ask(one, say(one, server, b"question")) == []
    question, client = server.recvfrom(99)
    assert question == b"question"
    server.sendto(b"answer", client)
    (packet,) = hear(wire, one)
    assert packet.target == MACHINE
    port = server.getsockname()[1]
    assert datagrams([packet]) == [(LOOPBACK, port, PORT, b"answer")]
    assert checksum(LOOPBACK + MACHINE + b"\0\x11" + len(packet.payload).to_bytes(2) + bytes(packet.payload)) == 0


def test_its_port_is_the_same_to_everybody_and_only_whom_it_spoke_to_is_heard(
    wire: Wire, server: socket.socket
) -> None:
    one = wire.add("one", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        other.settimeout(10)
        wire.ask(one, say(one, server, b"to one"))
        _, client = server.recvfrom(99)
        other.sendto(b"nobody asked", client)
        server.sendto(b"answer", client)
        assert [text for *_, text in datagrams(hear(wire, one))] == [b"answer"]
        wire.ask(one, say(one, other, b"to another"))
        assert other.recvfrom(99) == (b"to another", client)
        other.sendto(b"now", client)
        assert [text for *_, text in datagrams(hear(wire, one))] == [b"now"]


def test_a_port_where_nobody_is_says_so(wire: Wire) -> None:
    one = wire.add("one", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        port = gone.getsockname()[1]
    frame = one.udp((MACHINE, PORT), (LOOPBACK, port), b"anybody?")
    wire.ask(one, frame)
    (packet,) = hear(wire, one)
    assert (packet.source, packet.target, packet.protocol) == (LOOPBACK, MACHINE, ICMP)
    assert bytes(packet.payload[:2]) == b"\3\3"
    assert checksum(packet.payload) == 0
    assert bytes(packet.payload[8:28]) == frame[14:34], "its own header is quoted"
    assert bytes(packet.payload[28:34]) == frame[34:40], "and its ports"


def test_a_refusal_costs_the_next_datagram_nothing(wire: Wire, server: socket.socket) -> None:
    one = wire.add("one", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        port = gone.getsockname()[1]
    wire.ask(one, one.udp((MACHINE, PORT), (LOOPBACK, port), b"anybody?"))
    (refused,) = wire.ask(one, say(one, server, b"to who is there"))
    packet = read_ip(refused)
    assert packet is not None
    assert packet.protocol == ICMP
    assert server.recv(99) == b"to who is there"
    assert one.port.dropped == 0


def test_where_there_is_no_way_that_is_said(wire: Wire, server: socket.socket) -> None:
    one = wire.add("one", 1)
    wire.ask(one, say(one, server, b"hello"))

    class Nowhere:
        def sendto(self, *datagram: object) -> int:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

        def recvmsg(self, *sizes: int) -> None:
            raise BlockingIOError

    (outlet,) = wire.outlets
    kept, outlet.sock = outlet.sock, Nowhere()  # type: ignore[assignment]  # of a host that is offline
    try:
        (answer,) = wire.ask(one, say(one, server, b"hello"))
    finally:
        outlet.sock = kept
    packet = read_ip(answer)
    assert packet is not None
    assert bytes(packet.payload[:2]) == b"\3\0"


@pytest.mark.parametrize("target", ["127.0.0.1", "127.0.0.53", "0.0.0.0", "224.0.0.251", "255.255.255.255"])
def test_the_hosts_loopback_and_groups_are_forbidden(target: str) -> None:
    wire = Wire()
    one = wire.add("one", 1)
    (answer,) = wire.ask(one, one.udp((MACHINE, PORT), (ip_bytes(target), 53), b"?"))
    packet = read_ip(answer)
    assert packet is not None
    assert bytes(packet.payload[:2]) == b"\3\x0d"
    assert wire.outlets == []
    wire.close()


def test_only_an_address_that_it_may_have_goes_out(wire: Wire, server: socket.socket) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    theirs = wire.gateway.expect(two.port)
    for source in (theirs, ip_bytes("10.0.0.1"), ip_bytes("10.0.0.255"), ip_bytes("192.0.2.7")):
        before = one.port.refused
        wire.ask(one, one.udp((source, PORT), (LOOPBACK, server.getsockname()[1]), b"forged"))
        assert one.port.refused == before + 1
    assert wire.outlets == []


@pytest.mark.parametrize("cut", [14, 20, 33, 34, 40, 41])
def test_what_is_damaged_goes_nowhere(wire: Wire, server: socket.socket, cut: int) -> None:
    one = wire.add("one", 1)
    wire.ask(one, say(one, server, b"whole")[:cut])
    assert wire.outlets == []


def test_what_passt_leads_to_answers_by_passt_and_so_do_fragments(wire: Wire, server: socket.socket) -> None:
    one = wire.add("one", 1)
    way = wire.uplink(one)
    one.port.forwarded = [(PORT, PORT + 1)]
    forwarded = say(one, server, b"answer")
    payload = write_udp((MACHINE, 9), (LOOPBACK, 9), b"part")
    whole = write_ip((GATEWAY, one.mac), MACHINE, LOOPBACK, 17, payload)
    fragment = whole[:20] + b"\x20\0" + whole[22:]
    wire.ask(one, forwarded, fragment, say(one, server, b"own", PORT + 2))
    assert way.received() == [forwarded, fragment]
    assert server.recv(99) == b"own"


def test_sockets_are_closed_in_time_and_there_are_never_too_many(
    wire: Wire, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "PER_PORT", 3)
    one = wire.add("one", 1)
    for number in range(5):
        wire.ask(one, say(one, server, b"hello", 5000 + number))
    assert [outlet.source[1] for outlet in wire.outlets] == [5002, 5003, 5004]
    wire.ask(one, say(one, server, b"hello", 5002), say(one, server, b"hello", 5005))
    assert [outlet.source[1] for outlet in wire.outlets] == [5002, 5004, 5005], "the one unused for longest made room"
    for _ in range(7):
        client = server.recvfrom(99)[1]
    server.sendto(b"answer", client)  # to 5005
    hear(wire, one)
    wire.plane.now += outside.UNANSWERED + 1
    wire.gateway.tick()
    assert [outlet.source[1] for outlet in wire.outlets] == [5005]
    wire.plane.now += outside.IDLE
    wire.gateway.tick()
    assert wire.outlets == []
    wire.ask(one, say(one, server, b"hello"))
    wire.plane.remove(one.port)
    assert wire.outlets == []


def test_of_all_machines_the_greediest_makes_room(
    wire: Wire, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire.gateway.outside, "_most", 4)
    greedy, modest = wire.add("greedy", 1), wire.add("modest", 2)
    for number in range(4):
        wire.ask(greedy, say(greedy, server, b"hello", 5000 + number))
    other = ip_bytes("10.0.0.11")
    wire.ask(modest, modest.udp((other, PORT), (LOOPBACK, server.getsockname()[1]), b"me too"))
    assert [outlet.port.name for outlet in wire.outlets] == ["greedy"] * 3 + ["modest"]


def test_an_answer_that_the_card_cannot_take_is_lost_and_counted(wire: Wire, server: socket.socket) -> None:
    one = wire.add("one", 1)
    wire.ask(one, say(one, server, b"how much?"))
    client = server.recvfrom(99)[1]
    server.sendto(bytes(1473), client)
    server.sendto(bytes(1472), client)
    assert [len(text) for *_, text in datagrams(hear(wire, one))] == [1472]
    assert one.port.dropped == 1


def test_an_isolated_network_has_no_way_out_for_it(server: socket.socket) -> None:
    wire = Wire(router=False)
    one = wire.add("one", 1)
    (answer,) = wire.ask(one, one.udp((MACHINE, PORT), (ip_bytes("192.0.2.1"), 9), b"?"))
    packet = read_ip(answer)
    assert packet is not None
    assert bytes(packet.payload[:2]) == b"\3\0"
    assert wire.outlets == []
    wire.close()
