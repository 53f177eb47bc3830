"""What a DHCPv6 client says and the server answers (RFC 8415).

found = solicit("eth0", duid, timeout=1.0)      # in the network namespace of the calling thread

No lease comes of that: the server says what it would give. `request` takes it.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address

from kvik.errors import HostError

__all__ = ["Offer6", "client_message", "duid_of_mac", "parse_answer", "request", "solicit"]

SOLICIT, ADVERTISE, REQUEST, REPLY = 1, 2, 3, 7
_CLIENTID, _SERVERID, _IA_NA, _IAADDR, _ORO, _ELAPSED, _DNS, _FQDN = 1, 2, 3, 5, 6, 8, 23, 39
_SERVERS, _SERVER_PORT, _CLIENT_PORT = "ff02::1:2", 547, 546  # 7.1, 7.2
_IAID = b"\0\0\0\1"
_RESEND = 0.3  # seconds


@dataclass(frozen=True, slots=True)
class Offer6:
    """`address` is None where the server has none for this client."""

    address: IPv6Address | None
    server: bytes  # its DUID
    dns: tuple[IPv6Address, ...] = ()


def duid_of_mac(mac: bytes) -> bytes:
    """11.4: by link-layer address, Ethernet."""
    return b"\0\3\0\1" + mac


def _option(code: int, data: bytes) -> bytes:
    return struct.pack("!HH", code, len(data)) + data


def client_message(duid: bytes, transaction: int, *, name: str = "", taken: Offer6 | None = None) -> bytes:
    """A SOLICIT for one address and the name servers, or a REQUEST for what was offered; `name` is the client's own
    (RFC 4704), without a domain."""
    wanted = b""
    if taken is not None and taken.address is not None:
        wanted = _option(_IAADDR, taken.address.packed + bytes(8))
    options = _option(_CLIENTID, duid) + (_option(_SERVERID, taken.server) if taken is not None else b"")
    options += _option(_IA_NA, _IAID + bytes(8) + wanted)
    options += _option(_ORO, struct.pack("!H", _DNS)) + _option(_ELAPSED, bytes(2))
    if name:
        options += _option(_FQDN, b"\0" + bytes([len(name)]) + name.encode("ascii"))
    return bytes([SOLICIT if taken is None else REQUEST]) + transaction.to_bytes(3) + options


def parse_answer(data: bytes, duid: bytes, transaction: int, kind: int = ADVERTISE) -> Offer6 | None:
    """What a message of this kind says to this client in this transaction; None for anything else."""
    if len(data) < 4 or data[0] != kind or int.from_bytes(data[1:4]) != transaction:
        return None
    options = _options(data[4:])
    if options.get(_CLIENTID) != duid or _SERVERID not in options:
        return None
    found = _options(options.get(_IA_NA, b"")[12:]).get(_IAADDR, b"")
    dns = options.get(_DNS, b"")
    servers = tuple(IPv6Address(dns[at : at + 16]) for at in range(0, len(dns) - 15, 16))
    return Offer6(IPv6Address(found[:16]) if len(found) >= 24 else None, options[_SERVERID], servers)


def _options(data: bytes) -> dict[int, bytes]:
    """The first of each; one that is cut off ends them."""
    found: dict[int, bytes] = {}
    while len(data) >= 4:
        code, size = struct.unpack_from("!HH", data)
        if len(data) < 4 + size:
            break
        found.setdefault(code, data[4 : 4 + size])
        data = data[4 + size :]
    return found


def solicit(interface: str, duid: bytes, timeout: float, *, name: str = "", transaction: int = 0) -> Offer6 | None:
    """Ask on an interface that has a link-local address, again and again for `timeout` seconds; None if nobody answers.
    `transaction` (24 bits; 0: a new one) goes on with an earlier call's, whose answer may yet come. Needs root, as
    `request` does. HostError."""
    transaction = transaction or int.from_bytes(os.urandom(3))
    message = client_message(duid, transaction, name=name)
    return _ask(interface, message, lambda data: parse_answer(data, duid, transaction), timeout)


def request(interface: str, duid: bytes, offer: Offer6, timeout: float, *, name: str = "") -> Offer6 | None:
    """Take what was offered: what the server has lent then."""
    transaction = int.from_bytes(os.urandom(3))
    message = client_message(duid, transaction, name=name, taken=offer)
    return _ask(interface, message, lambda data: parse_answer(data, duid, transaction, REPLY), timeout)


def _ask(interface: str, message: bytes, parse: Callable[[bytes], Offer6 | None], timeout: float) -> Offer6 | None:
    deadline = time.monotonic() + timeout
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as wire:
            index = socket.if_nametoindex(interface)
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            wire.bind(("::", _CLIENT_PORT, 0, index))
            while (now := time.monotonic()) < deadline:
                try:
                    wire.sendto(message, (_SERVERS, _SERVER_PORT, 0, index))
                except OSError:  # its link-local address is not there yet
                    time.sleep(min(0.05, deadline - now))
                    continue
                again = min(deadline, now + _RESEND)
                while (left := again - time.monotonic()) > 0:
                    wire.settimeout(left)
                    try:
                        found = parse(wire.recv(2048))
                    except TimeoutError:
                        break
                    if found is not None:
                        return found
    except OSError as error:
        raise HostError(f"cannot ask for DHCPv6 on {interface}: {error.strerror}", errno=error.errno or 0) from error
    return None
