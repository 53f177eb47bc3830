"""Which address a machine says it has: read from the ARP, ND and DHCP frames that it sends. Nothing in them is trusted.

    claim = read_claim(frame, "52:54:00:00:00:01")     # Claim(address=IPv4Address("10.0.0.5"), settled=True)

A claim is a machine's own word: it may name any address. What is checked is that the frame has its MAC wherever one
stands, and that the address is one that a machine can have.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from kvik.network.dhcp import read_options

__all__ = ["Address", "Claim", "read_claim"]

Address = IPv4Address | IPv6Address

_ARP, _IPV4, _IPV6 = b"\x08\x06", b"\x08\x00", b"\x86\xdd"
_ARP_HEAD = b"\x00\x01\x08\x00\x06\x04"  # RFC 826: Ethernet, IPv4, the lengths of their addresses
_ICMPV6, _UDP = 58, 17
_SOLICITATION, _ADVERTISEMENT = 135, 136
_SOURCE_LINK, _TARGET_LINK = 1, 2  # RFC 4861, 4.6
_COOKIE = b"\x63\x82\x53\x63"
_REQUESTED, _MESSAGE_TYPE = 50, 53  # RFC 2132
_REQUEST = 3


class Claim(NamedTuple):
    address: Address
    settled: bool = True  # False: it has asked a DHCP server for it, and was not heard using it


def read_claim(frame: bytes, mac: str) -> Claim | None:
    """What an Ethernet frame that the machine with this MAC has sent claims; None for anything else."""
    own = bytes.fromhex(mac.replace(":", ""))
    if len(frame) < 42 or frame[6:12] != own:
        return None
    kind = frame[12:14]
    found = _arp(frame[14:], own) if kind == _ARP else _nd(frame[14:], own) if kind == _IPV6 else None
    if kind == _IPV4:
        found = _dhcp(frame[14:], own)
    return found if found is not None and _possible(found.address) else None


def _possible(address: Address) -> bool:
    return not (address.is_unspecified or address.is_multicast or address.is_loopback or address.packed == b"\xff" * 4)


def _arp(packet: bytes, own: bytes) -> Claim | None:
    """Of requests and answers the sender; a probe (RFC 5227, 2.1.1) has none yet."""
    if packet[:6] != _ARP_HEAD or packet[8:14] != own:
        return None
    return Claim(IPv4Address(packet[14:18]))


def _nd(packet: bytes, own: bytes) -> Claim | None:
    """The source of a solicitation, or its target where it asks whether it may have that (RFC 4862, 5.4.2); the target
    of an advertisement."""
    if len(packet) < 64 or packet[0] >> 4 != 6 or packet[6] != _ICMPV6 or packet[7] != 255:  # RFC 4861, 7.1: hop limit
        return None
    source, target = IPv6Address(packet[8:24]), IPv6Address(packet[48:64])
    kind, link = packet[40], _link_option(packet[64:])
    if kind == _SOLICITATION:
        if source.is_unspecified:
            return Claim(target) if link is None else None
        return Claim(source) if link in (own, None) else None
    return Claim(target) if kind == _ADVERTISEMENT and link in (own, None) else None


def _link_option(options: bytes) -> bytes | None:
    while len(options) >= 8 and options[1]:
        if options[0] in (_SOURCE_LINK, _TARGET_LINK):
            return options[2:8]
        options = options[8 * options[1] :]
    return None


def _dhcp(packet: bytes, own: bytes) -> Claim | None:
    """A DHCPREQUEST (RFC 2131, 4.3.2): of a client that renews the address it has, of others what they ask for."""
    size = (packet[0] & 15) * 4
    message = packet[size + 8 :]
    if packet[9] != _UDP or len(message) < 240 or message[:3] != b"\x01\x01\x06" or message[236:240] != _COOKIE:
        return None
    if message[28:34] != own:
        return None
    options = read_options(message[240:])
    if options.get(_MESSAGE_TYPE) != bytes([_REQUEST]):
        return None
    has = IPv4Address(message[12:16])
    wanted = options.get(_REQUESTED, b"")
    if not has.is_unspecified:
        return Claim(has)
    return Claim(IPv4Address(wanted), settled=False) if len(wanted) == 4 else None
