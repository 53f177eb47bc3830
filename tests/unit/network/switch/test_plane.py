"""Where frames go, and what a hostile machine cannot do."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.network.switch import plane as planes
from kvik.network.switch.packets import ip_bytes, write_arp
from kvik.network.switch.port import MAX_FRAME, QUEUE, PortGone
from unit.network.switch.wire import ALL, GATEWAY, Wire, mac


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


def test_a_known_address_is_reached_by_one_port_only(wire: Wire) -> None:
    one, two, three = (wire.add(name, number) for number, name in enumerate(("one", "two", "three"), 1))
    frames = [one.frame(two.mac, b"%d" % number) for number in range(5)]
    assert wire.ask(one, *frames) == []
    assert two.received() == frames
    assert three.received() == []
    assert (two.port.tx_frames, one.port.rx_frames) == (5, 5)


def test_broadcasts_and_unknown_addresses_reach_everybody_else(wire: Wire) -> None:
    one, two, three = (wire.add(name, number) for number, name in enumerate(("one", "two", "three"), 1))
    frames = [one.frame(ALL), one.frame(mac(99))]
    assert wire.ask(one, *frames) == []
    assert two.received() == three.received() == frames


def test_an_address_that_was_seen_is_learned_and_forgotten_when_it_is_old(wire: Wire) -> None:
    one, two, three = (wire.add(name, number) for number, name in enumerate(("one", "two", "three"), 1))
    nested = mac(50)
    wire.ask(one, ALL + nested + b"\x88\xb5" + bytes(46))
    two.received(), three.received()
    wire.ask(two, two.frame(nested))
    assert len(one.received()) == 1
    assert three.received() == []
    wire.plane.now += planes.AGEING + 1
    wire.plane.age()
    wire.ask(two, two.frame(nested))
    assert len(three.received()) == 1


def test_frames_of_any_cut_arrive_whole_and_in_order(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    frames = [one.frame(two.mac, bytes([number]) * (60 + 7 * number)) for number in range(40)]
    stream = b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)
    for start in range(0, len(stream), 13):
        one.sock.sendall(stream[start : start + 13])
        wire.run(one)
    assert two.received() == frames


@pytest.mark.parametrize(
    "source", [mac(2), GATEWAY, b"\x01\0\0\0\0\x05"], ids=["another's card", "the gateway's", "a group's"]
)
def test_nobody_speaks_for_another(wire: Wire, source: bytes) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    assert wire.ask(one, two.mac + source + b"\x88\xb5" + bytes(46)) == []
    assert two.received() == []
    assert one.port.refused == 1


def test_a_port_learns_a_bounded_number_of_addresses(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    made_up = (b"\x02\0\0\0" + struct.pack(">H", number) for number in range(500))
    wire.ask(one, *(two.mac + source + b"\x88\xb5" + bytes(46) for source in made_up))
    assert len(one.port.macs) == planes.LEARNED
    assert len(two.received()) == planes.LEARNED
    assert len(wire.plane.table) == planes.LEARNED + 2
    wire.plane.remove(one.port)
    assert len(wire.plane.table) == 1


@pytest.mark.parametrize("sender", ["10.0.0.1", "10.0.0.15"], ids=["the gateway's", "another machine's"])
def test_arp_cannot_claim_what_is_anothers(wire: Wire, sender: str) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    wire.ask(two, write_arp(2, two.mac, ip_bytes("10.0.0.15"), GATEWAY, ip_bytes("10.0.0.1")))  # it has it
    wire.ask(one, write_arp(2, one.mac, ip_bytes(sender), ALL, ip_bytes("10.0.0.99")))
    assert two.received() == []
    assert one.port.refused == 1


def test_the_gateway_answers_arp_and_others_hear_nothing(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    ask = write_arp(1, one.mac, ip_bytes("10.0.0.15"), bytes(6), ip_bytes("10.0.0.1"))
    ask = ALL + ask[6:]
    (answer,) = wire.ask(one, ask)
    assert answer == write_arp(2, GATEWAY, ip_bytes("10.0.0.1"), one.mac, ip_bytes("10.0.0.15"))
    assert two.received() == []


def test_isolated_ports_hear_nothing_of_each_other(wire: Wire) -> None:
    one, two = wire.add("one", 1, isolated=True), wire.add("two", 2, isolated=True)
    three = wire.add("three", 3)
    wire.ask(one, one.frame(two.mac), one.frame(ALL), one.frame(three.mac))
    assert two.received() == []
    assert len(three.received()) == 2


def test_a_machine_that_stops_reading_holds_up_nobody(wire: Wire) -> None:
    one, deaf, three = (wire.add(name, number) for number, name in enumerate(("one", "deaf", "three"), 1))
    frame = one.frame(deaf.mac, bytes(1400))
    sent = 0
    while not deaf.port.dropped and sent < 100_000:  # its socket takes some megabytes
        one.send(*[frame] * 20)
        wire.run(one)
        sent += 20
    assert deaf.port.dropped > 0
    assert QUEUE < deaf.port.queued < QUEUE + (1 << 18) + MAX_FRAME
    assert deaf.port in wire.changed
    wire.ask(one, one.frame(three.mac))
    assert len(three.received()) == 1
    # What it missed is whole frames: it hears well again when it reads.
    got = 0
    while deaf.port.queued:
        got += len(deaf.received())
        deaf.port.flush()
    got += len(deaf.received())
    assert got == sent - deaf.port.dropped == deaf.port.tx_frames


def test_floods_are_rationed(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    heard = 0
    for _ in range(200):
        one.send(*[one.frame(ALL)] * 50)
        wire.run(one)
        heard += len(two.received())
    assert heard <= planes.BURST
    assert one.port.dropped == 10_000 - heard
    wire.plane.now += 1
    wire.ask(one, one.frame(ALL))
    assert len(two.received()) == 1


def test_a_length_that_no_frame_has_ends_the_port_and_no_other(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    one.sock.sendall(struct.pack(">I", MAX_FRAME + 1) + bytes(32))
    with pytest.raises(PortGone, match=f"a frame of {MAX_FRAME + 1} bytes"):
        wire.plane.receive(one.port)
    two.sock.close()
    with pytest.raises(PortGone, match="closed"):
        wire.plane.receive(two.port)


def test_the_largest_frame_passes(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    frame = one.frame(two.mac, bytes(MAX_FRAME - 14))
    wire.ask(one, frame)
    assert two.received() == [frame]


def test_a_card_is_on_a_network_once(wire: Wire) -> None:
    wire.add("one", 1)
    with pytest.raises(ValueError, match="is on this network already"):
        wire.add("again", 1)
    with pytest.raises(ValueError, match="is on this network already"):
        wire.add("gateway", 2, address=GATEWAY)


def test_bridge_protocols_and_other_dhcp_servers_are_not_passed_on(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    offer = one.udp((ip_bytes("10.0.0.66"), 67), (b"\xff" * 4, 68), bytes(300), to=ALL)
    wire.ask(one, one.frame(b"\x01\x80\xc2\0\0\0"), offer)
    assert two.received() == []
    wire.ask(one, one.frame(b"\x33\x33\0\0\0\x01", kind=b"\x86\xdd"))  # IPv6 between machines is theirs
    assert len(two.received()) == 1


@given(
    st.lists(st.binary(max_size=200), max_size=8),
    st.sampled_from([b"\x08\x00", b"\x08\x06", b"\x86\xdd", b""]),
    st.booleans(),
)
def test_no_frame_does_harm(bodies: list[bytes], kind: bytes, to_gateway: bool) -> None:
    wire = Wire()
    try:
        one, two = wire.add("one", 1), wire.add("two", 2)
        wire.uplink(one)
        target = GATEWAY if to_gateway else ALL
        one.send(*((target + one.mac + kind if kind else b"") + body for body in bodies))
        wire.run(one)
        assert not one.port.gone
        two.received()
        assert wire.ask(two, two.frame(one.mac)) == []
        assert two.frame(one.mac) in one.received()
    finally:
        wire.close()
