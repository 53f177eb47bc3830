"""UDP ports of the host's loopback that lead to a machine: sockets that the daemon bound, relayed by the gateway.

passt does this for the host's other addresses. For loopback it would have to lend the machine the way back, by the
gateway's address, and with it all of the host's loopback. Here the machine sees a datagram come from the gateway, and
can answer it there as long as the flow lives; it cannot begin one.
"""

from __future__ import annotations

import socket

from kvik.named import NamedTuple
from kvik.network.switch.packets import UDP, write_ip, write_udp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.network.switch.gateway import Gateway
    from kvik.network.switch.port import Port

FORWARDS = 256  # a port
FLOWS = 256  # a port
IDLE = 180.0  # seconds without a datagram after which a flow is forgotten (RFC 4787, 4.3: at least 2 minutes)
_BURST = 32  # datagrams read at once
_SERVED = (53, 67)  # ports of the gateway's own
_FIRST, _LAST = 49152, 65535  # other ports that a flow may come from


class Forward:
    """A socket of the host's, and the machine's port that it leads to; readable when there is a datagram."""

    def __init__(self, sock: socket.socket, port: Port, to: int) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.port = port
        self.to = to

    def fileno(self) -> int:
        return self.sock.fileno()


class Peer(NamedTuple):
    """Who is at the other end of a flow."""

    forward: Forward
    address: tuple[str, int]


class Flow:
    __slots__ = ("peer", "seen")

    def __init__(self, peer: Peer, seen: float) -> None:
        self.peer = peer
        self.seen = seen


class Flows:
    """Those of one machine, by the gateway's port that they seem to come from."""

    def __init__(self) -> None:
        self.forwards: list[Forward] = []
        self._flows: dict[int, Flow] = {}
        self._numbers: dict[Peer, int] = {}

    def receive(self, forward: Forward, gateway: Gateway) -> None:
        """Datagrams for the machine. One that it cannot take whole, or that comes while it has no address, is lost."""
        port = forward.port
        address = gateway.expect(port)
        largest = (gateway.settings.mtu or 1500) - 28
        for _ in range(_BURST):
            try:
                data, client = forward.sock.recvfrom(65536)
            except OSError:  # none is there; or an ICMP error about an answer, which was told by this
                return
            if not address or port.mac is None or len(data) > largest:
                port.dropped += 1
                continue
            number = self._number(Peer(forward, client), gateway.plane.now)
            packed = write_udp((gateway.ip, number), (address, forward.to), data)
            port.send_frame(write_ip((port.mac, gateway.mac), gateway.ip, address, UDP, packed))

    def answer(self, source: int, target: int, data: bytes, now: float) -> bool:
        """A datagram of the machine to the gateway. False if it belongs to no flow."""
        flow = self._flows.get(target)
        if flow is None or flow.peer.forward.to != source:
            return False
        flow.seen = now
        try:
            flow.peer.forward.sock.sendto(data, flow.peer.address)
        except OSError:  # no room, or nobody there any more: it is UDP
            pass
        return True

    def expire(self, now: float) -> None:
        for number in [number for number, flow in self._flows.items() if flow.seen < now - IDLE]:
            self._forget(number)

    def close(self) -> None:
        for forward in self.forwards:
            forward.sock.close()
        self.forwards.clear()
        self._flows.clear()
        self._numbers.clear()

    def _number(self, peer: Peer, now: float) -> int:
        """The gateway's port for a peer: its own one if that is free, as a machine's log may tell it."""
        number = self._numbers.get(peer)
        if number is None:
            if len(self._flows) >= FLOWS:
                self._forget(min(self._flows, key=lambda each: self._flows[each].seen))
            number = peer.address[1]
            if number in _SERVED or number in self._flows:
                number = next(each for each in range(_FIRST, _LAST + 1) if each not in self._flows)
            self._numbers[peer] = number
            self._flows[number] = Flow(peer, now)
        self._flows[number].seen = now
        return number

    def _forget(self, number: int) -> None:
        del self._numbers[self._flows.pop(number).peer]
