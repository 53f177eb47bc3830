"""Cards with a long MTU beside others, on one switch."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.network.switch import dhcp
from kvik.network.switch.mtu import LONG, STANDARD, fit
from kvik.network.switch.packets import checksum, ip_bytes, read_ip, write_ip
from unit.network.switch.wire import GATEWAY, Machine, Wire, message

HERE = ip_bytes("10.0.0.1")
ONE, TWO = ip_bytes("10.0.0.10"), ip_bytes("10.0.0.11")


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


def boot(wire: Wire, machine: Machine, *wanted: int) -> int:
    """The MTU that DHCP tells a client that asks for these options; 0: none."""
    mtu = 0
    for kind in (dhcp.DISCOVER, dhcp.REQUEST):
        text = message(kind, machine.mac, requested=wire.gateway.expect(machine.port))[:-1]
        text += bytes((55, len(wanted), *wanted, 255))
        (answer,) = wire.ask(machine, machine.udp((bytes(4), 68), (b"\xff" * 4, 67), text, to=b"\xff" * 6))
        packet = read_ip(answer)
        assert packet is not None
        body, position = bytes(packet.payload[8:]), 240
        while body[position] != 255:
            if body[position] == 26:
                mtu = int.from_bytes(body[position + 2 : position + 4])
            position += 2 + body[position + 1]
    return mtu


def pair(wire: Wire) -> tuple[Machine, Machine]:
    """One with a long MTU and one without."""
    long, short = wire.add("long", 1), wire.add("short", 2)
    long.port.mtu = LONG
    assert boot(wire, long, 1, 3, 26) == LONG
    assert boot(wire, short, 1, 3, 26) == 0
    return long, short


def packet(one: Machine, other: Machine, size: int, flags: int) -> bytes:
    frame = write_ip((other.mac, one.mac), ONE, TWO, 17, bytes(range(256)) * (size // 256))
    head = bytearray(frame[14:34])
    head[6:8], head[10:12] = struct.pack("!H", flags), bytes(2)
    head[10:12] = struct.pack("!H", checksum(head))
    return frame[:14] + bytes(head) + frame[34:]


def test_who_can_and_asks_is_told_a_long_mtu(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    one.port.mtu = LONG
    assert boot(wire, one, 1, 3) == 0, "it did not ask"
    assert boot(wire, one, 1, 3, 26) == LONG
    assert boot(wire, two, 1, 3, 26) == 0, "its card could not"


def test_another_card_behind_the_port_is_told_none(wire: Wire) -> None:
    one = wire.add("one", 1)
    one.port.mtu = LONG
    nested = Machine(one.port, one.sock, b"\x52\x54\0\xaa\0\x77")
    text = message(dhcp.DISCOVER, nested.mac)[:-1] + bytes((55, 1, 26, 255))
    (answer,) = wire.ask(nested, nested.udp((bytes(4), 68), (b"\xff" * 4, 67), text, to=b"\xff" * 6))
    assert struct.pack("!BBH", 26, 2, LONG) not in answer


def test_the_networks_own_mtu_is_told_to_all_and_nothing_is_cut() -> None:
    wire = Wire(mtu=9000)
    one, two = wire.add("one", 1), wire.add("two", 2)
    assert boot(wire, one) == 9000
    long = packet(one, two, 8192, 0)
    wire.ask(one, long)
    assert two.received()[-1:] == [long]
    wire.close()


def test_between_long_ones_a_long_frame_passes(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    for machine in (one, two):
        machine.port.mtu = LONG
        boot(wire, machine, 26)
    frame = packet(one, two, 60_160, 0x4000)
    assert wire.ask(one, frame) == []
    assert two.received() == [frame]


def test_to_a_short_one_it_is_cut_and_makes_the_same_packet(wire: Wire) -> None:
    long, short = pair(wire)
    sent, small = packet(long, short, 4096, 0), packet(long, short, 512, 0)
    assert wire.ask(long, small, sent, small) == []
    first, *pieces, last = short.received()
    assert first == last == small
    whole, at = b"", 0
    for number, frame in enumerate(pieces):
        found = read_ip(frame)  # looks at its checksum, too
        assert found is not None
        assert len(frame) <= 14 + STANDARD
        flags = int.from_bytes(frame[20:22])
        assert flags == (0x2000 if number < len(pieces) - 1 else 0) | at // 8
        assert frame[:14] == sent[:14]
        assert (found.source, found.target) == (ONE, TWO)
        whole += bytes(found.payload)
        at = len(whole)
    assert whole == sent[34:]


def test_what_may_not_be_cut_is_answered_with_the_mtu_that_fits(wire: Wire) -> None:
    long, short = pair(wire)
    frame = packet(long, short, 4096, 0x4000)
    (answer,) = wire.ask(long, frame)
    assert short.received() == []
    found = read_ip(answer)
    assert found is not None
    assert (found.source, found.target, found.protocol) == (HERE, ONE, 1)
    assert bytes(found.payload[:2]) == b"\3\4"
    assert int.from_bytes(found.payload[6:8]) == STANDARD
    assert bytes(found.payload[8:36]) == frame[14:42]


def test_ipv6_is_told_too(wire: Wire) -> None:
    long, short = pair(wire)
    source, target = b"\xfe\x80" + bytes(13) + b"\1", b"\xfe\x80" + bytes(13) + b"\2"
    header = struct.pack("!IHBB", 6 << 28, 4096, 17, 64) + source + target
    (answer,) = wire.ask(long, short.mac + long.mac + b"\x86\xdd" + header + bytes(4096))
    assert short.received() == []
    assert answer[:14] == long.mac + GATEWAY + b"\x86\xdd"
    assert answer[38:54] == source
    body = answer[54:]
    assert (body[0], int.from_bytes(body[4:8]), len(answer)) == (2, STANDARD, 14 + 1280)
    assert checksum(answer[22:54] + struct.pack("!II", len(body), 58) + body) == 0
    assert body[8:48] == header


@given(st.binary(max_size=200), st.sampled_from([b"\x08\0", b"\x86\xdd", b"\x81\0"]), st.integers(68, 1500))
def test_nothing_that_is_sent_does_harm(body: bytes, kind: bytes, mtu: int) -> None:
    frame = memoryview(bytes(12) + kind + body + bytes(1400))
    pieces, _ = fit(frame, mtu, GATEWAY, HERE)
    assert all(len(piece) <= 14 + mtu for piece in pieces)
