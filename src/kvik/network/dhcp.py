"""A DHCP client's first word and the server's answer to it (RFC 2131), as bytes on an Ethernet; no lease comes of it.

offer = discover("eth0", timeout=1.0)      # in the network namespace of the calling thread
"""

from __future__ import annotations

import os
import socket
import struct
import time
from dataclasses import dataclass
from ipaddress import IPv4Address

from kvik.errors import HostError

__all__ = ["Offer", "discover", "discover_frame", "parse_offer", "read_options"]

_BOOTREQUEST, _BOOTREPLY, _ETHERNET = 1, 2, 1
_COOKIE = b"\x63\x82\x53\x63"
_PAD, _END = 0, 255
_SUBNET_MASK, _ROUTER, _DNS, _LEASE_TIME, _MESSAGE_TYPE, _SERVER, _PARAMETERS = 1, 3, 6, 51, 53, 54, 55  # RFC 2132
_DISCOVER, _OFFER = 1, 2
_SERVER_PORT, _CLIENT_PORT = 67, 68
_BROADCAST_FLAG = 0x8000
_HEADER = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s")
_ETH, _IP, _UDP = struct.Struct("!6s6sH"), struct.Struct("!BBHHHBBH4s4s"), struct.Struct("!HHHH")
_ETH_P_IP = 0x0800
_BROADCAST = b"\xff" * 6
_RESEND = 0.2  # seconds


@dataclass(frozen=True, slots=True)
class Offer:
    address: IPv4Address
    server: IPv4Address | None
    mask: IPv4Address | None
    router: IPv4Address | None
    lease: int  # seconds; 0 if not said


def _checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def discover_frame(mac: bytes, transaction: int) -> bytes:
    """An Ethernet frame with a DHCPDISCOVER to everybody."""
    options = bytes([_MESSAGE_TYPE, 1, _DISCOVER, _PARAMETERS, 3, _SUBNET_MASK, _ROUTER, _DNS, _END])
    nobody = bytes(4)
    body = _HEADER.pack(
        _BOOTREQUEST, _ETHERNET, 6, 0, transaction, 0, _BROADCAST_FLAG, nobody, nobody, nobody, nobody, mac, b"", b""
    )
    body += _COOKIE + options
    body += bytes(max(0, 300 - len(body)))  # what BOOTP relays expect at least (RFC 1542, 2.1)
    datagram = _UDP.pack(_CLIENT_PORT, _SERVER_PORT, _UDP.size + len(body), 0) + body
    header = _IP.pack(0x45, 0, _IP.size + len(datagram), 0, 0, 64, socket.IPPROTO_UDP, 0, nobody, b"\xff" * 4)
    header = header[:10] + struct.pack("!H", _checksum(header)) + header[12:]
    return _ETH.pack(_BROADCAST, mac, _ETH_P_IP) + header + datagram


def parse_offer(frame: bytes, transaction: int) -> Offer | None:
    """What a frame offers, if it is a DHCPOFFER of this transaction; None for anything else."""
    if len(frame) < _ETH.size + _IP.size or _ETH.unpack_from(frame)[2] != _ETH_P_IP:
        return None
    packet = frame[_ETH.size :]
    size = (packet[0] & 15) * 4
    if packet[0] >> 4 != 4 or size < _IP.size or packet[9] != socket.IPPROTO_UDP or len(packet) < size + _UDP.size:
        return None
    if _UDP.unpack_from(packet, size)[1] != _CLIENT_PORT:
        return None
    body = packet[size + _UDP.size :]
    if len(body) < _HEADER.size + 4 or body[_HEADER.size : _HEADER.size + 4] != _COOKIE:
        return None
    fields = _HEADER.unpack_from(body)
    options = read_options(body[_HEADER.size + 4 :])
    if fields[0] != _BOOTREPLY or fields[4] != transaction or options.get(_MESSAGE_TYPE) != bytes([_OFFER]):
        return None
    lease = options.get(_LEASE_TIME, b"")
    return Offer(
        address=IPv4Address(fields[8]),
        server=_address(options.get(_SERVER)),
        mask=_address(options.get(_SUBNET_MASK)),
        router=_address(options.get(_ROUTER)),
        lease=int.from_bytes(lease, "big") if len(lease) == 4 else 0,
    )


def read_options(data: bytes) -> dict[int, bytes]:
    """The first of each (RFC 2132); one that is cut off ends them."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data) and data[at] != _END:
        if data[at] == _PAD:
            at += 1
            continue
        if at + 2 > len(data) or at + 2 + data[at + 1] > len(data):
            break
        found.setdefault(data[at], data[at + 2 : at + 2 + data[at + 1]])
        at += 2 + data[at + 1]
    return found


def _address(data: bytes | None) -> IPv4Address | None:
    return IPv4Address(data[:4]) if data is not None and len(data) >= 4 else None


def discover(interface: str, timeout: float, transaction: int = 0) -> Offer | None:
    """Ask on an interface that is up, again and again for `timeout` seconds; None if nobody offers. Needs root.
    `transaction` (32 bits; 0: a new one) goes on with an earlier call's, whose answer may yet come."""
    transaction = transaction or int.from_bytes(os.urandom(4), "big")
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_IP)) as wire:
            wire.bind((interface, _ETH_P_IP))
            frame = discover_frame(wire.getsockname()[4][:6], transaction)
            deadline = time.monotonic() + timeout
            while (now := time.monotonic()) < deadline:
                wire.send(frame)
                again = min(deadline, now + _RESEND)
                while (left := again - time.monotonic()) > 0:
                    wire.settimeout(left)
                    try:
                        offer = parse_offer(wire.recv(2048), transaction)
                    except TimeoutError:
                        break
                    if offer is not None:
                        return offer
    except OSError as error:
        raise HostError(f"cannot ask for DHCP on {interface}: {error.strerror}", errno=error.errno or 0) from error
    return None
