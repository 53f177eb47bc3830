"""A network over a connected Unix socket: what an unprivileged machine has (passt), and what tests use.

A stream carries each frame behind its length, 4 bytes, big endian (QEMU's `-netdev stream`, which passt speaks). A
datagram or seqpacket socket carries one frame a message. The frames have no virtio header, so no offloads.

A stream socket that listens waits for its peer, and after that for the next one: a switch that was killed and started
again finds the machine where it was (as QEMU's `-netdev stream,server=on`).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct

from kvik.errors import HostError
from kvik.vmm.backends.net import HEADER, MAX_FRAME, BackendGone, NetBackend, adopt, gone, scatter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_LENGTH = struct.Struct(">I")
_NO_HEADER = memoryview(bytes(HEADER))
_ROOM = 1 << 18


def _frame(buffers: Sequence[memoryview]) -> list[memoryview]:
    """`buffers` without virtio's header, wherever the driver cut them."""
    skip = HEADER
    rest = []
    for buffer in buffers:
        if skip >= len(buffer):
            skip -= len(buffer)
        else:
            rest.append(buffer[skip:])
            skip = 0
    return rest


class _SocketBackend(NetBackend):
    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=adopt(fd))

    def fd(self, pair: int) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


class DatagramBackend(_SocketBackend):
    """One frame a message."""

    kind = "dgram"

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._buffer = bytearray(HEADER + MAX_FRAME)
        self._frame_part = memoryview(self._buffer)[HEADER:]

    def receive(self, pair: int, buffers: Sequence[memoryview]) -> int:
        try:
            size = self._socket.recv_into(self._frame_part)
        except OSError as error:
            if gone(error):
                raise BackendGone("the network socket's peer closed it") from error
            raise
        if not size:
            if self._socket.type == socket.SOCK_SEQPACKET:
                raise BackendGone("the network socket's peer closed it")
            return 0
        return scatter(memoryview(self._buffer)[: HEADER + size], buffers)

    def send(self, pair: int, buffers: Sequence[memoryview]) -> None:
        try:
            self._socket.sendmsg(_frame(buffers))
        except OSError as error:
            if gone(error) or error.errno == errno.ECONNREFUSED:
                raise BackendGone("the network socket's peer closed it") from error
            raise


class StreamBackend(_SocketBackend):
    """Frames behind their lengths. The peer is bounded too: a length that no frame has ends the connection."""

    kind = "stream"

    def __init__(self, fd: int, listener: ListenBackend | None = None) -> None:
        """`listener`: who waits for the next peer when this one has gone."""
        super().__init__(fd)
        self._listener = listener
        self._in = bytearray(_ROOM)
        self._start = self._end = 0  # what of it is received and not yet delivered
        self._out = b""  # the rest of a frame that the socket took in part

    def receive(self, pair: int, buffers: Sequence[memoryview]) -> int:
        while True:
            have = self._end - self._start
            if have >= 4:
                (size,) = _LENGTH.unpack_from(self._in, self._start)
                if not 0 < size <= MAX_FRAME:
                    raise BackendGone(f"the network socket's peer announced a frame of {size} bytes")
                if have >= 4 + size:
                    begin = self._start + 4
                    self._start = begin + size
                    head = scatter(_NO_HEADER, buffers)
                    frame = memoryview(self._in)[begin : begin + size]
                    return head + scatter(frame, _frame(buffers))
            if self._start:
                self._in[:have] = self._in[self._start : self._end]
                self._start, self._end = 0, have
            try:
                count = self._socket.recv_into(memoryview(self._in)[self._end :])
            except OSError as error:
                if gone(error):
                    raise BackendGone("the network socket's peer closed it") from error
                raise
            if not count:
                raise BackendGone("the network socket's peer closed it")
            self._end += count

    def send(self, pair: int, buffers: Sequence[memoryview]) -> None:
        self.flush()
        frame = _frame(buffers)
        size = sum(map(len, frame))
        try:
            sent = self._socket.sendmsg([_LENGTH.pack(size), *frame])
        except OSError as error:
            if gone(error):
                raise BackendGone("the network socket's peer closed it") from error
            raise
        if sent < 4 + size:  # in part: the rest is copied and goes first next time
            self._out = (_LENGTH.pack(size) + b"".join(frame))[sent:]

    def flush(self) -> None:
        try:
            while self._out:
                self._out = self._out[self._socket.send(self._out) :]
        except OSError as error:
            if gone(error):
                raise BackendGone("the network socket's peer closed it") from error
            raise

    @property
    def unsent(self) -> bool:
        return bool(self._out)

    def successor(self) -> NetBackend | None:
        listener, self._listener = self._listener, None
        return listener

    def close(self) -> None:
        super().close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    @classmethod
    def connect(cls, path: str) -> StreamBackend:
        """Connect to a listening Unix socket, passt's for example. HostError if nobody listens."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            client.connect(path)
        except OSError as error:
            client.close()
            raise HostError(
                f"cannot connect the network to {path}: {error.strerror}",
                errno=error.errno or 0,
                remedy="start passt first: passt --socket PATH",
            ) from error
        return cls(client.detach())


class ListenBackend(_SocketBackend):
    """Nobody is there yet. It ends when somebody connects, and that connection takes its place."""

    kind = "stream"
    carrier = False

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._peer: StreamBackend | None = None

    def receive(self, pair: int, buffers: Sequence[memoryview]) -> int:
        client, _ = self._socket.accept()
        self._peer = StreamBackend(client.detach(), self)
        raise BackendGone("the network socket has a peer")

    def send(self, pair: int, buffers: Sequence[memoryview]) -> None:
        raise OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))

    def successor(self) -> NetBackend | None:
        return self._peer

    def close(self) -> None:
        if self._peer is None:  # else it has the listening socket from now on
            super().close()
        self._peer = None


def socket_backend(fd: int) -> NetBackend:
    """The backend for a passed socket, by its type. HostError if it is none."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise HostError(f"descriptor {fd} is no socket", errno=errno.ENOTSOCK)
    with socket.socket(fileno=os.dup(fd)) as probe:
        kind = probe.type
        listens = bool(probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    if kind != socket.SOCK_STREAM:
        return DatagramBackend(fd)
    if not listens:
        return StreamBackend(fd)
    waiting = ListenBackend(fd)
    try:
        waiting.receive(0, ())
    except BlockingIOError:
        return waiting
    except BackendGone:  # somebody is there already
        return waiting.successor() or waiting
    return waiting
