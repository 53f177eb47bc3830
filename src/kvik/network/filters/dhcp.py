"""DHCP snooping: what a machine's DHCP server gives it, read from the packets as they go to the machine.

Behind the filter, so what a filter drops (answers of servers that are not trusted) teaches nothing. One thread for all
interfaces; each is listened to for a bounded number of packets a second, since others on the network can send as many
as they like.
"""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import NamedTuple

from kvik.errors import KvikError
from kvik.host.packet import DHCP_TO_CLIENT, open_packet_socket
from kvik.network.dhcp import read_options

__all__ = ["DhcpSnooper", "Lease", "parse_ack"]

logger = logging.getLogger(__name__)

PACKETS_MAX = 16  # heeded a second on one interface
_COOKIE = b"\x63\x82\x53\x63"
_MESSAGE_TYPE, _LEASE_TIME = 53, 51  # RFC 2132
_ACK = 5
_FOREVER = 0xFFFFFFFF  # RFC 2131, 3.3


class Lease(NamedTuple):
    address: str
    seconds: int | None  # None: forever


def parse_ack(frame: bytes, mac: str) -> Lease | None:
    """What a DHCPACK in an Ethernet frame gives the machine with this MAC; None for anything else. Trusts nothing."""
    if len(frame) < 14 + 20 + 8 + 240 or frame[12:14] != b"\x08\x00" or frame[23] != 17:
        return None
    start = 14 + 4 * (frame[14] & 0xF)  # of the UDP header
    length = int.from_bytes(frame[start + 4 : start + 6])
    message = frame[start + 8 : start + length]
    # RFC 2131, figure 1: op, htype, hlen; yiaddr at 16, chaddr at 28, the cookie at 236
    if len(message) < 240 or message[:3] != b"\x02\x01\x06" or message[236:240] != _COOKIE:
        return None
    if message[28:34] != bytes.fromhex(mac.replace(":", "")):
        return None
    options = read_options(message[240:])
    if options.get(_MESSAGE_TYPE) != bytes([_ACK]):
        return None
    address = IPv4Address(message[16:20])
    if address.is_unspecified or address.is_multicast or address.is_loopback or address.is_reserved:
        return None
    seconds = int.from_bytes(options.get(_LEASE_TIME, b""))
    if len(options.get(_LEASE_TIME, b"")) != 4 or seconds == 0:  # an answer to INFORM gives no lease
        return None
    return Lease(str(address), None if seconds == _FOREVER else seconds)


class _Watched:
    __slots__ = ("device", "left", "mac", "second", "socket")

    def __init__(self, device: str, mac: str) -> None:
        self.device = device
        self.mac = mac
        self.socket = open_packet_socket(device, DHCP_TO_CLIENT)
        self.second, self.left = 0, PACKETS_MAX

    def may_heed(self) -> bool:
        now = int(time.monotonic())
        if now != self.second:
            self.second, self.left = now, PACKETS_MAX
        self.left -= 1
        return self.left >= 0


class DhcpSnooper:
    """Calls `learned(device, address, seconds)` from a thread of its own for each lease that is given."""

    def __init__(self, learned: Callable[[str, str, int | None], None]) -> None:
        self._learned = learned
        self._epoll = select.epoll()
        self._bell, self._ringer = socket.socketpair()
        self._epoll.register(self._bell, select.EPOLLIN)
        self._watched: dict[str, _Watched] = {}
        self._by_fd: dict[int, _Watched] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="kvik-dhcp-snoop", daemon=True)
        self._thread.start()

    def watch(self, device: str, mac: str) -> None:
        """Listen on an interface that exists; again for one that is watched changes nothing but the MAC. HostError."""
        with self._lock:
            known = self._watched.get(device)
            if known is not None:
                known.mac = mac
                return
            made = self._watched[device] = _Watched(device, mac)
            self._by_fd[made.socket.fileno()] = made
            self._epoll.register(made.socket, select.EPOLLIN)

    def forget(self, device: str) -> None:
        with self._lock:
            known = self._watched.pop(device, None)
            if known is not None:
                del self._by_fd[known.socket.fileno()]
                known.socket.close()  # leaves the epoll set by itself

    def close(self) -> None:
        """End the thread. Must not be called from it."""
        self._ringer.close()
        self._thread.join()
        for device in list(self._watched):
            self.forget(device)
        self._epoll.close()
        self._bell.close()

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._bell.fileno():
                    return
                with self._lock:
                    one = self._by_fd.get(fd)
                    if one is None:
                        continue
                    try:
                        frame, address = one.socket.recvfrom(2048)
                    except OSError:  # nothing after all, or the interface went down or away
                        continue
                # Towards the machine only: what it sends itself from port 67 teaches nothing.
                if address[2] == socket.PACKET_OUTGOING and one.may_heed():
                    self._heed(one, frame)

    def _heed(self, one: _Watched, frame: bytes) -> None:
        try:
            lease = parse_ack(frame, one.mac)
            if lease is not None:
                self._learned(one.device, lease.address, lease.seconds)
        except KvikError as error:
            logger.warning("the address that DHCP gave on %s is not allowed: %s", one.device, error)
        except (ValueError, struct.error, IndexError) as error:
            logger.debug("a DHCP packet on %s cannot be read: %s", one.device, error)
