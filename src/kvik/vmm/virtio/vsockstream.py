"""One stream of virtio-vsock: its packets' header, its credit, and the host's socket behind it (virtio 1.2, 5.10.6)."""

from __future__ import annotations

from struct import Struct

from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from kvik.vmm.virtio.queue import Chain
    from kvik.vmm.virtio.vsock import VsockDevice

HOST_CID = 2
BUFFER = 1 << 18  # what the guest may send before the host's program reads it: our buf_alloc
_HEADER = Struct("<QQIIIHHIII")  # struct virtio_vsock_hdr, 44 bytes
HEADER_SIZE = _HEADER.size
_RESPONSE, _RST, _SHUTDOWN, _RW, _CREDIT_UPDATE = 2, 3, 4, 5, 6
SHUT_RECEIVE, SHUT_SEND = 1, 2
_MAX_LINE = 32  # of the handshake


class Header(NamedTuple):
    source_cid: int
    target_cid: int
    source_port: int
    target_port: int
    length: int
    kind: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        return cls(*_HEADER.unpack(data))

    def pack(self) -> bytes:
        return _HEADER.pack(*self)

    def answer(self, op: int) -> Header:
        """To the sender of this packet, of no stream."""
        return Header(HOST_CID, self.source_cid, self.target_port, self.source_port, 0, self.kind, op, 0, 0, 0)


class Stream:
    """Counters are modulo 2^32, as on the wire."""

    def __init__(self, device: VsockDevice, peer: socket.socket, guest_port: int, host_port: int) -> None:
        self.device = device
        self.socket = peer
        self.guest_port, self.host_port = guest_port, host_port
        self.established = False
        self.queued = False  # in the device's list of streams that have something for the guest
        self.owe = 0  # REQUEST or RESPONSE, to be sent first
        self.owe_credit = False
        self._line = b""  # of the handshake
        self._out: list[bytes] = []  # what the guest sent and the socket did not take yet, at most BUFFER bytes
        self._out_size = 0
        self._forwarded = self._told = 0  # fwd_cnt, and the last that the guest was told
        self._sent = 0
        self._peer_alloc = self._peer_forwarded = 0
        self._readable = False
        self._eof = self._eof_told = False  # the host's program will send no more
        self._guest_eof = False  # the guest will send no more
        self._reading = self._writing = False
        self._gone = False

    # --- credit

    def credit(self, header: Header) -> None:
        """Every packet of the guest tells its room."""
        self._peer_alloc, self._peer_forwarded = header.buf_alloc, header.fwd_cnt
        self.watch()

    def room(self) -> int:
        """Bytes that the guest has room for."""
        return max(self._peer_alloc - ((self._sent - self._peer_forwarded) & 0xFFFFFFFF), 0)

    def header(self, op: int, length: int = 0, flags: int = 0) -> Header:
        self._told = self._forwarded
        return Header(
            HOST_CID, self.device.cid, self.host_port, self.guest_port, length, 1, op, flags, BUFFER, self._forwarded
        )  # fmt: skip

    # --- guest to host

    def take(self, parts: list[memoryview], size: int) -> bool:
        """Forward what the guest sent. False: it had no credit for so much, or the host's end is gone."""
        if self._guest_eof or self._out_size + size > BUFFER:
            return False
        done = 0
        if not self._out:
            try:
                done = self.socket.sendmsg(parts)
            except BlockingIOError:
                pass
            except OSError:
                return False
            self._went(done)
        if done < size:
            rest = b"".join(parts)[done:]
            self._out.append(rest)
            self._out_size += len(rest)
            self._watch_writer()
        return True

    def _went(self, count: int) -> None:
        self._forwarded = (self._forwarded + count) & 0xFFFFFFFF
        if (self._forwarded - self._told) & 0xFFFFFFFF >= BUFFER // 2:
            self.owe_credit = True
            self.device.wake(self)

    def _flush(self) -> None:
        try:
            while self._out:
                count = self.socket.send(self._out[0])
                self._out_size -= count
                self._went(count)
                if count < len(self._out[0]):
                    self._out[0] = self._out[0][count:]
                    break
                del self._out[0]
        except BlockingIOError:
            pass
        except OSError:
            self.device.drop(self)
            self.device.pump()
            return
        if not self._out:
            self._unwatch_writer()
            if self._gone:
                self.device.drop(self)
            elif self._guest_eof:
                self._shut()
        self.device.pump()

    def guest_shut(self, flags: int) -> bool:
        """SHUTDOWN of the guest (5.10.6.5). True when the stream has ended."""
        if flags & SHUT_SEND:
            self._guest_eof = True
        if flags & SHUT_RECEIVE:
            self._eof = self._eof_told = True
            self.unwatch_reader()
        self._gone = self._guest_eof and self._eof
        if self._out:
            return False  # first what it has sent
        if self._guest_eof and not self._gone:
            self._shut()
        return self._gone

    def _shut(self) -> None:
        try:
            self.socket.shutdown(1)  # SHUT_WR
        except OSError:
            pass  # its reader has left

    # --- host to guest

    def accepted(self) -> None:
        """The guest's program accepted: tell the host's."""
        self.established = True
        try:
            self.socket.send(b"OK %d\n" % self.host_port)
        except OSError:
            self.device.drop(self)
            return
        self.watch()

    def next_packet(self, chain: Chain) -> Header | None:
        """The next packet for the guest, its data put into the chain behind the header; None: there is none."""
        if self.owe:
            op, self.owe = self.owe, 0
            return self.header(op)
        if self._readable and self.established and not self._eof:
            self._readable = False
            size = min(self.room(), chain.writable_size - HEADER_SIZE)
            if size > 0:
                try:
                    count = self.socket.recvmsg_into(_behind(chain.writable, HEADER_SIZE, size))[0]
                except BlockingIOError:
                    count = -1
                except OSError:
                    return self.header(_RST)
                if count > 0:
                    self._sent = (self._sent + count) & 0xFFFFFFFF
                    self.owe_credit = False
                    self.watch()
                    return self.header(_RW, count)
                if count == 0:
                    self._eof = True
                    self.unwatch_reader()
        if self._eof and not self._eof_told:
            self._eof_told = True
            return self.header(_SHUTDOWN, flags=SHUT_SEND | (SHUT_RECEIVE if self._guest_eof else 0))
        if self.owe_credit:
            self.owe_credit = False
            return self.header(_CREDIT_UPDATE)
        return None

    def has_more(self) -> bool:
        return bool(self.owe or self.owe_credit or (self._eof and not self._eof_told))

    # --- the host's socket

    def _on_readable(self) -> None:
        self.device.guarded(self._read)

    def _read(self) -> None:
        if not self.guest_port and self.socket.fileno() in self.device.shaking:
            self._shake()
            return
        self._readable = True
        self.device.wake(self)
        self.device.pump()

    def _shake(self) -> None:
        """Read the CONNECT line, byte by byte: what follows it is the guest's."""
        while True:
            try:
                byte = self.socket.recv(1)
            except BlockingIOError:
                return
            except OSError:
                byte = b""
            self._line += byte
            if byte == b"\n" or not byte or len(self._line) > _MAX_LINE:
                break
        self.unwatch()
        word, _, number = self._line.strip().partition(b" ")
        port = int(number) if word == b"CONNECT" and number.isdigit() and len(number) <= 10 else -1
        good = self._line.endswith(b"\n") and 0 <= port < 0xFFFFFFFF
        self.device.shaken(self, port if good else None)

    def watch(self) -> None:
        """Listen to the host's socket while what it says can be handed on."""
        if self._out:
            self._watch_writer()
        shaking = self.socket.fileno() in self.device.shaking and not self.host_port
        wanted = shaking or (self.established and not self._eof and self.room() > 0 and not self.device.starved)
        if wanted and not self._reading and self.socket.fileno() >= 0:
            self._reading = True
            self.device.loop.add_reader(self.socket.fileno(), self._on_readable)
        elif not wanted:
            self.unwatch_reader()

    def unwatch_reader(self) -> None:
        if self._reading:
            self._reading = False
            self.device.loop.remove_reader(self.socket.fileno())

    def _watch_writer(self) -> None:
        if not self._writing:
            self._writing = True
            self.device.loop.add_writer(self.socket.fileno(), lambda: self.device.guarded(self._flush))

    def _unwatch_writer(self) -> None:
        if self._writing:
            self._writing = False
            self.device.loop.remove_writer(self.socket.fileno())

    def unwatch(self) -> None:
        self.unwatch_reader()
        self._unwatch_writer()

    def close(self) -> None:
        if self.socket.fileno() >= 0:
            self.unwatch()
            self.socket.close()
        self._out.clear()


def _behind(parts: list[memoryview], skip: int, size: int) -> list[memoryview]:
    """`size` bytes of `parts` from `skip` on."""
    found = []
    for part in parts:
        if skip >= len(part):
            skip -= len(part)
            continue
        piece = part[skip : skip + size]
        skip = 0
        found.append(piece)
        size -= len(piece)
        if not size:
            break
    return found
