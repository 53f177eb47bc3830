"""NBD clients of the disks' backups, on kvik-blk's loop: a piece of an answer each turn, between the guest's requests.

All disks of a backup have one listening socket, and each is in a process of its own. One of them, the front, accepts.
A client that asks for another's export is handed over with what it said so far: by the front to whoever has it, by any
other to the front.
"""

from __future__ import annotations

import os
import socket
from functools import partial

from kvik.errors import KvikError
from kvik.vmm.blk import nbd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from kvik.vmm.blk.nbd_export import Export
    from kvik.vmm.loop import EventLoop

__all__ = ["NbdServer"]

MAX_CLIENTS = 64
CHOOSES = 10.0  # seconds until a client has to have chosen an export
READS = 64 << 10  # bytes that are taken in at once, and kept
_STATE = 3  # bytes of `Handshake.state`


class NbdServer:
    """Serves `exports` of this process. `names`: of all exports there are. `listening`: a socket (-1: another process
    is the front). `links`: sockets to the other processes (SOCK_SEQPACKET), by the exports that are reached so; the
    descriptors become the server's."""

    def __init__(
        self,
        loop: EventLoop,
        exports: Mapping[str, Export],
        names: Sequence[str],
        *,
        listening: int,
        links: Mapping[str, int],
        log: Callable[[str], object],
    ) -> None:
        self.loop, self.exports, self.names, self._log = loop, exports, names, log
        self._clients: set[_Client] = set()
        self._listener = socket.socket(fileno=listening) if listening >= 0 else None
        sockets = {fd: socket.socket(fileno=fd) for fd in set(links.values())}
        self._links = {name: sockets[fd] for name, fd in links.items()}
        self._sockets = list(sockets.values())
        if self._listener is not None:
            self._listener.setblocking(False)
            loop.add_reader(self._listener.fileno(), self._accept)
        for link in self._sockets:
            link.setblocking(False)
            loop.add_reader(link.fileno(), partial(self._take_over, link))

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            self.loop.hold_reader(self._listener.fileno())
            return
        self._begin(sock, b"", b"")

    def _begin(self, sock: socket.socket, state: bytes, data: bytes) -> None:
        if len(self._clients) >= MAX_CLIENTS:
            self._log(f"an NBD client was sent away: {MAX_CLIENTS} are there")
            sock.close()
            return
        self._clients.add(_Client(self, sock, state, data))

    # From one process to another ---------------------------------------------------------------------------------

    def hand_over(self, sock: socket.socket, handshake: nbd.Handshake) -> None:
        """Raises OSError, `ProtocolError`; the caller closes its descriptor in any case."""
        link = self._links.get(handshake.elsewhere)
        if link is None:
            raise nbd.ProtocolError(f"nobody has the export {handshake.elsewhere!r}")
        socket.send_fds(link, [handshake.state + handshake.data], [sock.fileno()])

    def _take_over(self, link: socket.socket) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(link, _STATE + nbd.MAX_OPTION + 2 * READS, 1)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if len(data) <= _STATE or len(fds) != 1:
            for fd in fds:
                os.close(fd)
            if not data:  # the other process has ended
                self.loop.remove_reader(link.fileno())
            return
        self._begin(socket.socket(fileno=fds[0]), data[:_STATE], data[_STATE:])

    # The end -----------------------------------------------------------------------------------------------------

    def gone(self, client: _Client, why: str) -> None:
        self._clients.discard(client)
        if why:
            self._log(f"an NBD client was sent away: {why}")

    def close(self) -> None:
        """No client reads any more."""
        for client in list(self._clients):
            client.close("")
        for sock in (*self._sockets, *([self._listener] if self._listener is not None else [])):
            self.loop.remove_reader(sock.fileno())
            sock.close()


class _Client:
    """One connection. What a turn makes is sent before the next one; while it is not, nothing is taken in."""

    def __init__(self, server: NbdServer, sock: socket.socket, state: bytes, data: bytes) -> None:
        self._server, self._socket, self._fd = server, sock, sock.fileno()
        sock.setblocking(False)
        self._handshake = nbd.Handshake(server.exports, server.names, state=state)
        self._in = self._handshake.data
        self._in += data
        self._out = memoryview(b"")
        self._export: Export | None = None
        self._work: Iterator[bytes] | None = None  # the rest of an answer
        self._skip = 0  # bytes that a request has behind it, and that nobody wants
        self._again = self._reading = self._writing = False
        self._patience = server.loop.call_later(CHOOSES, self._late)
        self._soon()

    def _late(self) -> None:
        if self._export is None:
            self.close("it chose no export")

    def _soon(self) -> None:
        if not self._again:
            self._again = True
            self._server.loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._again = False
        if self._fd < 0:
            return
        try:
            self._send()
            if not self._out and self._fd >= 0:
                self._make()
                self._send()
        except (KvikError, OSError) as error:
            self.close(str(error))
        if self._fd >= 0:
            self._watch()

    def _watch(self) -> None:
        """For what the next turn needs."""
        loop = self._server.loop
        writing = bool(self._out)
        reading = not writing and self._work is None and len(self._in) < nbd.MAX_OPTION + READS
        if writing != self._writing:
            self._writing = writing
            loop.add_writer(self._fd, self._turn) if writing else loop.remove_writer(self._fd)
        if reading != self._reading:
            self._reading = reading
            loop.add_reader(self._fd, self._readable) if reading else loop.remove_reader(self._fd)

    def _readable(self) -> None:
        try:
            data = self._socket.recv(READS)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(str(error))
            return
        if not data:
            self.close("")
            return
        self._in += data
        self._turn()

    def _send(self) -> None:
        try:
            while self._out:
                self._out = self._out[self._socket.send(self._out) :]
        except BlockingIOError:
            return

    def _make(self) -> None:
        """The next piece of what is to be sent; there is none where more must come first. Raises `KvikError`,
        OSError."""
        if self._export is None:
            self._shake_hands()
        elif self._work is not None:
            piece = next(self._work, None)
            if piece is None:
                self._work = None
            else:
                self._out = memoryview(piece)
            self._soon()
        elif self._skip:
            count = min(self._skip, len(self._in))
            del self._in[:count]
            self._skip -= count
            if count:
                self._soon()
        else:
            self._next_request(self._export)

    def _shake_hands(self) -> None:
        handshake = self._handshake
        stepped = handshake.step()
        if handshake.output:
            self._out = memoryview(bytes(handshake.output))
            handshake.output.clear()
            self._soon()
        elif handshake.ended:
            self.close("")
        elif handshake.elsewhere:
            self._server.hand_over(self._socket, handshake)
            self.close("")
        elif stepped:
            self._soon()
        if handshake.chosen:
            self._export = self._server.exports[handshake.chosen]
            self._patience.cancel()

    def _next_request(self, export: Export) -> None:
        request = nbd.Request.take(self._in)
        if request is None:
            return
        if request.type == nbd.DISCONNECT:
            self.close("")
            return
        if request.type == nbd.WRITE:
            if request.length > nbd.MAX_LENGTH:
                raise nbd.ProtocolError(f"a write of {request.length} bytes")
            self._skip = request.length
        handshake = self._handshake
        self._work = export.answer(request, handshake.contexts, structured=handshake.structured)
        self._soon()

    def close(self, why: str) -> None:
        if self._fd < 0:
            return
        loop = self._server.loop
        loop.remove_reader(self._fd)
        loop.remove_writer(self._fd)
        self._fd = -1
        self._patience.cancel()
        self._server.gone(self, why)
        self._socket.close()
