"""DHCP answers as they may come from anybody on the network."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvik.network.filters.dhcp import Lease, parse_ack

MAC = "52:54:00:00:00:01"


def frame(address: bytes = b"\x0a\0\0\x05", options: bytes = b"\x35\x01\x05\x33\x04\0\0\x0e\x10\xff") -> bytes:
    message = b"\x02\x01\x06\0" + b"\0" * 12 + address + b"\0" * 8 + bytes.fromhex("525400000001") + b"\0" * 202
    message += b"\x63\x82\x53\x63" + options
    udp = b"\0\x43\0\x44" + (8 + len(message)).to_bytes(2) + b"\0\0" + message
    return b"\0" * 12 + b"\x08\0" + b"\x45" + b"\0" * 8 + b"\x11" + b"\0" * 10 + udp


def test_an_acknowledgement_gives_an_address_for_its_lease() -> None:
    assert parse_ack(frame(), MAC) == Lease("10.0.0.5", 3600)
    forever = b"\0\0\x35\x01\x05\x33\x04\xff\xff\xff\xff\xff"
    assert parse_ack(frame(options=forever), MAC) == Lease("10.0.0.5", None)


def test_anything_else_gives_nothing() -> None:
    assert parse_ack(frame(), "52:54:00:00:00:02") is None
    assert parse_ack(frame(options=b"\x35\x01\x02\x33\x04\0\0\x0e\x10\xff"), MAC) is None, "an offer"
    assert parse_ack(frame(options=b"\x35\x01\x05\xff"), MAC) is None, "no lease: an answer to INFORM"
    assert parse_ack(frame(options=b"\x35\x01\x05\x33\x04\0\0"), MAC) is None, "cut off"
    assert parse_ack(frame(options=b"\x35\xff\x05"), MAC) is None
    for address in (b"\0\0\0\0", b"\x7f\0\0\x01", b"\xe0\0\0\x01", b"\xff\xff\xff\xff"):
        assert parse_ack(frame(address), MAC) is None
    good = frame()
    assert all(parse_ack(good[:length], MAC) is None for length in range(len(good) - 1))


@given(st.binary(max_size=600), st.integers(0, 400))
def test_no_bytes_do_more_than_be_ignored(noise: bytes, at: int) -> None:
    good = frame()
    lease = parse_ack(good[:at] + noise + good[at + len(noise) :], MAC)
    assert lease is None or lease.seconds is None or 0 < lease.seconds < 1 << 32
