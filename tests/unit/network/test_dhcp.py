"""A DHCP request as bytes, and any bytes as an answer."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.errors import OperationFailed
from kvik.network.dhcp import discover_frame, parse_offer
from kvik.network.subnet import free_subnet
from kvik.network.trace import parse_trace

MAC = bytes.fromhex("525400123456")


def answered(frame: bytes, kind: int = 2) -> bytes:
    """The frame of a request turned into a server's answer to it."""
    made = bytearray(frame)
    made[36:38] = struct.pack("!H", 68)  # to the client's port
    made[42] = 2  # BOOTREPLY
    made[58:62] = IPv4Address("192.168.122.50").packed
    return (
        bytes(made[:278]) + b"\x63\x82\x53\x63" + bytes([53, 1, kind, 51, 4, 0, 0, 14, 16, 3, 4, 192, 168, 122, 1, 255])
    )


def test_an_offer_is_read_and_anything_else_is_none() -> None:
    frame = discover_frame(MAC, 7)
    assert frame[:12] == b"\xff" * 6 + MAC
    assert sum(struct.unpack("!10H", frame[14:34])) % 0xFFFF == 0  # the header's checksum holds (RFC 1071)
    offer = parse_offer(answered(frame), 7)
    assert offer is not None
    assert (str(offer.address), str(offer.router), offer.lease, offer.mask) == (
        "192.168.122.50",
        "192.168.122.1",
        3600,
        None,
    )
    assert parse_offer(answered(frame), 8) is None  # another's
    assert parse_offer(answered(frame, kind=5), 7) is None  # an acknowledgement
    assert parse_offer(frame, 7) is None  # a request


@given(st.binary(max_size=600), st.integers(0, 320))
def test_any_bytes_are_an_offer_or_none(noise: bytes, cut: int) -> None:
    parse_offer(noise, 7)
    parse_offer(answered(discover_frame(MAC, 7))[:cut] + noise, 7)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_step_of_a_trace_or_none(noise: bytes) -> None:
    parse_trace(noise)


def test_a_free_subnet_overlaps_nothing() -> None:
    assert str(free_subnet([])) == "192.168.122.0/24"
    assert str(free_subnet([IPv4Network("192.168.122.128/25"), IPv4Network("192.168.123.0/24")])) == "192.168.124.0/24"
    assert str(free_subnet([IPv4Network("192.168.0.0/16")])).startswith("10.")
    with pytest.raises(OperationFailed, match="no private IPv4 subnet"):
        free_subnet([IPv4Network("192.168.0.0/16"), IPv4Network("10.0.0.0/8")])
