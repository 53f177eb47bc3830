"""One port of the switch: a connected stream socket whose other end is a machine's network card, or passt.

Each frame comes behind its length, 4 bytes, big endian (QEMU's `-netdev stream`). Many frames are read by one system
call, and frames that go the same way leave by one: that is what makes a switch in Python fast enough.

A reader that stops reading costs nobody else anything: what its socket does not take is kept up to `QUEUE` bytes, and
what comes then is lost, as on any switch.
"""

from __future__ import annotations

import socket
import struct
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvik.network.switch.udp import Flows

LENGTH = struct.Struct(">I")
MAX_FRAME = 65536 + 14 + 4  # 64 KiB of IP behind Ethernet's header and a VLAN tag
ROOM = 1 << 18  # bytes read at once
SLACK = 18  # so that a header may be looked at before it is known to be there
QUEUE = 2 << 20
_BATCH = 32  # queued pieces written at once


class PortGone(Exception):
    """The other end closed, or does not speak the protocol."""


class Port:
    """`name` is the machine's, `mac` its card's, "" and none where the port leads out of the network."""

    def __init__(
        self, number: int, sock: socket.socket, name: str = "", mac: bytes | None = None, *, isolated: bool = False
    ) -> None:
        _prepare(sock)
        self.number = number
        self.sock = sock
        self.name = name
        self.mac = mac
        self.isolated = isolated
        self.alias = ""
        self.mtu = 0  # what its card may be told by DHCP; 0: nothing
        self.forwarded: list[tuple[int, int]] = []  # UDP ports of the machine, first and last, that passt leads to
        self.uplink: Port | None = None  # where this machine's way out is
        self.flows: Flows | None = None  # of UDP from the host's loopback
        self.serves: Port | None = None  # of an uplink: the machine it is for
        self.macs: set[bytes] = set()  # learned here
        self.flood_credit = 0.0
        self.flood_time = 0.0
        self.waiting = False  # the poller was asked to tell of room
        self.changed: list[Port] = []  # those whose `queued` or `gone` the poller must look at; shared by all
        self.gone = ""  # why the port is to be closed
        self.rx_frames = self.rx_bytes = self.tx_frames = self.tx_bytes = self.dropped = self.refused = 0
        self._in = bytearray(ROOM + SLACK)
        self._view = memoryview(self._in)
        self._end = 0
        self._out: deque[bytes | memoryview] = deque()
        self._queued = 0

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def queued(self) -> int:
        """Bytes that wait for the reader."""
        return self._queued

    def receive(self) -> tuple[bytearray, memoryview, int]:
        """Read once: the buffer, a view of it, and how many of its bytes are there. BlockingIOError; `PortGone`."""
        try:
            count = self.sock.recv_into(self._view[self._end : ROOM])
        except BlockingIOError:
            raise
        except OSError as error:
            raise PortGone(error.strerror or "the socket failed") from error
        if not count:
            raise PortGone("the other end closed it")
        self._end += count
        self.rx_bytes += count
        return self._in, self._view, self._end

    def consumed(self, count: int) -> None:
        """The first `count` bytes are dealt with; the rest is the beginning of a frame and stays."""
        rest = self._end - count
        if rest and count:
            self._in[:rest] = self._in[count : self._end]
        self._end = rest

    def send(self, run: memoryview | bytes, frames: int) -> None:
        """Whole frames with their lengths, which may be reused when this returns."""
        sent = 0
        if not self._out:
            try:
                sent = self.sock.send(run)
            except BlockingIOError:
                pass
            except OSError as error:
                self._failed(error)
                return
        elif self._queued > QUEUE:
            self.dropped += frames
            return
        if sent < len(run):
            if not self._out:
                self.changed.append(self)
            self._out.append(bytes(run[sent:]))
            self._queued += len(run) - sent
        self.tx_frames += frames
        self.tx_bytes += len(run)

    def send_frame(self, frame: bytes) -> None:
        self.send(LENGTH.pack(len(frame)) + frame, 1)

    def flush(self) -> None:
        """Go on with what waits, when there is room."""
        try:
            while self._out:
                pieces = [self._out[index] for index in range(min(_BATCH, len(self._out)))]
                sent = self.sock.sendmsg(pieces)
                self._queued -= sent
                while sent:
                    piece = self._out.popleft()
                    if sent < len(piece):
                        self._out.appendleft(memoryview(piece)[sent:])
                        break
                    sent -= len(piece)
        except BlockingIOError:
            pass
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.gone = self.gone or error.strerror or "the socket failed"
        self.changed.append(self)

    def close(self) -> None:
        self._out.clear()
        self._queued = self._end = 0
        self.waiting = False
        self.sock.close()

    def replace(self, sock: socket.socket) -> None:
        """Another socket of the same card; nothing of the old one's stream goes into it."""
        self.close()
        _prepare(sock)
        self.sock = sock
        self.waiting = False


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)  # as much as an ordinary user may


def frames(run: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Where each frame of a run begins (its length first) and ends, and the frame itself."""
    position, end = 0, len(run)
    while position < end:
        start = position
        position += 4 + LENGTH.unpack_from(run, start)[0]
        yield start, position, run[start + 4 : position]
