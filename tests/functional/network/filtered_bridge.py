"""A bridge with two machines on it, as veth pairs: `guest` is under a filter, `other` is not. Frames go in and come out
of raw sockets on the far ends, so what a test sends is what a hostile guest could."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from kvik.conf.nwfilter import FilterBinding, FilterReference, Parameter
from kvik.host.bridge import bridge_ports, create_bridge
from kvik.host.netlink import Netlink
from kvik.network.filters.filters import Filters
from kvik.paths import Paths

GUEST_MAC, OTHER_MAC = "52:54:00:00:00:01", "52:54:00:00:00:02"
GUEST_IP, OTHER_IP = "10.0.0.1", "10.0.0.2"
BROADCAST = "ff:ff:ff:ff:ff:ff"
ETH_P_ALL = 3
IPV4, ARP, RARP, IPV6, VLAN = 0x0800, 0x0806, 0x8035, 0x86DD, 0x8100
PATIENCE = 0.1  # seconds until a frame counts as dropped
UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ethernet(source: str, destination: str, kind: int, payload: bytes) -> bytes:
    """Without padding, which br_netfilter would cut off."""
    return mac(destination) + mac(source) + struct.pack(">H", kind) + payload


def arp(source_mac: str, source_ip: str, target_ip: str, *, opcode: int = 1, target_mac: str = "00:00:00:00:00:00",
        kind: int = ARP, ether: str = "", to: str = BROADCAST) -> bytes:  # fmt: skip
    body = struct.pack(">HHBBH", 1, IPV4, 6, 4, opcode)
    body += mac(source_mac) + IPv4Address(source_ip).packed + mac(target_mac) + IPv4Address(target_ip).packed
    return ethernet(ether or source_mac, to, kind, body)


def udp(source: int, destination: int, data: bytes = b"") -> bytes:
    return struct.pack(">HHHH", source, destination, 8 + len(data), 0) + data


def tcp(source: int, destination: int, flags: int) -> bytes:
    return struct.pack(">HHIIBBHHH", source, destination, 1, 0, 5 << 4, flags, 1024, 0, 0)


def ipv4(source: str, destination: str, protocol: int, payload: bytes, *, fragment: int = 0) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, fragment, 64, protocol, 0)
    head += IPv4Address(source).packed + IPv4Address(destination).packed
    total = sum(struct.unpack(">10H", head))  # br_netfilter, where it is loaded, checks the checksum (RFC 1071)
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack(">H", 0xFFFF - total - (total >> 16) & 0xFFFF) + head[12:] + payload


def ipv6(source: str, destination: str, protocol: int, payload: bytes) -> bytes:
    head = struct.pack(">IHBB", 6 << 28, len(payload), protocol, 64)
    return head + IPv6Address(source).packed + IPv6Address(destination).packed + payload


class Wire:
    """The bridge; `guest` and `other` are packet sockets on the machines' ends."""

    def __init__(self, filters: Filters) -> None:
        self.filters = filters
        with Netlink() as netlink:
            bridge = create_bridge(netlink, "br0", up=True, stp=False, multicast_snooping=False)
            self.bridge = bridge.index
            for port, end in (("tap0", "guest"), ("tap1", "other")):
                link = netlink.add_veth(port, end)
                Path(f"/proc/sys/net/ipv6/conf/{end}/disable_ipv6").write_text("1")
                netlink.set_link(link.index, master=bridge.index)
                netlink.set_link(link.index, up=True)
                netlink.set_link(link.lower, up=True)
            for _ in range(500):  # the bridge hears of a carrier a moment later
                if [port.state for port in bridge_ports(netlink, bridge.index)] == ["forwarding", "forwarding"]:
                    break
                time.sleep(0.01)
        self.guest, self.other = self._socket("guest"), self._socket("other")

    @staticmethod
    def _socket(device: str) -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        made.bind((device, ETH_P_ALL))
        return made

    def bind(self, name: str, **parameters: str | list[str]) -> None:
        listed = [
            Parameter(name=key, value=value)
            for key, values in parameters.items()
            for value in ([values] if isinstance(values, str) else values)
        ]
        self.filters.bind(
            FilterBinding(
                owner_name="m",
                owner_uuid=UUID,
                portdev="tap0",
                mac=GUEST_MAC,
                reference=FilterReference(filter=name, parameters=listed),
            )
        )

    def sent(self, frame: bytes) -> bool:
        """Whether the other machine gets what the guest sends."""
        return self._passes(self.guest, self.other, frame)

    def received(self, frame: bytes) -> bool:
        """Whether the guest gets what the other machine sends."""
        return self._passes(self.other, self.guest, frame)

    def _passes(self, source: socket.socket, sink: socket.socket, frame: bytes) -> bool:
        """veth and bridge do their work in the sender's softirq: once send() is back, what passes is on its way."""
        self._drain(sink)
        source.send(frame)
        if frame[12:14] == VLAN.to_bytes(2):  # packet(7): the receiver finds the tag beside the frame, not in it
            frame = frame[:12] + frame[16:]
        sink.settimeout(PATIENCE)
        try:
            while True:
                got, address = sink.recvfrom(2048)
                if address[2] != socket.PACKET_OUTGOING and got[: len(frame)] == frame:
                    return True
        except TimeoutError:
            return False

    @staticmethod
    def _drain(sink: socket.socket) -> None:
        sink.setblocking(False)
        try:
            while True:
                sink.recv(2048)
        except BlockingIOError:
            pass

    def close(self) -> None:
        self.guest.close()
        self.other.close()


@contextmanager
def filtered_bridge(directory: Path) -> Iterator[Wire]:
    filters = Filters(Paths.system(directory))
    filters.open()
    wire = Wire(filters)
    try:
        yield wire
    finally:
        wire.close()
        filters.close()
