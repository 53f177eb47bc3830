"""The process that sends RAM while the guest runs: a fork of the VMM, one a channel.

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
import signal
import socket
import struct
import time
from typing import TYPE_CHECKING

from kvik.vmm.layout import PAGE
from kvik.vmm.state.dirty import page_runs
from kvik.vmm.state.memory_file import is_zero
from kvik.vmm.state.stream import CHUNK, END, PAGES, RUN, STATE, ZERO, frame, receive_exactly, receive_frame

if TYPE_CHECKING:
    from kvik.vmm.memory import Region

__all__ = ["Board", "Sender", "fork_sender"]

# Orders to a sender, a byte each; it answers a round with "r", and forwards the destination's frames as
# "a" + kind + length + data; "e" + length + text when it gives up.
ROUND_FRESH, ROUND, LAST, SEND_STATE, SEND_RUN = b"f", b"r", b"l", b"s", b"g"
_SENT, _NORMAL, _ZERO, _FIELDS = 0, 1, 2, 4
_PR_SET_PDEATHSIG = 1
MAX_ANSWER = 1 << 16


class Board:
    """Bandwidth (bytes a second and channel, 0: no limit), figures of each channel, one bitmap a region."""

    def __init__(self, regions: list[Region], channels: int) -> None:
        self.regions, self.channels = regions, channels
        self._places = []
        at = 8 * (1 + _FIELDS * channels)
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

    def add(self, channel: int, field: int, value: int) -> None:
        self.words[1 + _FIELDS * channel + field] += value

    def total(self, field: int) -> int:
        return sum(self.words[1 + _FIELDS * channel + field] for channel in range(self.channels))

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

    def close(self) -> None:
        self.words.release()


class Sender:
    """The loop of one sender process."""

    def __init__(self, board: Board, channel: int, sock: socket.socket, memory: int, orders: socket.socket) -> None:
        self.board, self.channel, self.sock, self.memory, self.orders = board, channel, sock, memory, orders
        self._budget, self._since = 0.0, time.monotonic()

    def run(self, state: int) -> None:
        """Until the orders end. `state`: a memfd with what SEND_STATE sends."""
        buffer = mmap.mmap(-1, CHUNK)
        self._view = memoryview(buffer)
        self._address = ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))
        while order := self.orders.recv(1):
            if order in (ROUND, ROUND_FRESH, LAST):
                self._round(fresh=order == ROUND_FRESH)
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
            else:  # the header was sent before the fork: wait for what the destination says of it
                self._answer()

    def _answer(self) -> None:
        """The destination's next frame, handed on."""
        kind, size, _ = receive_frame(self.sock)
        size = min(size, MAX_ANSWER)
        data = bytearray(size)
        receive_exactly(self.sock, memoryview(data))
        self.orders.sendall(b"a" + struct.pack("<BI", kind, size) + data)

    def _round(self, *, fresh: bool) -> None:
        for index, region in enumerate(self.board.regions):
            for first, count in page_runs(self.board.bitmap(index)):
                start, end = first * PAGE, (first + count) * PAGE
                while start < end:
                    stop = min((start // CHUNK + 1) * CHUNK, end)
                    if (region.start + start) // CHUNK % self.board.channels == self.channel:
                        self._send(region, start, stop - start, fresh=fresh)
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
        limit = self.board.limit
        if limit:
            now = time.monotonic()
            self._budget = min(self._budget + (now - self._since) * limit, limit / 10)
            self._since = now
            if self._budget < 0:
                time.sleep(min(-self._budget / limit, 1.0))
            self._budget -= len(data)
        self.sock.sendall(data)
        self.board.add(self.channel, _SENT, len(data))


def fork_sender(
    board: Board, channel: int, sock: socket.socket, memory: int, state: int
) -> tuple[int, socket.socket, int]:
    """Start one; (pid, the socket for orders and answers, a pidfd). The caller has told the kernel not to let RAM be
    inherited. `sock` is the child's alone afterwards."""
    ours, theirs = socket.socketpair()
    every = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if not pid:
            _child(Sender(board, channel, sock, memory, theirs), state)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, every)
    theirs.close()
    sock.close()
    return pid, ours, os.pidfd_open(pid)


def _child(sender: Sender, state: int) -> None:
    """Never returns. Only this thread is left here: nothing of the machine may be used, and nothing of it is kept."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
        last = 2
        for fd in sorted((sender.sock.fileno(), sender.memory, state, sender.orders.fileno())):
            os.closerange(last + 1, fd)
            last = fd
        os.closerange(last + 1, os.sysconf("SC_OPEN_MAX"))
        sender.run(state)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".encode()[:MAX_ANSWER]
        try:
            sender.orders.sendall(b"e" + struct.pack("<I", len(text)) + text)
        except OSError:
            pass
    finally:
        os._exit(0)
