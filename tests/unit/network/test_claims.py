"""Which address a machine's frames claim; what is odd, forged or cut off claims none."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvik.network.claims import Claim, read_claim

MAC = "52:54:00:00:00:01"
OWN, OTHER = bytes.fromhex("525400000001"), bytes.fromhex("525400000002")
ALL = b"\xff" * 6


def ip(text: str) -> bytes:
    return ip_address(text).packed


def claimed(frame: bytes) -> tuple[str, bool] | None:
    found = read_claim(frame, MAC)
    return (str(found.address), found.settled) if found is not None else None


def arp(sender: str, *, own: bytes = OWN, source: bytes = OWN, operation: int = 1) -> bytes:
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
    return ALL + source + b"\x08\x06" + head + own + ip(sender) + bytes(6) + ip("10.0.0.254")


def nd(kind: int, source: str, target: str, options: bytes = b"", *, hops: int = 255, mac: bytes = OWN) -> bytes:
    body = bytes([kind, 0, 0, 0]) + bytes(4) + ip(target) + options
    head = struct.pack("!IHBB", 6 << 28, len(body), 58, hops) + ip(source) + ip("ff02::1")
    return b"\x33\x33\0\0\0\1" + mac + b"\x86\xdd" + head + body


def request(*options: bytes, has: str = "0.0.0.0", owner: bytes = OWN) -> bytes:
    head = struct.pack("!BBBBIHH", 1, 1, 6, 0, 7, 0, 0) + ip(has) + bytes(12) + owner + bytes(10) + bytes(192)
    message = head + b"\x63\x82\x53\x63" + b"".join(options) + b"\xff"
    udp = struct.pack("!HHHH", 68, 67, 8 + len(message), 0)
    packet = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp) + len(message), 0, 0, 64, 17, 0) + bytes(4) + b"\xff" * 4
    return ALL + OWN + b"\x08\x00" + packet + udp + message


ASKS = b"\x35\x01\x03"
WANTS = b"\x32\x04" + ip("10.0.0.7")


@pytest.mark.parametrize(
    ("frame", "found"),
    [
        (arp("10.0.0.5"), ("10.0.0.5", True)),
        (arp("10.0.0.5", operation=2), ("10.0.0.5", True)),
        (arp("169.254.3.4"), ("169.254.3.4", True)),
        (arp("0.0.0.0"), None),  # a probe: it asks whether it may have an address
        (arp("10.0.0.5", own=OTHER), None),
        (arp("10.0.0.5", source=OTHER), None),
        (arp("127.0.0.1"), None),
        (arp("224.0.0.1"), None),
        (arp("255.255.255.255"), None),
        (nd(135, "::", "fd00::5"), ("fd00::5", True)),  # may it have that?
        (nd(135, "::", "fd00::5", b"\1\1" + OWN), None),  # RFC 4861, 4.3: such a question has no link-layer address
        (nd(135, "fe80::1", "fd00::9", b"\1\1" + OWN), ("fe80::1", True)),
        (nd(135, "fe80::1", "fd00::9", b"\1\1" + OTHER), None),
        (nd(136, "fe80::1", "fd00::5", b"\2\1" + OWN), ("fd00::5", True)),
        (nd(136, "fe80::1", "fd00::5"), ("fd00::5", True)),
        (nd(136, "fe80::1", "fd00::5", b"\2\1" + OTHER), None),
        (nd(136, "fe80::1", "fd00::5", b"\x0e\0" + bytes(6)), ("fd00::5", True)),
        (nd(136, "fe80::1", "ff02::1"), None),
        (nd(136, "fe80::1", "fd00::5", hops=64), None),  # it came through a router
        (nd(134, "fe80::1", "fd00::5"), None),
        (nd(136, "fe80::1", "fd00::5", mac=OTHER), None),
        (request(ASKS, WANTS), ("10.0.0.7", False)),
        (request(ASKS, has="10.0.0.8"), ("10.0.0.8", True)),
        (request(b"\x35\x01\x01", WANTS), None),  # DISCOVER
        (request(ASKS), None),
        (request(ASKS, b"\x32\x03abc"), None),
        (request(ASKS, WANTS, owner=OTHER), None),
    ],
)
def test_what_frames_claim(frame: bytes, found: tuple[str, bool] | None) -> None:
    assert claimed(frame) == found


@pytest.mark.parametrize("frame", [arp("10.0.0.5"), nd(136, "fe80::1", "fd00::5"), request(ASKS, WANTS)])
def test_what_is_cut_off_claims_nothing(frame: bytes) -> None:
    whole = claimed(frame)
    for size in range(len(frame)):
        assert claimed(frame[:size]) in (None, whole)


@given(st.binary(max_size=400), st.sampled_from((b"\x08\x06", b"\x08\x00", b"\x86\xdd")))
@example(b"\x4f" + bytes(60), b"\x08\x00")
def test_nothing_that_a_machine_sends_is_an_error(rest: bytes, kind: bytes) -> None:
    found = read_claim(ALL + OWN + kind + rest, MAC)
    assert found is None or isinstance(found, Claim)
