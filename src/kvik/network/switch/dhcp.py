"""A DHCP server (RFC 2131, 2132) without a file.

A machine's address follows from its card's address: the pool is tried from a place that the address hashes to. So a
switch that was started anew gives the same addresses again, and what a client says it has is believed where it is free.
What one port can hold is bounded, whatever card addresses it makes up.
"""

from __future__ import annotations

import struct
import zlib

from kvik.named import NamedTuple
from kvik.network.switch.packets import ANY
from kvik.network.switch.settings import FOR_EVER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvik.network.switch.settings import Settings

PER_PORT = 16  # leases
OFFERED = 30.0  # seconds that an offer is kept
EXPECTED = 600.0  # seconds that a card which was just connected may take to ask
DECLINED = 600.0  # seconds that nobody is offered an address that somebody uses without us

DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)
_FIXED = struct.Struct("!BBBBIHH4s4s4s4s16s")  # then 64 bytes of server name, 128 of file
_OPTIONS = 236
_COOKIE = b"\x63\x82\x53\x63"
_LARGEST = 1472  # of a request: what one frame carries
_BROADCAST = 0x8000
_MASK, _ROUTER, _DNS, _HOSTNAME, _DOMAIN, MTU, _BROADCAST_ADDRESS = 1, 3, 6, 12, 15, 26, 28
_REQUESTED, _LEASE, _TYPE, _SERVER, _WANTED, _RENEW, _REBIND, _END = 50, 51, 53, 54, 55, 58, 59, 255


class Lease:
    __slots__ = ("expires", "hostname", "ip", "mac", "offered", "port")

    def __init__(self, ip: bytes, mac: bytes, port: int, expires: float) -> None:
        self.ip = ip
        self.mac = mac  # empty: declined
        self.port = port
        self.expires = expires  # monotonic seconds
        self.offered = True  # not yet asked for
        self.hostname = ""  # what the guest calls itself


class Request(NamedTuple):
    kind: int
    xid: int
    flags: int
    client: bytes  # the address that it has
    relay: bytes
    mac: bytes
    options: dict[int, bytes]

    def wants(self, code: int) -> bool:
        """Whether it asks for that option (RFC 2132, 9.8): then it does something with it."""
        return code in self.options.get(_WANTED, b"")


class Reply(NamedTuple):
    """`ip` and `mac`: where to send it."""

    kind: int
    ip: bytes
    mac: bytes
    data: bytes


def parse(data: bytes) -> Request | None:
    """A client's message; None if it is none, or damaged."""
    if not _OPTIONS + 4 <= len(data) <= _LARGEST or data[_OPTIONS : _OPTIONS + 4] != _COOKIE:
        return None
    op, hardware, size, _, xid, _, flags, client, _, _, relay, mac = _FIXED.unpack_from(data)
    if op != 1 or hardware != 1 or size != 6 or mac[0] & 1:
        return None
    options: dict[int, bytes] = {}
    position = _OPTIONS + 4
    while position < len(data) and (code := data[position]) != _END:
        position += 1
        if code:
            if position >= len(data) or position + 1 + data[position] > len(data):
                return None
            options[code] = options.get(code, b"") + data[position + 1 : position + 1 + data[position]]
            position += 1 + data[position]
    kind = options.get(_TYPE, b"")
    return Request(kind[0], xid, flags, client, relay, mac[:6], options) if len(kind) == 1 else None


def host_name(text: bytes) -> str:
    """A guest's own name if it is one label of a host name (RFC 1123), in small letters; else empty."""
    label = text.rstrip(b"\0").partition(b".")[0].lower()
    if not 0 < len(label) <= 63 or label[0] == 45 or label[-1] == 45:
        return ""
    return label.decode() if all(48 <= byte <= 57 or 97 <= byte <= 122 or byte == 45 for byte in label) else ""


class Dhcp:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.leases: dict[bytes, Lease] = {}  # by address
        self._macs: dict[bytes, Lease] = {}
        self._counts: dict[int, int] = {}  # leases by port
        self._reserved = {host.ip: mac for mac, host in settings.hosts.items()}

    def configure(self, settings: Settings) -> None:
        """Reservations and the range as they are now; leases that do not fit are not renewed."""
        self.settings = settings
        self._reserved = {host.ip: mac for mac, host in settings.hosts.items()}

    def current(self, now: float) -> Iterator[Lease]:
        """Those that a machine has."""
        return (lease for lease in self.leases.values() if lease.mac and not lease.offered and lease.expires > now)

    def expire(self, now: float) -> None:
        for lease in [lease for lease in self.leases.values() if lease.expires <= now]:
            self._forget(lease)

    def removed(self, port: int) -> None:
        """A port is gone, and its machine with it."""
        for lease in [lease for lease in self.leases.values() if lease.port == port]:
            self._forget(lease)

    def reserve(self, port: int, mac: bytes, now: float) -> Lease | None:
        """The lease that this card will be offered."""
        lease = self._choose(port, mac, b"", now) if self.settings.dhcp else None
        if lease is not None and lease.offered:
            lease.expires = now + EXPECTED
        return lease

    def confirm(self, port: int, mac: bytes, ip: bytes, now: float) -> None:
        """A card was seen with an address that nobody else has: it is its lease."""
        lease = self._macs.get(mac)
        if lease is not None and lease.ip == ip:
            if lease.offered and lease.port == port:
                lease.offered, lease.expires = False, now + self.settings.lease_of(mac, ip)
        elif (lease is None or lease.offered) and ip not in self.leases and ip not in self._reserved:
            if lease is not None:
                self._forget(lease)
            if self._counts.get(port, 0) < PER_PORT:
                self._add(Lease(ip, mac, port, now + self.settings.lease_of(mac, ip))).offered = False

    def answer(self, port: int, request: Request, now: float, mtu: int = 0) -> Reply | None:
        """`mtu`: what this card may be told, if the network has none for all."""
        if not self.settings.dhcp or request.relay != ANY:
            return None
        if request.kind == DISCOVER:
            lease = self._choose(port, request.mac, request.options.get(_REQUESTED, b""), now)
            if lease is None:
                return None
            if lease.offered:
                lease.expires = max(lease.expires, now + OFFERED)
            return self._reply(request, OFFER, lease.ip, mtu)
        if request.kind == REQUEST:
            return self._requested(port, request, now, mtu)
        if request.kind == INFORM:
            return self._reply(request, ACK, ANY, mtu)
        lease = self._macs.get(request.mac)
        if lease is None or lease.port != port:
            return None
        if request.kind == RELEASE and lease.ip == request.client:
            self._forget(lease)
        elif request.kind == DECLINE and lease.ip == request.options.get(_REQUESTED):
            self._forget(lease)
            self._add(Lease(lease.ip, b"", port, now + DECLINED))
        return None

    def _requested(self, port: int, request: Request, now: float, mtu: int) -> Reply | None:
        wanted = request.options.get(_REQUESTED, request.client)
        server = request.options.get(_SERVER)
        if server not in (None, self.settings.ip):
            lease = self._macs.get(request.mac)
            if lease is not None and lease.offered and lease.port == port:
                self._forget(lease)  # it took another server's offer
            return None
        lease = self._choose(port, request.mac, wanted, now)
        if lease is None or lease.ip != wanted:
            return self._reply(request, NAK, ANY)
        lease.offered = False
        lease.expires = now + self.settings.lease_of(lease.mac, lease.ip)
        if _HOSTNAME in request.options:
            lease.hostname = host_name(request.options[_HOSTNAME])
        return self._reply(request, ACK, lease.ip, mtu)

    def _choose(self, port: int, mac: bytes, wanted: bytes, now: float) -> Lease | None:
        """The lease this card has, or a new one. None: there is no address for it."""
        lease = self._macs.get(mac)
        reserved = self.settings.hosts.get(mac)
        if lease is not None:
            if lease.port == port and self._fits(lease.ip, mac):
                return lease
            self._forget(lease)  # the card has moved, or the settings changed
        if self._counts.get(port, 0) >= PER_PORT:
            return None
        if reserved is not None:
            holder = self.leases.get(reserved.ip)
            if holder is not None and holder.expires > now:
                return None  # somebody has it still, until the lease ends
            return self._add(Lease(reserved.ip, mac, port, now + OFFERED))
        if len(wanted) == 4 and self._free(wanted, mac, now):
            return self._add(Lease(wanted, mac, port, now + OFFERED))
        start = zlib.crc32(mac)
        # Every address that is passed over is leased, reserved or the gateway's: there are not many.
        for item in self.settings.ranges:
            size = item.last - item.first + 1
            for offset in range(size):
                ip = (item.first + (start + offset) % size).to_bytes(4, "big")
                if self._free(ip, mac, now):
                    return self._add(Lease(ip, mac, port, now + OFFERED))
        return None

    def _fits(self, ip: bytes, mac: bytes) -> bool:
        reserved = self.settings.hosts.get(mac)
        if reserved is not None:
            return reserved.ip == ip
        number = int.from_bytes(ip, "big")
        inside = any(item.first <= number <= item.last for item in self.settings.ranges)
        return inside and self.settings.usable(ip) and ip not in self._reserved

    def _free(self, ip: bytes, mac: bytes, now: float) -> bool:
        if not self._fits(ip, mac):
            return False
        lease = self.leases.get(ip)
        return lease is None or lease.expires <= now

    def _add(self, lease: Lease) -> Lease:
        old = self.leases.get(lease.ip)
        if old is not None:
            self._forget(old)
        self.leases[lease.ip] = lease
        if lease.mac:
            self._macs[lease.mac] = lease
        self._counts[lease.port] = self._counts.get(lease.port, 0) + 1
        return lease

    def _forget(self, lease: Lease) -> None:
        if self.leases.get(lease.ip) is lease:
            del self.leases[lease.ip]
            count = self._counts[lease.port] - 1
            if count:
                self._counts[lease.port] = count
            else:
                del self._counts[lease.port]
        if self._macs.get(lease.mac) is lease:
            del self._macs[lease.mac]

    def _reply(self, request: Request, kind: int, ip: bytes, mtu: int = 0) -> Reply:
        settings = self.settings
        options: list[tuple[int, bytes]] = [(_TYPE, bytes((kind,))), (_SERVER, settings.ip)]
        if kind != NAK:
            if ip != ANY:
                lease = settings.lease_of(request.mac, ip)
                half, most = (lease // 2, lease // 8 * 7) if lease != FOR_EVER else (lease, lease)
                options += [
                    (code, struct.pack("!I", time)) for code, time in ((_LEASE, lease), (_RENEW, half), (_REBIND, most))
                ]
            options += [(_MASK, settings.netmask), (_BROADCAST_ADDRESS, settings.broadcast)]
            if settings.router:
                options.append((_ROUTER, settings.ip))
            if settings.dns:
                options.append((_DNS, settings.ip))
            if settings.domain:
                options.append((_DOMAIN, settings.domain.encode()[:255]))
            if mtu := settings.mtu or mtu:
                options.append((MTU, struct.pack("!H", mtu)))
        client = request.client if kind == ACK else ANY
        fixed = _FIXED.pack(2, 1, 6, 0, request.xid, 0, request.flags, client, ip, ANY, ANY, request.mac)
        packed = b"".join(bytes((code, len(value))) + value for code, value in options) + bytes((_END,))
        data = (fixed.ljust(_OPTIONS, b"\0") + _COOKIE + packed).ljust(300, b"\0")
        if client != ANY:
            return Reply(kind, client, request.mac, data)
        if kind == NAK or request.flags & _BROADCAST or ip == ANY:
            return Reply(kind, b"\xff" * 4, b"\xff" * 6, data)
        return Reply(kind, ip, request.mac, data)
