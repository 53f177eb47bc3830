"""DHCPv6 as bytes: what a client says, and what it takes from an answer; odd ones are nobody's."""

from __future__ import annotations

import struct
from ipaddress import IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.network.dhcp6 import REPLY, Offer6, client_message, duid_of_mac, parse_answer

DUID = duid_of_mac(bytes.fromhex("525400000001"))
SERVER = b"\0\1\0\1server"


def option(code: int, data: bytes) -> bytes:
    return struct.pack("!HH", code, len(data)) + data


ADDRESS = option(5, IPv6Address("fd00::5").packed + bytes(8))
LENT = option(1, DUID) + option(2, SERVER) + option(3, bytes(12) + ADDRESS) + option(23, IPv6Address("fd00::1").packed)


def answer(kind: int = 2, transaction: int = 7, options: bytes = LENT) -> bytes:
    return bytes([kind]) + transaction.to_bytes(3) + options


def test_what_a_server_offers_is_read_and_asked_for() -> None:
    offer = parse_answer(answer(), DUID, 7)
    assert offer == Offer6(IPv6Address("fd00::5"), SERVER, (IPv6Address("fd00::1"),))
    assert parse_answer(answer(kind=REPLY), DUID, 7, REPLY) == offer
    asked = client_message(DUID, 9, name="web", taken=offer)
    assert asked[:4] == b"\3\0\0\t" and option(2, SERVER) in asked and b"\3web" in asked
    assert IPv6Address("fd00::5").packed in asked
    assert client_message(DUID, 9)[:1] == b"\1"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        answer(kind=REPLY),
        answer(transaction=8),
        answer(options=LENT[4:]),
        answer(options=option(1, b"other") + option(2, SERVER)),
        answer(options=option(1, DUID)),
    ],
)
def test_an_answer_to_somebody_else_is_none(data: bytes) -> None:
    assert parse_answer(data, DUID, 7) is None


def test_a_server_without_an_address_is_heard() -> None:
    found = parse_answer(answer(options=option(1, DUID) + option(2, SERVER) + option(3, bytes(12))), DUID, 7)
    assert found == Offer6(None, SERVER)


@given(st.binary(max_size=200))
def test_nothing_that_is_sent_is_an_error(rest: bytes) -> None:
    parse_answer(answer(options=option(1, DUID) + option(2, SERVER) + rest), DUID, 7)
