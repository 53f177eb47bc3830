"""The process that sends RAM while the guest runs: a fork of the VMM, one a channel.

In post-copy it goes on serving while the guest runs at the destination (`Sender._serve`).

It has an interpreter of its own, so that scanning, copying and sending never make a vCPU's thread wait for the
interpreter's lock. It sees RAM through `/proc/PID/mem`, opened by the VMM of itself before the fork: that works for
private memory and memfds alike and asks for no ptrace rights. RAM itself is not inherited (MADV_DONTFORK): a fork that
did would make every page of the guest copy-on-write. docs/adr/0012-migration-helper.md has the figures.

What both sides share is one anonymous mapping (`Board`): bitmaps of what to send, figures of what was sent.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import socket
import struct
import time

from kvik.errors import OperationFailed
from kvik.vmm.layout import PAGE
from kvik.vmm.state.dirty import all_set, clear_run, page_runs
from kvik.vmm.state.helper import fork_helper
from kvik.vmm.state.memory_file import is_zero
from kvik.vmm.state.stream import (
    CHUNK,
    DONE,
    END,
    FAILED,
    FILLED,
    MISSING,
    PAGES,
    PIECE,
    READY,
    REQUEST,
    RUN,
    RUNNING,
    STATE,
    ZERO,
    frame,
    prepare_postcopy,
    receive_exactly,
    receive_frame,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.memory import Region

__all__ = ["Board", "Sender", "fork_sender"]

# Orders to a sender, a byte each; it answers a round with "r", and forwards the destination's frames as
# "a" + kind + length + data; "e" + length + text when it gives up.
ROUND_FRESH, ROUND, LAST, SEND_STATE, SEND_RUN = b"f", b"r", b"l", b"s", b"g"
# Of post-copy: nothing more before the switch; what is missing and the state; serve; the same
# and send what nobody asks for; learn what is missing there.
END_ROUNDS, SEND_MAP, SERVE, STREAM, RECEIVE_MAP = b"n", b"m", b"p", b"q", b"y"
_SENT, _NORMAL, _ZERO, _REQUESTS, _POSTCOPY, _FIELDS = range(6)
_HEAD = 4  # words before the channels' figures: limit, broken off, `half`
MAX_ANSWER = 1 << 16
_BLOCK = CHUNK // PAGE // 8  # bytes of bitmap of one piece


class Board:
    """Bandwidth (bytes a second and channel, 0: no limit), whether the round shall be broken off, figures of each
    channel, one bitmap a region: a bit is cleared when its page has been sent, by the channel that sends it."""

    def __init__(self, regions: list[Region], channels: int) -> None:
        self.regions, self.channels = regions, channels
        self._places = []
        at = 8 * (_HEAD + _FIELDS * channels)
        for region in regions:
            size = -(-region.size // PAGE // 64) * 8
            self._places.append((at, size))
            at += size
        self._map = mmap.mmap(-1, at)
        self.words = memoryview(self._map).cast("Q")

    def bitmap(self, index: int) -> memoryview:
        start, size = self._places[index]
        return memoryview(self._map)[start : start + size]

    @property
    def limit(self) -> int:
        return self.words[0]

    def set_limit(self, bytes_per_second: int) -> None:
        self.words[0] = -(-bytes_per_second // self.channels)

    @property
    def broken_off(self) -> bool:
        return bool(self.words[1])

    @property
    def half(self) -> tuple[int, int]:
        """Post-copy's destination: (start, end) of the guest-physical addresses that are being put in right now."""
        return self.words[2], self.words[3]

    @half.setter
    def half(self, span: tuple[int, int]) -> None:
        self.words[2], self.words[3] = span

    def count_request(self) -> None:
        self.words[_HEAD + _REQUESTS] += 1

    def count_page(self, size: int) -> None:
        self.words[_HEAD + _POSTCOPY] += size

    def break_off(self) -> None:
        """Let the round that goes on end now; what it did not send stays on the bitmaps."""
        self.words[1] = 1

    @property
    def pages(self) -> int:
        """How many bits are set."""
        return sum(int.from_bytes(self.bitmap(index), "little").bit_count() for index in range(len(self.regions)))

    def add(self, channel: int, field: int, value: int) -> None:
        self.words[_HEAD + _FIELDS * channel + field] += value

    def total(self, field: int) -> int:
        return sum(self.words[_HEAD + _FIELDS * channel + field] for channel in range(self.channels))

    @property
    def sent(self) -> int:
        """Bytes on the wire."""
        return self.total(_SENT)

    @property
    def normal(self) -> int:
        """Pages with data."""
        return self.total(_NORMAL)

    @property
    def zero(self) -> int:
        """Pages of zeroes."""
        return self.total(_ZERO)

    @property
    def requests(self) -> int:
        """Pages that the destination asked for."""
        return self.total(_REQUESTS)

    @property
    def postcopy(self) -> int:
        """Bytes on the wire since the destination runs."""
        return self.total(_POSTCOPY)

    def close(self) -> None:
        self.words.release()


class Sender:
    """The loop of one sender process."""

    def __init__(self, board: Board, channel: int, sock: socket.socket, memory: int, orders: socket.socket) -> None:
        self.board, self.channel, self.sock, self.memory, self.orders = board, channel, sock, memory, orders
        self._budget, self._since = 0.0, time.monotonic()
        self._serving = self._streaming = False
        self._left = 0  # pages of this channel that post-copy has still to send
        self._cursor = (0, 0)  # where it is: region, 2 MiB piece of it

    def prepare(self) -> None:
        """Have room for a piece of RAM."""
        buffer = mmap.mmap(-1, CHUNK)
        self._view = memoryview(buffer)
        self._address = ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))

    def run(self, state: int) -> None:
        """Until the orders end. `state`: a memfd with what SEND_STATE sends."""
        self.prepare()
        while order := self.orders.recv(1):
            if order in (ROUND, ROUND_FRESH, LAST):
                self._round(fresh=order == ROUND_FRESH, last=order == LAST)
                if order == LAST:
                    self.board.words[0] = 0  # the guest stands still: no limit any more
                    self.sock.sendall(frame(END))
                self.orders.sendall(b"r")
            elif order == SEND_STATE:
                size = os.fstat(state).st_size
                self.sock.sendall(frame(STATE, size) + os.pread(state, size, 0))
                self._answer()
            elif order == SEND_RUN:
                self.sock.sendall(frame(RUN))
                self.orders.sendall(b"r")
            elif order == END_ROUNDS:
                self.sock.sendall(frame(END))
                self.orders.sendall(b"r")
            elif order == SEND_MAP:
                for index, region in enumerate(self.board.regions):
                    bitmap = self.board.bitmap(index)
                    self.sock.sendall(frame(MISSING, len(bitmap), region.start))
                    self.sock.sendall(bitmap)
                size = os.fstat(state).st_size
                self.sock.sendall(frame(STATE, size) + os.pread(state, size, 0))
                self._serve()
                return
            elif order in (SERVE, STREAM):
                self._streaming = order == STREAM
                self._serve()
                return
            elif order == RECEIVE_MAP:
                self._receive_map()
                self.orders.sendall(b"r")
            else:  # the header was sent before the fork: wait for what the destination says of it
                self._answer()

    def _answer(self) -> None:
        """The destination's next frame, handed on."""
        kind, size, _ = receive_frame(self.sock)
        self._forward(kind, size)

    def _forward(self, kind: int, size: int) -> None:
        if kind not in (READY, DONE, FAILED, RUNNING, FILLED) or size > (MAX_ANSWER if kind == FAILED else 0):
            raise OperationFailed(f"the destination answered {kind}, with {size} bytes")
        data = bytearray(size)
        receive_exactly(self.sock, memoryview(data))
        self.orders.sendall(b"a" + struct.pack("<BI", kind, size) + data)

    def _round(self, *, fresh: bool, last: bool = False) -> None:
        for index, region in enumerate(self.board.regions):
            bitmap = self.board.bitmap(index)
            for first, count in page_runs(bitmap):
                start, end = first * PAGE, (first + count) * PAGE
                while start < end:
                    stop = min((start // CHUNK + 1) * CHUNK, end)
                    if (region.start + start) // CHUNK % self.board.channels == self.channel:
                        if self.board.broken_off and not last:
                            return
                        self._send(region, start, stop - start, fresh=fresh)
                        clear_run(bitmap, start // PAGE, (stop - start) // PAGE)
                    start = stop

    def _send(self, region: Region, offset: int, size: int, *, fresh: bool) -> None:
        """One piece, within a multiple of CHUNK. `fresh`: the destination has zeroes there anyway."""
        done = 0
        while done < size:
            done += os.preadv(self.memory, [self._view[done:size]], region.address + offset + done)
        if is_zero(self._address, size):
            self._zeroes(region.start + offset, size, fresh)
            return
        start, kind = 0, is_zero(self._address, PAGE)
        for at in range(PAGE, size + PAGE, PAGE):
            if at < size and is_zero(self._address + at, PAGE) == kind:
                continue
            if kind:
                self._zeroes(region.start + offset + start, at - start, fresh)
            else:
                self._pages(region.start + offset + start, self._view[start:at])
            start, kind = at, not kind

    def _zeroes(self, address: int, size: int, fresh: bool) -> None:
        self.board.add(self.channel, _ZERO, size // PAGE)
        if not fresh:
            self._put(frame(ZERO, size // PAGE, address))

    def _pages(self, address: int, data: memoryview) -> None:
        self._put(frame(PAGES, len(data), address))
        self._put(data)
        self.board.add(self.channel, _NORMAL, len(data) // PAGE)

    def _put(self, data: bytes | memoryview) -> None:
        while not self._serving and (delay := self._delay()):
            time.sleep(min(delay, 0.05))  # the limit may be lifted meanwhile
        self.sock.sendall(data)
        self._budget -= len(data)
        self.board.add(self.channel, _SENT, len(data))
        if self._serving:
            self.board.add(self.channel, _POSTCOPY, len(data))

    def _delay(self) -> float:
        """Seconds until the limit of bandwidth allows more."""
        limit, now = self.board.limit, time.monotonic()
        if not limit:
            self._budget, self._since = 0.0, now
            return 0.0
        self._budget = min(self._budget + (now - self._since) * limit, limit / 10)
        self._since = now
        return max(-self._budget / limit, 0.0)

    # Post-copy: the guest runs there, and asks for what it misses ------------------------------------------------

    def _mine(self) -> int:
        """Pages that this channel has still to send."""
        total = 0
        for index, region in enumerate(self.board.regions):
            bitmap = self.board.bitmap(index)
            for block in range(self.channel, -(-region.size // CHUNK), self.board.channels):
                total += int.from_bytes(bitmap[block * _BLOCK : (block + 1) * _BLOCK], "little").bit_count()
        return total

    def _serve(self) -> None:
        """Until the orders end. Pages that are asked for go first, and what is near them next; the limit of bandwidth
        is for those that nobody asked for, which are not sent before the guest may run there."""
        prepare_postcopy(self.sock)
        self._serving, self._left = True, self._mine()
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        poll.register(self.orders, select.POLLIN)
        while True:
            delay = self._delay() * 1000 if self._left and self._streaming else None
            ready = [fd for fd, _ in poll.poll(delay)]
            if self.orders.fileno() in ready:
                order = self.orders.recv(1)
                if not order:
                    return
                self._streaming = True
                if not self.channel:
                    self.sock.sendall(frame(RUN))
            if self.sock.fileno() in ready:
                self._hear()
            elif self._left and self._streaming and not self._delay():
                self._background()

    def _hear(self) -> None:
        kind, size, address = receive_frame(self.sock)
        if kind != REQUEST:
            self._forward(kind, size)
            return
        index, region = self._place(address)
        offset = address - region.start
        self.board.add(self.channel, _REQUESTS, 1)
        bitmap = self.board.bitmap(index)
        if all_set(bitmap, offset // PAGE, 1):  # else it is on its way already
            self._one(index, region, offset, PAGE)
            self._cursor = index, offset // CHUNK

    def _place(self, address: int) -> tuple[int, Region]:
        for index, region in enumerate(self.board.regions):
            if region.start <= address < region.end:
                if address % PAGE or (address - region.start) // CHUNK % self.board.channels != self.channel:
                    break
                return index, region
        raise OperationFailed(f"the destination asks for {address:#x}, which it should not")

    def _one(self, index: int, region: Region, offset: int, size: int) -> None:
        self._send(region, offset, size, fresh=False)
        clear_run(self.board.bitmap(index), offset // PAGE, size // PAGE)
        self._left -= size // PAGE

    def _background(self) -> None:
        """The next piece that nobody asked for."""
        index, block = self._cursor
        while True:
            region = self.board.regions[index]
            if block % self.board.channels == self.channel:
                bits = int.from_bytes(self.board.bitmap(index)[block * _BLOCK : (block + 1) * _BLOCK], "little")
                if bits:
                    break
            block += 1
            if block * CHUNK >= region.size:
                index, block = (index + 1) % len(self.board.regions), 0
        self._cursor = index, block
        first = (bits & -bits).bit_length() - 1
        bits >>= first
        count = min((~bits & (bits + 1)).bit_length() - 1, PIECE // PAGE)
        self._one(index, region, block * CHUNK + first * PAGE, count * PAGE)

    def _receive_map(self) -> None:
        """What the destination still misses, after the connection was lost. It is only told which pages to send."""
        for index, region in enumerate(self.board.regions):
            kind, size, address = receive_frame(self.sock)
            bitmap = self.board.bitmap(index)
            if (kind, size, address) != (MISSING, len(bitmap), region.start):
                raise OperationFailed("the destination does not say what it misses")
            receive_exactly(self.sock, bitmap)
            if int.from_bytes(bitmap, "little") >> region.size // PAGE:
                raise OperationFailed("the destination misses pages that there are not")


def fork_sender(
    board: Board, channel: int, sock: socket.socket, memory: int, state: int
) -> tuple[int, socket.socket, int]:
    """Start one; (pid, the socket for orders and answers, a pidfd). The caller has told the kernel not to let RAM be
    inherited. `sock` is the child's alone afterwards."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        try:
            Sender(board, channel, sock, memory, theirs).run(state)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}".encode()[:MAX_ANSWER]
            theirs.sendall(b"e" + struct.pack("<I", len(text)) + text)

    pid, pidfd = fork_helper(run, [sock.fileno(), memory, state, theirs.fileno()])
    theirs.close()
    sock.close()
    return pid, ours, pidfd
