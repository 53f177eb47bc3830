"""DHCP, names and the way out, asked as a machine asks them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.errors import InvalidArgument
from kvik.network.switch import dhcp, dns
from kvik.network.switch.packets import checksum, ip_bytes, ip_text, read_arp, read_ip, read_udp, write_arp, write_ip
from kvik.network.switch.settings import from_json
from unit.network.switch.wire import ALL, GATEWAY, SETTINGS, Machine, Wire, mac, message, query

HERE = ip_bytes("10.0.0.1")
NONE = bytes(4)


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


def talk(wire: Wire, machine: Machine, data: bytes, source: bytes = NONE) -> tuple[int, bytes, dict[int, bytes]] | None:
    """The kind of the answer, the address it gives, its options."""
    answers = wire.ask(machine, machine.udp((source, 68), (b"\xff" * 4, 67), data, to=ALL))
    if not answers:
        return None
    packet = read_ip(answers[-1])
    assert packet is not None
    datagram = read_udp(packet.payload)
    assert datagram is not None
    body = bytes(datagram[2])
    options, position = {}, 240
    while body[position] != 255:
        options[body[position]] = body[position + 2 : position + 2 + body[position + 1]]
        position += 2 + body[position + 1]
    return options[53][0], body[16:20], options


def lease(wire: Wire, machine: Machine, **options: bytes) -> bytes:
    offer = talk(wire, machine, message(dhcp.DISCOVER, machine.mac))
    assert offer is not None
    assert offer[0] == dhcp.OFFER
    ack = talk(wire, machine, message(dhcp.REQUEST, machine.mac, requested=offer[1], server=HERE, **options))
    assert ack is not None
    assert (ack[0], ack[1]) == (dhcp.ACK, offer[1])
    return ack[1]


def resolve(wire: Wire, machine: Machine, data: bytes) -> tuple[int, bytes]:
    """RCODE and the whole answer."""
    (answer,) = wire.ask(machine, machine.udp((ip_bytes("10.0.0.10"), 5353), (HERE, 53), data))
    packet = read_ip(answer)
    assert packet is not None
    assert packet.source == HERE
    datagram = read_udp(packet.payload)
    assert datagram is not None
    body = bytes(datagram[2])
    assert body[:2] == data[:2]
    return body[3] & 15, body


# -- DHCP


def test_a_machine_gets_an_address_and_what_goes_with_it(wire: Wire) -> None:
    one = wire.add("one", 1)
    offer = talk(wire, one, message(dhcp.DISCOVER, one.mac))
    assert offer is not None
    kind, address, options = offer
    assert kind == dhcp.OFFER
    assert ip_bytes("10.0.0.10") <= address <= ip_bytes("10.0.0.20")
    assert options[54] == options[3] == options[6] == HERE
    assert options[1] == b"\xff\xff\xff\0"
    assert options[15] == b"test"
    assert lease(wire, one) == address
    assert [item["hostname"] for item in wire.gateway.leases()] == ["one"]


def test_a_new_switch_gives_the_same_address_again(wire: Wire) -> None:
    first = lease(wire, wire.add("one", 1))
    other = Wire()
    other.add("two", 2)
    assert lease(other, other.add("one", 1)) == first
    other.close()


def test_a_reserved_address_is_for_its_card(wire: Wire) -> None:
    wire.gateway.configure(from_json({**SETTINGS, "hosts": {"52:54:00:aa:00:02": {"ip": "10.0.0.12", "name": "desk"}}}))
    one, two = wire.add("one", 1), wire.add("", 2)
    wanted = talk(wire, one, message(dhcp.DISCOVER, one.mac, requested=ip_bytes("10.0.0.12")))
    assert wanted is not None
    assert wanted[1] != ip_bytes("10.0.0.12")
    assert lease(wire, two) == ip_bytes("10.0.0.12")
    assert resolve(wire, one, query("desk"))[1].endswith(ip_bytes("10.0.0.12"))


def test_ranges_and_reservations_have_their_own_lease_times(wire: Wire) -> None:
    ranges = [["10.0.0.10", "10.0.0.10", 120], ["10.0.0.200", "10.0.0.200"]]
    hosts = {"52:54:00:aa:00:03": {"ip": "10.0.0.99", "lease": 0xFFFF_FFFF}}
    wire.gateway.configure(from_json({**SETTINGS, "ranges": ranges, "hosts": hosts}))
    given = {}
    for number in (1, 2, 3):
        machine = wire.add(str(number), number)
        lease(wire, machine)
        ack = talk(wire, machine, message(dhcp.REQUEST, machine.mac, requested=wire.gateway.expect(machine.port)))
        assert ack is not None
        given[ip_text(ack[1])] = struct.unpack("!I", ack[2][51])[0]
    assert given == {"10.0.0.10": 120, "10.0.0.200": 3600, "10.0.0.99": 0xFFFF_FFFF}


def test_names_of_our_domain_are_ours_alone_only_if_that_is_said(wire: Wire) -> None:
    one = wire.add("one", 1)
    names = {"web": ["10.0.0.5", "10.0.0.6"], "printer.test": ["10.0.0.7"]}
    wire.gateway.configure(from_json({**SETTINGS, "names": names, "local_only": False, "forward_plain": True}))
    # Nobody outside can be asked here: SERVFAIL says that it would have been.
    for name in ("www.test", "nobody"):
        assert resolve(wire, one, query(name))[0] == dns.SERVFAIL
    assert all(ip_bytes(ip) in resolve(wire, one, query("web.test"))[1] for ip in names["web"])
    assert resolve(wire, one, query("printer.test"))[1].endswith(ip_bytes("10.0.0.7"))
    wire.gateway.configure(from_json({**SETTINGS, "names": names}))
    for name in ("www.test", "nobody"):
        assert resolve(wire, one, query(name))[0] == dns.NXDOMAIN


def test_without_an_address_machines_are_among_themselves() -> None:
    wire = Wire(ip="", prefix=0, ranges=[], router=False)
    one, two = wire.add("one", 1), wire.add("two", 2)
    assert talk(wire, one, message(dhcp.DISCOVER, one.mac)) is None
    claim = write_arp(1, one.mac, ip_bytes("10.0.0.1"), bytes(6), ip_bytes("10.0.0.2"))
    one.send(ALL + claim[6:], one.frame(two.mac))
    wire.run()
    assert len(two.received()) == 2
    assert wire.gateway.leases() == []
    wire.close()


def test_what_a_client_had_before_is_believed_where_it_is_free(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    ack = talk(wire, one, message(dhcp.REQUEST, one.mac, requested=ip_bytes("10.0.0.17")))
    assert ack is not None
    assert ack[:2] == (dhcp.ACK, ip_bytes("10.0.0.17"))
    for wrong in ("10.0.0.17", "10.0.0.1", "10.0.0.99", "192.168.0.4"):
        nak = talk(wire, two, message(dhcp.REQUEST, two.mac, requested=ip_bytes(wrong)))
        assert nak is not None
        assert nak[0] == dhcp.NAK
    renewed = talk(wire, one, message(dhcp.REQUEST, one.mac, client=ip_bytes("10.0.0.17")), ip_bytes("10.0.0.17"))
    assert renewed is not None
    assert renewed[0] == dhcp.ACK


def test_one_machine_cannot_take_the_whole_pool(wire: Wire) -> None:
    wire.gateway.configure(from_json({**SETTINGS, "ranges": [["10.0.0.10", "10.0.0.200"]]}))
    one, two = wire.add("one", 1), wire.add("two", 2)
    given = [talk(wire, one, message(dhcp.DISCOVER, b"\x02\0\0\0\0" + bytes((number,)))) for number in range(100)]
    assert sum(item is not None for item in given) == dhcp.PER_PORT
    assert lease(wire, two)
    wire.plane.remove(one.port)
    assert [item["mac"] for item in wire.gateway.leases()] == ["52:54:00:aa:00:02"]


def test_an_exhausted_pool_is_silent_until_a_lease_ends(wire: Wire) -> None:
    wire.gateway.configure(from_json({**SETTINGS, "ranges": [["10.0.0.10", "10.0.0.11"]]}))
    one, two, three = (wire.add(str(number), number) for number in (1, 2, 3))
    assert {lease(wire, one), lease(wire, two)} == {ip_bytes("10.0.0.10"), ip_bytes("10.0.0.11")}
    assert talk(wire, three, message(dhcp.DISCOVER, three.mac)) is None
    wire.plane.now += 3601
    wire.gateway.tick()
    assert lease(wire, three)


def test_nobody_asks_or_releases_for_anothers_card(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    address = lease(wire, one)
    assert talk(wire, two, message(dhcp.DISCOVER, one.mac)) is None
    talk(wire, two, message(dhcp.RELEASE, one.mac, client=address))
    assert len(wire.gateway.leases()) == 1
    talk(wire, one, message(dhcp.RELEASE, one.mac, client=address), address)
    assert wire.gateway.leases() == []


def test_a_declined_address_is_not_given_again(wire: Wire) -> None:
    one = wire.add("one", 1)
    address = lease(wire, one)
    talk(wire, one, message(dhcp.DECLINE, one.mac, requested=address, server=HERE))
    assert lease(wire, one) != address


def test_an_address_that_another_switch_gave_is_found_by_arp(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    address = wire.gateway.welcome(one.port)
    (probe,) = one.received()
    asked = read_arp(probe)
    assert asked is not None
    assert asked.target == address
    wire.ask(one, write_arp(2, one.mac, address, GATEWAY, HERE))
    assert resolve(wire, two, query("one"))[1].endswith(address)


@given(st.binary(max_size=600))
def test_no_dhcp_message_does_harm(data: bytes) -> None:
    server = dhcp.Dhcp(from_json(SETTINGS))
    for raw in (data, message(dhcp.DISCOVER, mac(1))[:240] + data):
        request = dhcp.parse(raw)
        if request is not None:
            server.answer(1, request, 0.0)
    assert len(server.leases) <= dhcp.PER_PORT


# -- names


def test_machines_have_names_with_and_without_the_domain_and_backwards(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    address = lease(wire, one)
    for name in ("one", "ONE", "one.test"):
        rcode, answer = resolve(wire, two, query(name))
        assert (rcode, answer[-4:]) == (dns.NOERROR, address)
    assert resolve(wire, two, query("one", 28))[0] == dns.NOERROR  # no IPv6 address, and no error
    backwards = ".".join(reversed(ip_text(address).split("."))) + ".in-addr.arpa"
    assert b"\x03one\x04test\0" in resolve(wire, two, query(backwards, 12))[1]
    assert resolve(wire, two, query("nobody"))[0] == resolve(wire, two, query("nobody.test"))[0] == dns.NXDOMAIN


def test_a_guest_cannot_call_itself_by_anothers_name(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    address = lease(wire, one)
    lease(wire, two, name=b"one")
    ack = talk(wire, two, message(dhcp.REQUEST, b"\x02\0\0\0\0\x09", requested=ip_bytes("10.0.0.19"), name=b"one"))
    assert ack is not None
    assert resolve(wire, two, query("one"))[1][-4:] == address
    talk(wire, two, message(dhcp.REQUEST, b"\x02\0\0\0\0\x09", requested=ip_bytes("10.0.0.19"), name=b"Inner"))
    assert resolve(wire, one, query("inner"))[1][-4:] == ip_bytes("10.0.0.19")


def test_other_names_are_asked_outside_or_refused(wire: Wire) -> None:
    one = wire.add("one", 1)
    assert resolve(wire, one, query("example.org"))[0] == dns.SERVFAIL  # this host has no resolver
    wire.gateway.configure(from_json({**SETTINGS, "forward_dns": False}))
    assert resolve(wire, one, query("example.org"))[0] == dns.REFUSED


@pytest.mark.parametrize(
    ("data", "rcode"),
    [
        (query("a")[:-2], dns.FORMERR),
        (query("a")[:4] + b"\0\2" + query("a")[6:], dns.FORMERR),
        (query("a")[:12] + b"\xc0\x0c\0\1\0\1", dns.FORMERR),
        (query("a")[:12] + b"\x3f" * 300, dns.FORMERR),
        (query("a")[:2] + b"\x28\0" + query("a")[4:], dns.NOTIMP),
        (query("a")[:-1] + b"\x03", dns.REFUSED),
    ],
)
def test_a_damaged_query_gets_its_error(wire: Wire, data: bytes, rcode: int) -> None:
    assert resolve(wire, wire.add("one", 1), data)[0] == rcode


@given(st.binary(max_size=300))
def test_no_query_does_harm(data: bytes) -> None:
    for raw in (data, query("a")[:12] + data):
        found = dns.parse(raw)
        if isinstance(found, dns.Query):
            dns.Zone("test", lambda name: None, lambda ip: "").answer(found)
        if len(raw) >= 12:
            assert len(dns.error(raw, dns.SERVFAIL)) >= 12
            assert dns.truncated(raw)[2] & 2


# -- the way out, and the gateway itself


def test_what_goes_out_goes_to_the_machines_own_way_out(wire: Wire) -> None:
    one, two = wire.add("one", 1), wire.add("two", 2)
    way = wire.uplink(one)
    source = ip_bytes("10.0.0.10")
    macs, target = (GATEWAY, one.mac), ip_bytes("192.0.2.1")
    outside = [write_ip(macs, source, target, 6, b"segment %d" % number) for number in range(3)]
    inside = one.udp((source, 1000), (ip_bytes("10.0.0.77"), 9), b"neighbour")
    assert wire.ask(one, outside[0], outside[1], inside, outside[2]) == []
    assert way.received() == outside
    way.send(back := one.mac + GATEWAY + b"\x08\0" + bytes(46))
    wire.run(way)
    assert one.received() == [back]
    assert two.received() == []


def test_a_way_out_is_told_whom_it_serves(wire: Wire) -> None:
    one = wire.add("one", 1)
    way = wire.uplink(one)
    address = lease(wire, one)
    said = read_arp(way.received()[-1])
    assert said is not None
    assert (said.sender_mac, said.sender, said.target) == (one.mac, address, HERE)


def test_without_a_way_out_it_is_said_at_once(wire: Wire) -> None:
    one = wire.add("one", 1)
    source = ip_bytes("10.0.0.10")
    for target, code in ((ip_bytes("192.0.2.1"), 0), (HERE, 3)):
        (answer,) = wire.ask(one, write_ip((GATEWAY, one.mac), source, target, 6, bytes((3, 232, 0, 9, *bytes(16)))))
        packet = read_ip(answer)
        assert packet is not None
        assert bytes(packet.payload[:2]) == bytes((3, code))
        assert checksum(packet.payload) == 0


def test_the_gateway_answers_ping(wire: Wire) -> None:
    one = wire.add("one", 1)
    body = b"\x08\0\0\0\0\1\0\1" + b"payload"
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    (answer,) = wire.ask(one, write_ip((GATEWAY, one.mac), ip_bytes("10.0.0.10"), HERE, 1, body))
    packet = read_ip(answer)
    assert packet is not None
    assert (bytes(packet.payload[:1]), bytes(packet.payload[4:]), checksum(packet.payload)) == (b"\0", body[4:], 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefix": 31}, {"mac": "53:54:00:00:00:01"}, {"ip": "10.0.0"}, {"ranges": [["10.0.0.20", "10.0.0.10"]]},
        {"ranges": [["10.0.1.2", "10.0.1.3"]]}, {"ranges": [["10.0.0.1", "10.0.0.9"]]}, {"mac": 5}, {"hosts": []},
        {"lease": 0},
        {"ip": "", "prefix": 0}, {"ranges": [["10.0.0.10", "10.0.0.20", -1]]}, {"names": {"web": ["10"]}},
        {"hosts": {"52:54:00:00:00:09": {"ip": "10.9.0.1"}}},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        from_json({**SETTINGS, **wrong})


def test_a_machine_begins_nothing_with_the_gateway_but_names(wire: Wire) -> None:
    one = wire.add("one", 1)
    way = wire.uplink(one)

    def tcp(port: int, flags: int) -> bytes:
        segment = struct.pack("!HHIIBBHHH", 1000, port, 1, 1, 0x50, flags, 1000, 0, 0)
        return write_ip((GATEWAY, one.mac), ip_bytes("10.0.0.10"), HERE, 6, segment)

    syn, answer, name = tcp(22, 0x02), tcp(40000, 0x12), tcp(53, 0x02)
    (refusal,) = wire.ask(one, syn, answer, name)
    packet = read_ip(refusal)
    assert packet is not None
    assert bytes(packet.payload[:2]) == b"\3\3"
    assert way.received() == [answer, name]
