"""UDP of machines to the world, by sockets of the switch's own: a round trip wakes one process less than by passt.

A machine's address and port have one socket here, whoever they speak with (RFC 4787, 4.1: endpoint-independent
mapping), and hear only those whom they have spoken to (5: address and port-dependent filtering). What the world says of
a datagram by ICMP the machine is told by ICMP, too. The host's loopback cannot be reached. Fragments, and answers of
ports that passt forwards, are passt's.
"""

from __future__ import annotations

import errno
import select
import socket
import struct

from kvik.network.switch.packets import ETHER, ICMP, UDP, ip_text, unreachable, write_ip, write_udp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.network.switch.gateway import Gateway
    from kvik.network.switch.port import Port

PER_PORT = 256  # sockets of one machine
PEERS = 256  # whom one socket may speak with at once
# Seconds without a datagram after which a socket is closed; the first while nobody has answered. Linux does as much
# (nf_conntrack_udp_timeout, nf_conntrack_udp_timeout_stream).
UNANSWERED, IDLE = 30.0, 120.0
_BURST = 32  # datagrams read at once
_LARGEST = 65535
_IP_RECVERR = 11  # linux/in.h
_ERROR = struct.Struct("=IBBBBII")  # struct sock_extended_err, linux/errqueue.h
_ORIGIN_ICMP = 2
_UNREACHABLE = 3  # ICMP's type
_PORT, _TOO_BIG, _FORBIDDEN = 3, 4, 13  # its codes
_CODES = {errno.ENETUNREACH: 0, errno.EHOSTUNREACH: 1, errno.EACCES: _FORBIDDEN, errno.EPERM: _FORBIDDEN}  # RFC 1812
_HERE, _GROUPS = (0, 127), 224  # first bytes of addresses: "this host" (RFC 1122, 3.2.1.3), groups and what is beyond
_PORTS = struct.Struct("!HHH")

Peer = tuple[str, int]


class Outlet:
    """The socket of a machine's address and port; readable when there is a datagram for it, or an error."""

    __slots__ = ("answered", "mac", "peers", "port", "seen", "sock", "source")

    def __init__(self, sock: socket.socket, port: Port, source: tuple[bytes, int]) -> None:
        self.sock = sock
        self.port = port
        self.source = source
        self.mac = b""
        self.peers: dict[Peer, bytes] = {}  # with the packed address; the newest last
        self.seen = 0.0
        self.answered = False

    def fileno(self) -> int:
        return self.sock.fileno()


class Outside:
    """`watch` and `unwatch` tell the poller of sockets; `most`: of all machines together."""

    def __init__(self, watch: Callable[[Outlet], None], unwatch: Callable[[Outlet], None], most: int) -> None:
        self._watch = watch
        self._unwatch = unwatch
        self._most = most
        self._count = 0
        self._outlets: dict[Port, dict[tuple[bytes, int], Outlet]] = {}  # used last, last
        self._buffer = bytearray(_LARGEST)
        self._view = memoryview(self._buffer)

    def send(self, gateway: Gateway, port: Port, frame: memoryview) -> bool:
        """An IPv4 frame whose protocol is UDP, to another network. False: it is passt's."""
        at = ETHER + (frame[ETHER] & 15) * 4
        if len(frame) < at + 8 or frame[ETHER] >> 4 != 4 or at < ETHER + 20:
            port.refused += 1
            return True
        number, to, size = _PORTS.unpack_from(frame, at)
        fragment = frame[ETHER + 6] & 0x3F or frame[ETHER + 7]
        if fragment or any(first <= number <= last for first, last in port.forwarded):
            return False
        source, target = bytes(frame[ETHER + 12 : ETHER + 16]), bytes(frame[ETHER + 16 : ETHER + 20])
        if not (8 <= size <= len(frame) - at and to and number and self._is_its_own(gateway, port, source)):
            port.refused += 1
        elif target[0] in _HERE or target[0] >= _GROUPS:
            gateway.refuse(port, frame, _FORBIDDEN)
        elif (outlet := self._outlet(port, (source, number))) is None:
            port.dropped += 1
        else:
            outlet.seen, outlet.mac = gateway.plane.now, bytes(frame[6:12])
            peer = (ip_text(target), to)
            if peer not in outlet.peers:
                if len(outlet.peers) >= PEERS:
                    del outlet.peers[next(iter(outlet.peers))]
                outlet.peers[peer] = target
            self._out(gateway, outlet, frame, frame[at + 8 : at + size], peer)
        return True

    def _out(self, gateway: Gateway, outlet: Outlet, frame: memoryview, data: memoryview, peer: Peer) -> None:
        why: int | None = None
        for _ in range(2):
            try:
                outlet.sock.sendto(data, peer)
                return
            except BlockingIOError:
                break
            except OSError as error:
                self._errors(gateway, outlet)  # the first time it may be of a datagram before this one
                why = error.errno
        if why in _CODES:
            gateway.refuse(outlet.port, frame, _CODES[why])
        else:
            outlet.port.dropped += 1

    def _is_its_own(self, gateway: Gateway, port: Port, source: bytes) -> bool:
        """Whether the port may have that address."""
        return gateway.settings.usable(source) and gateway.owner(source) in (None, port)

    def _outlet(self, port: Port, source: tuple[bytes, int]) -> Outlet | None:
        outlets = self._outlets.get(port, {})
        outlet = outlets.get(source)
        if outlet is not None:
            outlets[source] = outlets.pop(source)
            return outlet
        if len(outlets) >= PER_PORT:
            self._close(next(iter(outlets.values())))
        elif self._count >= self._most:  # the machine with the most of them gives one up
            self._close(next(iter(max(self._outlets.values(), key=len).values())))
        try:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        except OSError:
            return None
        try:
            sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        except OSError:
            sock.close()
            return None
        outlet = Outlet(sock, port, source)
        self._outlets.setdefault(port, {})[source] = outlet
        self._count += 1
        self._watch(outlet)
        return outlet

    def receive(self, gateway: Gateway, outlet: Outlet, mask: int) -> None:
        """Datagrams for the machine, and what ICMP says of its own."""
        if mask & select.EPOLLERR:
            self._errors(gateway, outlet)
        source = outlet.source[0]
        macs = (outlet.mac, gateway.mac)
        largest = gateway.largest(outlet.port, outlet.mac) - 28
        for _ in range(_BURST):
            try:
                size, peer = outlet.sock.recvfrom_into(self._buffer)
            except OSError:  # none is there; errors are told by the poller, too
                return
            origin = outlet.peers.get(peer)
            if origin is None:
                continue
            if size > largest:
                outlet.port.dropped += 1
                continue
            packed = write_udp((origin, peer[1]), outlet.source, self._view[:size])
            outlet.port.send_frame(write_ip(macs, origin, source, UDP, packed))
            outlet.seen, outlet.answered = gateway.plane.now, True

    def _errors(self, gateway: Gateway, outlet: Outlet) -> None:
        """Take what the kernel keeps of ICMP errors (ip(7), IP_RECVERR), and tell the machine."""
        for _ in range(_BURST):
            try:
                data, ancillary, _, peer = outlet.sock.recvmsg(_LARGEST, 512, socket.MSG_ERRQUEUE)
            except OSError:
                return
            for level, kind, text in ancillary:
                if (level, kind) != (socket.IPPROTO_IP, _IP_RECVERR) or len(text) < _ERROR.size:
                    continue
                _, by, what, code, *_ = _ERROR.unpack_from(text)
                known = by == _ORIGIN_ICMP and peer in outlet.peers
                if known and what == _UNREACHABLE and code != _TOO_BIG:  # the kernel itself sends smaller ones
                    self._tell(gateway, outlet, peer, code, data)

    def _tell(self, gateway: Gateway, outlet: Outlet, peer: Peer, code: int, data: bytes) -> None:
        """As whoever refused the datagram would: its target (3: the port), or a router on the way."""
        macs, target = (outlet.mac, gateway.mac), outlet.peers[peer]
        sent = write_ip(macs, outlet.source[0], target, UDP, write_udp(outlet.source, (target, peer[1]), data))
        by = target if code == _PORT else gateway.ip
        answer = unreachable(sent[ETHER : ETHER + 28], code)
        outlet.port.send_frame(write_ip(macs, by, outlet.source[0], ICMP, answer))

    def expire(self, now: float) -> None:
        for outlets in list(self._outlets.values()):
            for outlet in list(outlets.values()):
                if outlet.seen < now - (IDLE if outlet.answered else UNANSWERED):
                    self._close(outlet)

    def removed(self, port: Port) -> None:
        for outlet in list(self._outlets.get(port, {}).values()):
            self._close(outlet)

    def _close(self, outlet: Outlet) -> None:
        outlets = self._outlets[outlet.port]
        del outlets[outlet.source]
        if not outlets:
            del self._outlets[outlet.port]
        self._count -= 1
        self._unwatch(outlet)
        outlet.sock.close()
