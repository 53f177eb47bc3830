"""The few packets that the switch itself reads and writes: ARP, IPv4, UDP, ICMP. Nothing here trusts a length."""

from __future__ import annotations

import socket
import struct

from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    Bytes = bytes | memoryview | bytearray

BROADCAST = b"\xff" * 6
ANY = b"\0" * 4
ARP, IPV4, IPV6 = b"\x08\x06", b"\x08\x00", b"\x86\xdd"  # EtherTypes
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
ETHER = 14  # bytes of an Ethernet header

_ARP = struct.Struct("!HHBBH6s4s6s4s")  # RFC 826
_IP = struct.Struct("!BBHHHBBH4s4s")  # RFC 791
_UDP = struct.Struct("!HHHH")  # RFC 768
_ETHERNET_IPV4 = (1, 0x0800, 6, 4)  # hardware, protocol, their lengths
_DONT_FRAGMENT = 0x4000
_FRAGMENT = 0x3FFF  # more fragments, and the offset


class Ip(NamedTuple):
    source: bytes
    target: bytes
    protocol: int
    header: Bytes  # with its options
    payload: Bytes  # as long as the header says, no padding
    fragment: bool


class Arp(NamedTuple):
    operation: int  # 1 asks, 2 answers
    sender_mac: bytes
    sender: bytes
    target_mac: bytes
    target: bytes


def mac_bytes(text: str) -> bytes:
    """ValueError if it is none."""
    octets = text.split(":")
    if len(octets) != 6 or not all(len(octet) == 2 for octet in octets):
        raise ValueError(f"{text!r} is no Ethernet address")
    return bytes.fromhex("".join(octets))


def mac_text(mac: bytes) -> str:
    return mac.hex(":")


def ip_bytes(text: str) -> bytes:
    """ValueError if it is no IPv4 address."""
    try:
        return socket.inet_pton(socket.AF_INET, text)
    except OSError:
        raise ValueError(f"{text!r} is no IPv4 address") from None


def ip_text(address: bytes) -> str:
    return socket.inet_ntoa(address)


def checksum(data: Bytes) -> int:
    """The Internet checksum (RFC 1071): 0 over data that holds its own right one."""
    # The sum of all 16-bit words, carries added back, is the number itself modulo 0xffff.
    raw = bytes(data)
    total = int.from_bytes(raw + b"\0" * (len(raw) & 1), "big")
    return 0xFFFF - (total % 0xFFFF or 0xFFFF) if total else 0xFFFF


def read_arp(frame: Bytes) -> Arp | None:
    """What an ARP frame says, if it speaks of IPv4 on Ethernet."""
    if len(frame) < ETHER + _ARP.size:
        return None
    *kind, operation, sender_mac, sender, target_mac, target = _ARP.unpack_from(frame, ETHER)
    if tuple(kind) != _ETHERNET_IPV4:
        return None
    return Arp(operation, sender_mac, sender, target_mac, target)


def write_arp(operation: int, sender_mac: bytes, sender: bytes, target_mac: bytes, target: bytes) -> bytes:
    body = _ARP.pack(*_ETHERNET_IPV4, operation, sender_mac, sender, target_mac, target)
    return target_mac + sender_mac + ARP + body


def read_ip(frame: Bytes) -> Ip | None:
    """The IPv4 packet of a frame; None if its lengths or its header's checksum are wrong."""
    if len(frame) < ETHER + _IP.size:
        return None
    first, _, size, _, fragment, _, protocol, _, source, target = _IP.unpack_from(frame, ETHER)
    head = (first & 15) * 4
    if first >> 4 != 4 or head < _IP.size or size < head or ETHER + size > len(frame):
        return None
    header = frame[ETHER : ETHER + head]
    if checksum(header):
        return None
    return Ip(source, target, protocol, header, frame[ETHER + head : ETHER + size], bool(fragment & _FRAGMENT))


def write_ip(macs: tuple[bytes, bytes], source: bytes, target: bytes, protocol: int, payload: bytes) -> bytes:
    """A frame; `macs` are its target and its source."""
    head = [0x45, 0, _IP.size + len(payload), 0, _DONT_FRAGMENT, 64, protocol, 0, source, target]
    head[7] = checksum(_IP.pack(*head))
    return b"".join((*macs, IPV4, _IP.pack(*head), payload))


def read_udp(payload: Bytes) -> tuple[int, int, Bytes] | None:
    """Source port, target port, data. The checksum is not looked at: Ethernet between us is memory."""
    if len(payload) < _UDP.size:
        return None
    source, target, size, _ = _UDP.unpack_from(payload)
    if not _UDP.size <= size <= len(payload):
        return None
    return source, target, payload[_UDP.size : size]


def write_udp(source: tuple[bytes, int], target: tuple[bytes, int], data: Bytes) -> bytes:
    """An IPv4 packet's payload, with checksum."""
    size = _UDP.size + len(data)
    pseudo = source[0] + target[0] + struct.pack("!HH", UDP, size)
    plain = _UDP.pack(source[1], target[1], size, 0) + bytes(data)
    return _UDP.pack(source[1], target[1], size, checksum(pseudo + plain) or 0xFFFF) + data


def echo_reply(payload: Bytes) -> bytes | None:
    """What answers an ICMP echo request (RFC 792)."""
    if len(payload) < 8 or payload[0] != 8 or payload[1] != 0:
        return None
    body = bytes(2) + bytes(payload[4:])
    return bytes(2) + struct.pack("!H", checksum(bytes(2) + body)) + bytes(payload[4:])


def unreachable(quoted: bytes, code: int, mtu: int = 0) -> bytes:
    """ICMP destination unreachable (RFC 792): 0 the net, 3 the port, 4 too big (RFC 1191), 13 forbidden (RFC 1812).
    `quoted`: the packet's header and 8 bytes more."""
    body = struct.pack("!I", mtu) + quoted
    return struct.pack("!BBH", 3, code, checksum(struct.pack("!BBH", 3, code, 0) + body)) + body
