"""Where frames go: a learning bridge (IEEE 802.1D, without spanning tree) with the walls of a network of strangers.

- A card's address belongs to its port: a frame that bears another port's, or the gateway's, is dropped, and so is an
  ARP packet that claims another machine's address or the gateway's.
- Other source addresses are learned, up to `LEARNED` a port, and forgotten after `AGEING` seconds.
- What a machine asks by DHCP only the switch hears, and only the switch answers.
- Floods are rationed: one machine cannot make the switch copy without end.

Frames are handled in runs: as many as follow each other with the same header.
"""

from __future__ import annotations

import struct

from kvik.network.switch.mtu import STANDARD
from kvik.network.switch.packets import ARP, ETHER, IPV4, UDP, mac_text, read_arp
from kvik.network.switch.port import MAX_FRAME, PortGone, frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.network.switch.gateway import Gateway
    from kvik.network.switch.port import Port

LEARNED = 64  # addresses a port may have besides its card's: nested machines, containers
AGEING = 300.0  # seconds, IEEE 802.1D table 7-5
FLOODS = 5000.0  # frames a second that one port may have copied to all others
BURST = 5000.0

_HEADER = struct.Struct(">I14s")  # a frame's length, then its target, source and EtherType
_RESERVED = b"\x01\x80\xc2\x00\x00"  # 802.1D, 7.12.6: never forwarded
_RUNT = b""


class Entry:
    """Where an address is."""

    __slots__ = ("fixed", "mtu", "port", "seen")

    def __init__(self, port: Port, seen: float, *, fixed: bool) -> None:
        self.port = port
        self.seen = seen
        self.fixed = fixed
        self.mtu = STANDARD  # bytes of an IP packet that it takes, as far as we have told it


class Plane:
    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.ports: dict[int, Port] = {}  # those of machines, by number
        self.table: dict[bytes, Entry] = {}
        self.now = 0.0  # monotonic seconds, set by whoever polls
        gateway.plane = self

    def add(self, port: Port) -> None:
        """ValueError if its card's address is taken."""
        if port.mac is not None:
            entry = self.table.get(port.mac)
            if (entry is not None and entry.fixed) or port.mac == self.gateway.mac:
                raise ValueError(f"{mac_text(port.mac)} is on this network already")
            if entry is not None:
                entry.port.macs.discard(port.mac)
            self.table[port.mac] = Entry(port, self.now, fixed=True)
        self.ports[port.number] = port

    def remove(self, port: Port) -> None:
        self.ports.pop(port.number, None)
        for mac in (*port.macs, *((port.mac,) if port.mac is not None else ())):
            entry = self.table.get(mac)
            if entry is not None and entry.port is port:
                del self.table[mac]
        port.macs.clear()
        self.gateway.removed(port)

    def age(self) -> None:
        """Forget what was not seen for long. Once a second is enough."""
        old = [mac for mac, entry in self.table.items() if not entry.fixed and entry.seen < self.now - AGEING]
        for mac in old:
            self.table.pop(mac).port.macs.discard(mac)

    def receive(self, port: Port) -> None:
        """All whole frames that one read of the port gives. BlockingIOError; `PortGone`."""
        buffer, view, end = port.receive()
        unpack = _HEADER.unpack_from
        start = position = count = 0
        run: bytes | None = None
        while end - position >= 4:
            size, key = unpack(buffer, position)
            if size > MAX_FRAME:
                raise PortGone(f"it announced a frame of {size} bytes")
            following = position + 4 + size
            if following > end:
                break
            if size < ETHER:
                key = _RUNT
            if key != run:
                if count:
                    self._switch(port, run or _RUNT, view[start:position], count)
                run, start, count = key, position, 0
            count += 1
            position = following
        if count:
            self._switch(port, run or _RUNT, view[start:position], count)
        port.consumed(position)

    def _switch(self, port: Port, key: bytes, run: memoryview, count: int) -> None:
        port.rx_frames += count
        if port.serves is not None:  # from outside, for one machine only
            port.serves.send(run, count)
            return
        target, source, kind = key[:6], key[6:12], key[12:]
        entry = self.table.get(source)
        if entry is None or entry.port is not port:
            if key == _RUNT or not self._learn(port, source, entry):
                port.refused += count
                return
        else:
            entry.seen = self.now
        if kind == ARP:
            for start, end, frame in frames(run):
                self._arp(port, target, run[start:end], frame)
        elif target == self.gateway.mac:
            self.gateway.receive(port, run, kind)
        elif target[0] & 1:
            self._group(port, target, kind, run, count)
        else:
            self._forward(port, target, run, count, STANDARD if entry is None else entry.mtu)

    def _learn(self, port: Port, mac: bytes, entry: Entry | None) -> bool:
        """Whether a frame may come from `mac` here."""
        if mac[0] & 1 or mac == self.gateway.mac or (entry is not None and entry.fixed):
            return False
        if len(port.macs) >= LEARNED:
            return False
        if entry is not None:
            entry.port.macs.discard(mac)
        self.table[mac] = Entry(port, self.now, fixed=False)
        port.macs.add(mac)
        return True

    def _arp(self, port: Port, target: bytes, run: memoryview, frame: memoryview) -> None:
        packet = read_arp(frame)
        if packet is None:
            port.refused += 1
            return
        owner = self.gateway.owner(packet.sender)
        if owner is not None and owner is not port:
            port.refused += 1
            return
        self.gateway.seen(port, packet)
        if packet.target == self.gateway.ip:
            self.gateway.arp(port, packet)
        elif target[0] & 1:
            self._flood(port, run, 1)
        else:
            self._forward(port, target, run, 1, STANDARD)

    def _group(self, port: Port, target: bytes, kind: bytes, run: memoryview, count: int) -> None:
        """Broadcast and multicast: DHCP is taken out."""
        if target[:5] == _RESERVED and target[5] < 16:
            return
        if kind != IPV4:
            self._flood(port, run, count)
            return
        for start, end, frame in frames(run):
            ports = _udp_ports(frame)
            if ports == (68, 67):
                self.gateway.broadcast(port, frame)
            elif ports is not None and ports[0] == 67:
                port.refused += 1  # another DHCP server
            else:
                self._flood(port, run[start:end], 1)

    def _forward(self, port: Port, target: bytes, run: memoryview, count: int, mtu: int) -> None:
        """`mtu`: of who sends."""
        entry = self.table.get(target)
        if entry is None:
            self._flood(port, run, count)
        elif entry.port is port or (port.isolated and entry.port.isolated):
            return
        elif entry.mtu < mtu and len(run) > entry.mtu + ETHER + 4:
            for _, _, frame in frames(run):
                self.gateway.fit(port, entry.port, frame, entry.mtu)
        else:
            entry.port.send(run, count)

    def _flood(self, port: Port, run: memoryview, count: int) -> None:
        port.flood_credit = min(BURST, port.flood_credit + (self.now - port.flood_time) * FLOODS)
        port.flood_time = self.now
        if port.flood_credit < count:
            port.dropped += count
            return
        port.flood_credit -= count
        for other in self.ports.values():
            if other is not port and not (port.isolated and other.isolated):
                other.send(run, count)


def _udp_ports(frame: memoryview) -> tuple[int, int] | None:
    """Source and target port of an IPv4 frame's UDP, if it is its first fragment."""
    if len(frame) < ETHER + 20 or frame[ETHER + 9] != UDP:
        return None
    at = ETHER + (frame[ETHER] & 15) * 4
    if len(frame) < at + 4 or frame[ETHER + 6] & 0x1F or frame[ETHER + 7]:
        return None
    return frame[at] << 8 | frame[at + 1], frame[at + 2] << 8 | frame[at + 3]
