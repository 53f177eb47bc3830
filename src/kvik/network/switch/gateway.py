"""The switch's own host on the network: answers ARP, ping, DHCP and names, and shows each machine its way out."""

from __future__ import annotations

from kvik.network.switch import dhcp, dns
from kvik.network.switch.mtu import STANDARD, fit
from kvik.network.switch.packets import (
    ANY,
    ETHER,
    ICMP,
    IPV4,
    TCP,
    UDP,
    Arp,
    Ip,
    echo_reply,
    ip_text,
    mac_text,
    read_ip,
    read_udp,
    unreachable,
    write_arp,
    write_ip,
    write_udp,
)
from kvik.network.switch.port import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.network.switch.outside import Outside
    from kvik.network.switch.plane import Plane
    from kvik.network.switch.port import Port
    from kvik.network.switch.resolver import Resolver
    from kvik.network.switch.settings import Settings

_PROTOCOL = ETHER + 9
_TARGET = slice(ETHER + 16, ETHER + 20)  # of an IPv4 packet in its frame
_NET, _PORT, _FORBIDDEN = 0, 3, 13  # codes of ICMP's destination unreachable
_DNS_PORTS = (53, 853)  # what passt's --dns-forward takes
_SYN, _ACK = 0x02, 0x10  # of TCP's flags
_MESSAGE = 1500 - 28  # bytes of a DNS answer in one frame; the client asks for a longer one over TCP


class Gateway:
    def __init__(self, settings: Settings, resolver: Resolver, outside: Outside) -> None:
        self.plane: Plane
        self.resolver = resolver
        self.outside = outside
        self.dhcp = dhcp.Dhcp(settings)
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        self.settings = settings
        self.mac, self.ip = settings.mac, settings.ip
        self.dhcp.configure(settings)
        self.zone = dns.Zone(
            settings.domain,
            self.addresses,
            self.name,
            local_only=settings.local_only,
            forward_plain=settings.forward_plain,
        )

    # who is who

    def owner(self, ip: bytes) -> Port | Gateway | None:
        """Who alone may say that it has this address."""
        if ip == self.ip:
            return self
        lease = self.dhcp.leases.get(ip)
        return self.plane.ports.get(lease.port) if lease is not None and lease.mac else None

    def label(self, lease: dhcp.Lease) -> str:
        """A machine's name as the daemon knows it; or what a guest calls itself, unless that is another's name."""
        port = self.plane.ports.get(lease.port)
        if port is not None and port.name and lease.mac == port.mac:
            return port.name
        host = self.settings.hosts.get(lease.mac)
        if host is not None and host.name:
            return host.name
        taken = any(other.name == lease.hostname for other in self.plane.ports.values())
        return "" if taken or lease.hostname in self.settings.names else lease.hostname

    def addresses(self, name: str) -> list[bytes] | None:
        """Of a bare name; None if it is nobody's. Empty: the machine has no address yet."""
        if name in self.settings.names:
            return [*self.settings.names[name]]
        found = [lease.ip for lease in self.dhcp.current(self.plane.now) if self.label(lease) == name]
        if found or any(port.name == name for port in self.plane.ports.values()):
            return found
        fixed = [host.ip for host in self.settings.hosts.values() if host.name == name]
        return fixed or None

    def name(self, ip: bytes) -> str | None:
        """Of an address of this network; None for others."""
        if not self.settings.contains(ip):
            return None
        lease = self.dhcp.leases.get(ip)
        if lease is not None and lease.mac and (label := self.label(lease)):
            return label
        return next((name for name, addresses in self.settings.names.items() if ip in addresses), "")

    def leases(self) -> list[dict[str, Any]]:
        return [
            {
                "ip": ip_text(lease.ip),
                "prefix": self.settings.prefix,
                "mac": mac_text(lease.mac),
                "hostname": self.label(lease),
                "expires": lease.expires - self.plane.now,
                "port": lease.port,
            }
            for lease in self.dhcp.current(self.plane.now)
        ]

    def tick(self) -> None:
        self.dhcp.expire(self.plane.now)
        self.resolver.expire(self.plane.now)
        self.outside.expire(self.plane.now)
        for port in self.plane.ports.values():
            if port.flows is not None:
                port.flows.expire(self.plane.now)

    def removed(self, port: Port) -> None:
        self.dhcp.removed(port.number)
        self.resolver.removed(port.number)
        self.outside.removed(port)

    def expect(self, port: Port) -> bytes:
        """The address that the port's card will get, kept for it until it asks; empty: none."""
        lease = self.dhcp.reserve(port.number, port.mac, self.plane.now) if port.mac is not None else None
        return lease.ip if lease is not None else b""

    def welcome(self, port: Port) -> bytes:
        """A port was added: the address it will get. A machine that has it already, from a switch before this one,
        answers ARP for it."""
        address = self.expect(port)
        if address and port.mac is not None:
            port.send_frame(write_arp(1, self.mac, self.ip, port.mac, address))
        return address

    def introduce(self, port: Port) -> None:
        """Tell a machine's way out who it serves, as its machine would by ARP: passt sends what comes from outside to
        the address it saw last, and to everybody before it saw any, which a guest does not take for its own."""
        address = self.expect(port)
        if address and port.mac is not None and port.uplink is not None:
            port.uplink.send_frame(write_arp(1, port.mac, address, bytes(6), self.ip))

    def seen(self, port: Port, packet: Arp) -> None:
        """A card says by ARP that it has an address: one that an earlier switch gave, or its own choice."""
        if packet.sender_mac == port.mac and self.settings.usable(packet.sender):
            self.dhcp.confirm(port.number, packet.sender_mac, packet.sender, self.plane.now)

    # what comes

    def arp(self, port: Port, packet: Arp) -> None:
        if packet.operation == 1:
            port.send_frame(write_arp(2, self.mac, self.ip, packet.sender_mac, packet.sender))

    def broadcast(self, port: Port, frame: memoryview) -> None:
        """To port 67 of everybody."""
        packet = read_ip(frame)
        if packet is not None and not packet.fragment and packet.protocol == UDP:
            self._udp(port, frame, packet)

    def receive(self, port: Port, run: memoryview, kind: bytes) -> None:
        """Frames to the gateway's Ethernet address. What goes out is passed on as it came, in one piece."""
        if kind != IPV4:
            port.refused += 1
            return
        begin = count = 0
        uplink, router, contains = port.uplink, self.settings.router, self.settings.contains
        for start, end, frame in frames(run):
            out = len(frame) >= ETHER + 20 and not contains(bytes(frame[_TARGET]))
            taken = out and router and frame[_PROTOCOL] == UDP and self.outside.send(self, port, frame)
            if out and not taken and uplink is not None:
                if not count:
                    begin = start
                count += 1
                continue
            if uplink is not None and count:
                uplink.send(run[begin:start], count)
                count = 0
            if not taken:
                self._own(port, frame, run[start:end])
        if uplink is not None and count:
            uplink.send(run[begin:], count)

    def _own(self, port: Port, frame: memoryview, run: memoryview) -> None:
        """One that has no way out, or speaks to the gateway."""
        packet = read_ip(frame)
        if packet is None or packet.source == ANY:
            port.refused += 1
        elif packet.target == self.ip:
            self._local(port, frame, packet, run)
        elif not self.settings.contains(packet.target):
            self._unreachable(port, frame, packet, _NET)
        else:
            port.refused += 1  # neighbours are reached directly

    def _local(self, port: Port, frame: memoryview, packet: Ip, run: memoryview) -> None:
        if packet.fragment:
            port.refused += 1
        elif packet.protocol == ICMP:
            reply = echo_reply(packet.payload)
            if reply is not None:
                self._send(port, bytes(frame[6:12]), packet.source, ICMP, reply)
        elif packet.protocol == UDP:
            self._udp(port, frame, packet)
        elif packet.protocol == TCP and len(packet.payload) >= 20:
            # From the host's loopback a forwarded port's connection comes as if from the gateway: its answers go back.
            # What a machine itself begins here is long DNS answers only.
            begins = packet.payload[13] & (_SYN | _ACK) == _SYN
            named = (packet.payload[2] << 8 | packet.payload[3]) in _DNS_PORTS and self.settings.forward_dns
            if port.uplink is not None and (named or not begins):
                port.uplink.send(run, 1)
            else:
                self._unreachable(port, frame, packet, _PORT)

    def _udp(self, port: Port, frame: memoryview, packet: Ip) -> None:
        datagram = read_udp(packet.payload)
        if datagram is None:
            port.refused += 1
            return
        source, target, data = datagram
        client = bytes(frame[6:12])
        if target == 67:
            self._dhcp(port, bytes(data))
        elif target == 53 and self.settings.dns and packet.target == self.ip:
            self._dns(port, client, (packet.source, source), bytes(data))
        elif port.flows is None or not port.flows.answer(source, target, bytes(data), self.plane.now):
            self._unreachable(port, frame, packet, _PORT)

    def _dhcp(self, port: Port, data: bytes) -> None:
        request = dhcp.parse(data)
        if request is None:
            port.refused += 1
            return
        entry = self.plane.table.get(request.mac)
        if (entry is not None and entry.port is not port) or request.mac == self.mac:
            port.refused += 1  # for somebody else's card
            return
        mtu = port.mtu if request.mac == port.mac and request.wants(dhcp.MTU) else 0
        reply = self.dhcp.answer(port.number, request, self.plane.now, mtu)
        if request.kind == dhcp.REQUEST and request.mac == port.mac:
            self.introduce(port)
        if reply is not None and reply.kind == dhcp.ACK and entry is not None:
            entry.mtu = mtu or STANDARD
        if reply is not None:
            packed = write_udp((self.ip, 67), (reply.ip, 68), reply.data)
            self._send(port, reply.mac, reply.ip, UDP, packed)

    def _dns(self, port: Port, mac: bytes, client: tuple[bytes, int], data: bytes) -> None:
        query = dns.parse(data)
        if query is None:
            port.refused += 1
            return

        def reply(answer: bytes) -> None:
            if len(answer) > _MESSAGE:
                answer = dns.truncated(answer)
            self._send(port, mac, client[0], UDP, write_udp((self.ip, 53), client, answer))

        if isinstance(query, int):
            reply(dns.error(data, query))
            return
        answer = self.zone.answer(query)
        if answer is not None:
            reply(answer)
        elif not self.settings.forward_dns:
            reply(dns.error(data, dns.REFUSED))
        elif not self.resolver.ask(port.number, client, data, self.plane.now, reply):
            reply(dns.error(data, dns.SERVFAIL))

    def refuse(self, port: Port, frame: memoryview, code: int) -> None:
        """By ICMP: a frame that cannot go where it should."""
        packet = read_ip(frame)
        if packet is not None:
            self._unreachable(port, frame, packet, code)

    def fit(self, port: Port, target: Port, frame: memoryview, mtu: int) -> None:
        """A frame for a card whose MTU is less than its sender's."""
        if len(frame) <= ETHER + mtu:
            target.send_frame(bytes(frame))
            return
        pieces, told = fit(frame, mtu, self.mac, self.ip)
        for piece in pieces:
            target.send_frame(piece)
        if told is not None:
            port.send_frame(told)
        elif not pieces:
            target.dropped += 1

    def largest(self, port: Port, mac: bytes) -> int:
        """Bytes of an IP packet that a card takes."""
        entry = self.plane.table.get(mac)
        return self.settings.mtu or (entry.mtu if entry is not None and entry.port is port else STANDARD)

    def _unreachable(self, port: Port, frame: memoryview, packet: Ip, code: int) -> None:
        if packet.protocol == ICMP and (not packet.payload or packet.payload[0] != 8):
            return  # never an error about an error (RFC 1122, 3.2.2)
        if frame[0] & 1 or packet.fragment:
            return
        quoted = bytes(packet.header) + bytes(packet.payload[:8])
        self._send(port, bytes(frame[6:12]), packet.source, ICMP, unreachable(quoted, code))

    def _send(self, port: Port, mac: bytes, target: bytes, protocol: int, payload: bytes) -> None:
        port.send_frame(write_ip((mac, self.mac), self.ip, target, protocol, payload))
