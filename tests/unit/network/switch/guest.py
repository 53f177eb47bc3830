"""A guest that is none: a card on the stream socket that a switch connects to, or was handed."""

from __future__ import annotations

import socket
import struct

from kvik.network.switch import dhcp, dns
from kvik.network.switch.packets import (
    ANY,
    ICMP,
    IPV4,
    UDP,
    Ip,
    checksum,
    echo_reply,
    ip_bytes,
    ip_text,
    mac_bytes,
    read_arp,
    read_ip,
    read_udp,
    write_arp,
    write_ip,
    write_udp,
)  # fmt: skip
from unit.network.switch.wire import ALL, message, query

DEADLINE = 20.0  # seconds


class Guest:
    """`sock` is connected, or listens: then each connection after the last one is taken."""

    def __init__(self, sock: socket.socket, mac: str) -> None:
        self.mac = mac_bytes(mac)
        self.ip = ANY
        self.gateway = ANY
        self.listener = sock if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) else None
        sock.settimeout(DEADLINE)
        self.sock = sock
        self._data = b""
        if self.listener is not None:
            self.plug()

    def plug(self) -> None:
        """Take the next connection, as QEMU does when its peer has gone."""
        assert self.listener is not None
        if self.sock is not self.listener:
            self.sock.close()
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(DEADLINE)
        self._data = b""

    def send(self, frame: bytes) -> None:
        self.sock.sendall(struct.pack(">I", len(frame)) + frame)

    def frame(self) -> bytes:
        """The next one. ConnectionError when the switch is gone."""
        while len(self._data) < 4 or len(self._data) < 4 + struct.unpack_from(">I", self._data)[0]:
            more = self.sock.recv(65536)
            if not more:
                raise ConnectionError("the switch is gone")
            self._data += more
        (size,) = struct.unpack_from(">I", self._data)
        found, self._data = self._data[4 : 4 + size], self._data[4 + size :]
        return found

    def packet(self, protocol: int) -> Ip:
        """The next IPv4 packet of a protocol. ARP and pings are answered meanwhile."""
        while True:
            frame = self.frame()
            arp = read_arp(frame) if frame[12:14] == b"\x08\x06" else None
            packet = read_ip(frame) if frame[12:14] == IPV4 else None
            if arp is not None and arp.operation == 1 and arp.target == self.ip:
                self.send(write_arp(2, self.mac, self.ip, arp.sender_mac, arp.sender))
            elif packet is not None and packet.protocol == ICMP and (reply := echo_reply(packet.payload)):
                self.send(write_ip((frame[6:12], self.mac), self.ip, packet.source, ICMP, reply))
            elif packet is not None and packet.protocol == protocol:
                return packet

    def datagram(self) -> tuple[tuple[bytes, int], int, bytes]:
        """(from whom, to which port, what) of the next UDP."""
        packet = self.packet(UDP)
        found = read_udp(packet.payload)
        assert found is not None
        return (packet.source, found[0]), found[1], bytes(found[2])

    def _dhcp(self, kind: int, **options: bytes) -> tuple[int, bytes]:
        data = write_udp((ANY, 68), (ALL[:4], 67), message(kind, self.mac, **options))
        self.send(write_ip((ALL, self.mac), ANY, ALL[:4], UDP, data))
        (self.gateway, _), _, body = self.datagram()
        at = body.index(b"\x35\x01", 240)
        return body[at + 2], body[16:20]

    def boot(self) -> str:
        """Get an address by DHCP."""
        kind, offered = self._dhcp(dhcp.DISCOVER)
        assert kind == dhcp.OFFER
        kind, self.ip = self._dhcp(dhcp.REQUEST, requested=offered, server=self.gateway)
        assert kind == dhcp.ACK
        return ip_text(self.ip)

    def wants_address(self, seconds: float) -> bool:
        """Whether anybody offers one."""
        self.sock.settimeout(seconds)
        try:
            return self._dhcp(dhcp.DISCOVER)[0] == dhcp.OFFER
        except TimeoutError:
            return False
        finally:
            self.sock.settimeout(DEADLINE)

    def where(self, address: bytes) -> bytes:
        """The card of a neighbour, by ARP."""
        request = write_arp(1, self.mac, self.ip, bytes(6), address)
        self.send(ALL + request[6:])
        while True:
            frame = self.frame()
            arp = read_arp(frame) if frame[12:14] == b"\x08\x06" else None
            if arp is not None and arp.operation == 2 and arp.sender == address:
                return arp.sender_mac

    def ask(self, name: str) -> list[str]:
        """A name's addresses."""
        data = write_udp((self.ip, 5353), (self.gateway, 53), query(name))
        self.send(write_ip((self.where(self.gateway), self.mac), self.ip, self.gateway, UDP, data))
        _, _, answer = self.datagram()
        count = struct.unpack_from("!H", answer, 6)[0]
        start = 12 + len(dns.encode_name(name)) + 4
        return [ip_text(answer[start + 16 * number + 12 :][:4]) for number in range(count)]

    def ping(self, address: str) -> None:
        """The other guest answers once it looks: `packet` of it does."""
        body = struct.pack("!HH", 1, 1) + b"kvik"
        request = struct.pack("!BBH", 8, 0, checksum(struct.pack("!BBH", 8, 0, 0) + body)) + body
        target = ip_bytes(address)
        self.send(write_ip((self.where(target), self.mac), self.ip, target, ICMP, request))
        answer = self.packet(ICMP)
        assert (answer.source, bytes(answer.payload[:1])) == (target, b"\0")

    def close(self) -> None:
        self.sock.close()
        if self.listener is not None:
            self.listener.close()
