"""The process that gives an incoming machine the pages that it touches and that have not come yet: post-copy.

A fork of the VMM, made before the guest runs. It holds the userfaultfd, the connections to the source and nothing else;
the VMM's memory it reaches through the userfaultfd alone. A thread of the VMM could not do this: it would need the
interpreter's lock, which a thread that waits for a page may hold.

    fault at a page that is missing   -> REQUEST to the source, on the channel that the page belongs to
    fault at any other page           -> nothing was ever there: zeroes
    PAGES, ZERO from the source       -> put in, who waits is woken, the page's bit is cleared

What is missing is a bitmap that the VMM sees too (`sender.Board`); only this process writes to it. When a connection
ends too early, everything stays as it is, and the source may connect anew: it shows the token of the first connection,
and is told what is missing. docs/internals/vmm-state.md.
"""

from __future__ import annotations

import ctypes
import hmac
import mmap
import select
import socket
import struct

from kvik.errors import KvikError, OperationFailed
from kvik.vmm.layout import PAGE
from kvik.vmm.state import stream
from kvik.vmm.state.dirty import all_set, clear_run
from kvik.vmm.state.helper import fork_helper

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.vmm.memory import Region
    from kvik.vmm.state.sender import Board
    from kvik.vmm.state.userfaultfd import Userfaultfd

__all__ = [
    "COMPLETE",
    "FAIL",
    "FAULTED",
    "LISTEN",
    "LOST",
    "RECOVERED",
    "SAY_DONE",
    "STARTED",
    "WANT",
    "Pager",
    "start",
]

# Messages from the VMM (a datagram each): restored; it cannot be, with a text; a thread waits for the page of an
# address; listen here, with a descriptor.
SAY_DONE, FAIL, WANT, LISTEN = b"D", b"F", b"W", b"L"
# And to it: the guest may run; the connection is lost, with a text; it is there again; all of RAM is here; I cannot go
# on, with a text.
STARTED, LOST, RECOVERED, COMPLETE, FAULTED = b"g", b"l", b"b", b"c", b"e"
MAX_MESSAGE = 4096
_TURN = 16  # frames of one channel before others, and faults, are looked at
PATIENCE = 5.0  # seconds that a connection has for its greeting


class _Channel:
    """One connection, never waited for: frames come in parts, requests leave as there is room."""

    def __init__(self, number: int, sock: socket.socket) -> None:
        self.number, self.sock = number, sock
        self.waiting = bytearray()  # to be sent
        self._header = bytearray(stream.FRAME_SIZE)
        buffer = mmap.mmap(-1, stream.PIECE)
        self._buffer = memoryview(buffer)
        self.address = ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))
        self._frame = (0, 0, 0)
        self._next: memoryview = memoryview(self._header)  # what is still to come of header or data
        self._in_data = False
        stream.prepare_postcopy(sock)
        sock.setblocking(False)

    def send(self, data: bytes) -> None:
        self.waiting += data
        self.flush()

    def flush(self) -> None:
        while self.waiting:
            try:
                count = self.sock.send(self.waiting)
            except BlockingIOError:
                return
            del self.waiting[:count]

    def receive(self) -> tuple[int, int, int] | None:
        """The next frame that is complete, its data at `address`; None: not yet."""
        while True:
            while self._next:
                try:
                    count = self.sock.recv_into(self._next)
                except BlockingIOError:
                    return None
                if not count:
                    raise OperationFailed("the source closed the connection")
                self._next = self._next[count:]
            if not self._in_data:
                self._frame = stream.parse(self._header)
                kind, size, _ = self._frame
                if kind == stream.PAGES:
                    if not 0 < size <= stream.PIECE or size % PAGE:
                        raise OperationFailed(f"{size} bytes of pages at once cannot be")
                    self._next, self._in_data = self._buffer[:size], True
                    continue
            self._next, self._in_data = memoryview(self._header), False
            return self._frame


class Pager:
    """The loop of the process. `channels` as they are after the source's STATE, none after a restart."""

    def __init__(
        self,
        board: Board,
        uffd: Userfaultfd,
        ranges: list[tuple[int, int]],
        channels: list[socket.socket],
        *,
        token: bytes,
        orders: socket.socket,
        listener: socket.socket | None = None,
        running: bool = False,
    ) -> None:
        self.board, self.uffd, self.ranges, self.orders, self.listener = board, uffd, ranges, orders, listener
        self._regions: list[Region] = board.regions
        self._token, self._running = token, running
        self._channels = [_Channel(number, sock) for number, sock in enumerate(channels)]
        self._lost = not channels
        self._left = board.pages
        self._requested: set[int] = set()  # guest-physical addresses
        self._coming: dict[int, socket.socket] = {}  # connections made anew, before all are there
        self._count = 0  # how many they will be
        self._complete = False
        self._half = board.half  # what the one before was killed at: parts of it are there, and still on the map
        self._poll = select.poll()

    def run(self) -> None:
        """Until the VMM ends or closes `orders`."""
        self._poll.register(self.uffd.fd, select.POLLIN)
        self._poll.register(self.orders, select.POLLIN)
        for channel in self._channels:
            self._poll.register(channel.sock, select.POLLIN)
        self._wake()
        self._listen()
        while self._turn():
            pass

    def _turn(self) -> bool:
        for channel in self._channels:
            self._poll.modify(channel.sock, select.POLLIN | (select.POLLOUT if channel.waiting else 0))
        ready = {fd for fd, _ in self._poll.poll()}
        if self.uffd.fd in ready:
            for address in self.uffd.faults():
                self._fault(address)
        if self.orders.fileno() in ready and not self._order():
            return False
        if self.listener is not None and self.listener.fileno() in ready:
            self._accept()
        try:
            for channel in list(self._channels):
                if channel.sock.fileno() in ready:
                    channel.flush()
                    self._read(channel)
            self._finish()
        except (KvikError, OSError) as error:
            self._lose(str(error))
        return True

    # Faults ------------------------------------------------------------------------------------------------------

    def _fault(self, host: int) -> None:
        for index, region in enumerate(self._regions):
            if region.address <= host < region.address + region.size:
                offset = host - region.address
                if all_set(self.board.bitmap(index), offset // PAGE, 1):
                    self._request(region.start + offset)
                else:
                    self.uffd.zero(host, PAGE, again=True)  # two may have touched it
                return

    def _request(self, address: int) -> None:
        """Ask the source for a page, once."""
        for index, region in enumerate(self._regions):
            if region.start <= address < region.end:
                offset = (address - region.start) & -PAGE
                page = region.start + offset
                if self._lost or page in self._requested or not all_set(self.board.bitmap(index), offset // PAGE, 1):
                    return
                self._requested.add(page)
                self.board.count_request()
                channel = self._channels[offset // stream.CHUNK % len(self._channels)]
                try:
                    channel.send(stream.frame(stream.REQUEST, 1, page))
                except OSError as error:
                    self._lose(f"the source is lost: {error.strerror}")
                return

    def _wake(self) -> None:
        """Whoever waits asks again: what was asked for may be lost, or read by one who is no more."""
        self._requested.clear()
        for address, size in self.ranges:
            self.uffd.wake(address, size)

    # What the source sends ---------------------------------------------------------------------------------------

    def _read(self, channel: _Channel) -> None:
        for _ in range(_TURN):
            if self._complete or (frame := channel.receive()) is None:
                return
            kind, size, address = frame
            if kind == stream.PAGES:
                self._put(channel, address, size, channel.address)
            elif kind == stream.ZERO:
                if not 0 < size <= stream.PIECE // PAGE:
                    raise OperationFailed(f"{size} pages of zeroes at once cannot be")
                self._put(channel, address, size * PAGE, 0)
            elif kind == stream.RUN and not channel.number and not self._running:
                self._running = True
                channel.send(stream.frame(stream.RUNNING))
                self.orders.send(STARTED)
            else:
                raise OperationFailed(f"frame {kind} does not belong here")

    def _put(self, channel: _Channel, address: int, size: int, source: int) -> None:
        """Into RAM, where it is missing and nowhere else. `source`: where the data lies here, 0 for zeroes."""
        index = next((i for i, r in enumerate(self._regions) if r.start <= address and address + size <= r.end), -1)
        if index < 0:
            raise OperationFailed(f"{size} bytes at {address:#x} are not all RAM")
        region = self._regions[index]
        offset = address - region.start
        first, count = offset // PAGE, size // PAGE
        block = offset // stream.CHUNK
        mine = block == (offset + size - 1) // stream.CHUNK and block % len(self._channels) == channel.number
        if address % PAGE or not mine or not all_set(self.board.bitmap(index), first, count):
            raise OperationFailed(f"pages came for {address:#x} that were not to come")
        again = address < self._half[1] and self._half[0] < address + size
        self.board.half = address, address + size
        if source:
            self.uffd.copy(region.address + offset, source, size, again=again)
        else:
            self.uffd.zero(region.address + offset, size, again=again)
        clear_run(self.board.bitmap(index), first, count)
        self.board.half = 0, 0
        self.board.count_page(size)
        self._left -= count
        for page in range(address, address + size, PAGE):
            self._requested.discard(page)

    def _finish(self) -> None:
        """All is here and the guest runs: the source may go."""
        if self._left or not self._running or self._complete or not self._channels:
            return
        self._complete = True
        self._last_words(stream.frame(stream.FILLED), stream.SILENCE)
        self._drop()
        self.orders.send(COMPLETE)

    # The connection ----------------------------------------------------------------------------------------------

    def _drop(self) -> None:
        for channel in self._channels:
            self._poll.unregister(channel.sock)
            channel.sock.close()
        self._channels = []

    def _lose(self, text: str) -> None:
        if self._lost or self._complete:
            return
        self._drop()
        self._lost = True
        message = text.encode()[: MAX_MESSAGE - 1]
        self.orders.send((LOST if self._running else FAULTED) + message)
        self._listen()

    def _listen(self) -> None:
        """The source may come again, as long as it is lost and the guest runs here."""
        if self.listener is not None and self._lost and self._running:
            self.listener.setblocking(False)
            self._poll.register(self.listener, select.POLLIN)

    def _accept(self) -> None:
        assert self.listener is not None
        sock = None
        try:
            sock, _ = self.listener.accept()
            sock.settimeout(PATIENCE)
            number, count, token = stream.receive_greeting(sock)
            if not hmac.compare_digest(token, self._token):
                raise OperationFailed("a stranger")
            if number in self._coming or count != self._count:  # an attempt that was given up, and another
                self._forget_coming()
            self._coming[number], self._count = sock, count
            if len(self._coming) == count:
                self._recover()
        except (KvikError, OSError):
            if sock is not None and sock not in self._coming.values():
                sock.close()

    def _forget_coming(self) -> None:
        for sock in self._coming.values():
            sock.close()
        self._coming.clear()

    def _recover(self) -> None:
        """All connections of the source are there again: say what is missing, and go on."""
        sockets = [self._coming[number] for number in sorted(self._coming)]
        try:
            kind, _, _ = stream.receive_frame(sockets[0])
            if kind != stream.RESUME:
                raise OperationFailed("it does not go on with this migration")
            sockets[0].settimeout(stream.SILENCE)
            for index, region in enumerate(self._regions):
                bitmap = self.board.bitmap(index)
                sockets[0].sendall(stream.frame(stream.MISSING, len(bitmap), region.start))
                sockets[0].sendall(bitmap)
        except (KvikError, OSError):
            self._forget_coming()
            return
        self._coming.clear()
        assert self.listener is not None
        self._poll.unregister(self.listener)
        self._channels = [_Channel(number, sock) for number, sock in enumerate(sockets)]
        for channel in self._channels:
            self._poll.register(channel.sock, select.POLLIN)
        self._lost = False
        self.orders.send(RECOVERED)
        self._wake()

    # The VMM -----------------------------------------------------------------------------------------------------

    def _order(self) -> bool:
        message, descriptors, _, _ = socket.recv_fds(self.orders, MAX_MESSAGE, 1)
        word, data = message[:1], message[1:]
        if not word:
            return False
        if word == WANT:
            self._request(struct.unpack("<Q", data)[0])
        elif word == LISTEN:
            if self.listener is not None:
                if self._lost and self._running:
                    self._poll.unregister(self.listener)
                self.listener.close()
            self.listener = socket.socket(fileno=descriptors[0])
            self._forget_coming()
            self._listen()
        elif word == SAY_DONE:
            try:
                for channel in self._channels[:1]:
                    channel.send(stream.frame(stream.DONE))
            except OSError as error:
                self._lose(f"the source is lost: {error.strerror}")
        elif word == FAIL:
            self._last_words(stream.frame(stream.FAILED, len(data)) + data, PATIENCE)
            return False
        return True

    def _last_words(self, data: bytes, seconds: float) -> None:
        """On each channel: who sends there must not take the end for a loss."""
        for channel in self._channels:
            channel.sock.settimeout(seconds)
            try:
                channel.sock.sendall(channel.waiting + data)
            except OSError:
                pass  # then it does not know


def start(make: Callable[[socket.socket], Pager], keep: list[int]) -> tuple[int, int, socket.socket]:
    """Fork one; (pid, a pidfd, the VMM's end of `orders`). `make` is called in the new process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def run() -> None:
        try:
            make(theirs).run()
        except BaseException as error:
            theirs.send(FAULTED + f"{type(error).__name__}: {error}".encode()[: MAX_MESSAGE - 1])

    pid, pidfd = fork_helper(run, [*keep, theirs.fileno()])
    theirs.close()
    return pid, pidfd, ours


def bitmaps_fit(regions: list[Region], bitmaps: dict[int, bytes]) -> bool:
    """Whether there is one for each region, and no bit in it behind the region's end."""
    return all(
        region.start in bitmaps and not int.from_bytes(bitmaps[region.start], "little") >> region.size // PAGE
        for region in regions
    ) and len(bitmaps) == len(regions)
