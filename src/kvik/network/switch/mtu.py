"""Cards of unlike MTU on one network: long frames are made to fit, or their sender is told what does.

A card that asks for its MTU by DHCP gets a long one where its daemon knows that it can take that: then a frame carries
64 KiB instead of 1500 bytes, which is what a way through several processes costs. Others keep 1500 bytes. So what goes
from one to the other is cut (IPv4 without "don't fragment"), or answered as by a router (RFC 1191, RFC 8201): "packet
too big". TCP needs neither, for its ends tell each other.
"""

from __future__ import annotations

import struct

from kvik.network.switch.packets import ETHER, ICMP, ICMPV6, IPV4, IPV6, checksum, read_ip, unreachable, write_ip

STANDARD = 1500  # bytes of an IP packet (RFC 894)
LONG = 65520  # what passt takes, too

_TOO_BIG = 4  # code of ICMP's "destination unreachable"
_TOO_BIG_V6 = 2  # ICMPv6's type (RFC 4443, 3.2)
_DONT, _MORE, _OFFSET = 0x4000, 0x2000, 0x1FFF  # of IPv4's flags and fragment offset
_QUOTED = 1280 - 40 - 8  # bytes of a packet in an ICMPv6 error: no more than the least MTU holds


def fit(frame: memoryview, mtu: int, mac: bytes, ip: bytes) -> tuple[list[bytes], bytes | None]:
    """A frame whose packet is longer than its target takes: frames to send on in its place, and what its sender is
    told, by the gateway that has `mac` and `ip`. Neither for what is no IP."""
    kind = bytes(frame[12:14])
    if kind == IPV4:
        return _fit_four(frame, mtu, mac, ip)
    if kind == IPV6 and len(frame) >= ETHER + 40 and frame[ETHER] >> 4 == 6:
        return [], _tell_six(frame, mtu, mac)
    return [], None


def _fit_four(frame: memoryview, mtu: int, mac: bytes, ip: bytes) -> tuple[list[bytes], bytes | None]:
    packet = read_ip(frame)
    if packet is None:
        return [], None
    flags = frame[ETHER + 6] << 8 | frame[ETHER + 7]
    if flags & _DONT:
        if flags & _OFFSET or frame[0] & 1:
            return [], None  # RFC 1122, 3.2.2: of the first fragment alone, and never of what goes to a group
        told = unreachable(bytes(packet.header) + bytes(packet.payload[:8]), _TOO_BIG, mtu)
        return [], write_ip((bytes(frame[6:12]), mac), ip, packet.source, ICMP, told)
    if len(packet.header) != 20:
        return [], None  # options would have to be chosen from (RFC 791, 3.1); nobody sends them
    return [*_cut(bytes(frame[:ETHER]), bytes(packet.header), bytes(packet.payload), flags, mtu)], None


def _cut(ether: bytes, header: bytes, payload: bytes, flags: int, mtu: int) -> list[bytes]:
    """RFC 791, 3.2."""
    size = (mtu - 20) // 8 * 8
    made = []
    for start in range(0, len(payload), size):
        piece = payload[start : start + size]
        more = _MORE if start + size < len(payload) else flags & _MORE
        place = (flags & _OFFSET) + start // 8
        head = header[:2] + struct.pack("!H", 20 + len(piece)) + header[4:6] + struct.pack("!H", more | place)
        head += header[8:10] + bytes(2) + header[12:]
        head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
        made.append(ether + head + piece)
    return made


def _tell_six(frame: memoryview, mtu: int, mac: bytes) -> bytes | None:
    if frame[0] & 1 or frame[ETHER + 8] == 0xFF:
        return None
    source = b"\xfe\x80" + bytes(6) + bytes((mac[0] ^ 2,)) + mac[1:3] + b"\xff\xfe" + mac[3:]  # RFC 4291, appendix A
    target = bytes(frame[ETHER + 8 : ETHER + 24])
    body = struct.pack("!BBHI", _TOO_BIG_V6, 0, 0, mtu) + bytes(frame[ETHER : ETHER + _QUOTED])
    pseudo = source + target + struct.pack("!II", len(body), ICMPV6)
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    header = struct.pack("!IHBB", 6 << 28, len(body), ICMPV6, 255) + source + target
    return bytes(frame[6:12]) + mac + IPV6 + header + body
