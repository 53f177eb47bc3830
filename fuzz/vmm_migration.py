"""Hostile ends of a live migration: the stream that fills a machine, the pages of post-copy, who asks for pages.

    fuzz/run migration-incoming --operations 1000000 --seed 5

What a peer sends ends in RAM where it was to come, or ends the migration with an error; nothing else.
"""

from __future__ import annotations

import _thread
import os
import random
import signal
import socket
import struct
from typing import Any

from vmm_devices import GROWTH, ROUND, STUCK, _stuck, resident

from kvik.errors import KvikError
from kvik.vmm.layout import MIB, PAGE
from kvik.vmm.memory import GuestMemory
from kvik.vmm.state import pager, stream
from kvik.vmm.state.capture import MALFORMED
from kvik.vmm.state.dirty import all_set
from kvik.vmm.state.incoming import Incoming
from kvik.vmm.state.sender import Board, Sender
from kvik.vmm.state.values import encode

TARGETS = ("migration-incoming", "migration-pages", "migration-requests")
SIZE = 4 * MIB
KINDS = (*range(1, 9), *range(16, 22), 0, 99, 255)
SIZES = (0, 1, 15, 16, 17, 512, PAGE, 4 * PAGE, stream.PIECE, stream.PIECE + PAGE, stream.CHUNK, SIZE, 2**31, 2**32 - 1)
ADDRESSES = (0, PAGE, 100, stream.CHUNK - PAGE, stream.CHUNK, SIZE - PAGE, SIZE, 2**32, 2**63, 2**64 - 1)
MOST = 1 << 16  # bytes of one frame that the fuzzer itself sends: a socket holds them


def frame(dice: random.Random) -> bytes:
    """One that could be, mostly; its data with it where that is small."""
    kind = dice.choice(KINDS)
    size = dice.choice(SIZES)
    address = dice.randrange(SIZE // PAGE) * PAGE if dice.random() < 0.8 else dice.choice(ADDRESSES)
    if dice.random() < 0.6:
        kind = dice.choice((stream.PAGES, stream.ZERO, stream.REQUEST))
        size = dice.choice((1, 2, 16)) * (PAGE if kind == stream.PAGES else 1)
    if kind == stream.MISSING and dice.random() < 0.8:
        size, address = SIZE // PAGE // 8, 0
    data = stream.frame(kind, size, address)
    if dice.random() < 0.02:
        return bytes(dice.randrange(256) for _ in range(dice.randrange(1, 40)))
    if kind in (stream.PAGES, stream.MISSING, stream.HEADER, stream.STATE) and size <= MOST:
        data += dice.randbytes(size) if dice.random() < 0.5 else bytes(size)
    return data


class _Loop:
    def call_soon(self, callback: Any) -> None: ...


class _Machine:
    """What the channels of a migration see of a machine."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory, self.loop, self.devices = memory, _Loop(), {}

    def log(self, text: str) -> None: ...


class _Ability:
    def check(self, machine: Any) -> None: ...


class _Receiver(Incoming):
    """The part that reads a channel, with a header that any machine would take."""

    def __init__(self, machine: Any) -> None:
        self.machine, self.status = machine, "active"
        self.ability: Any = _Ability()
        self.received = self._ended = 0
        self._count = 1
        self._state = None
        self._missing = {}
        self._lock = _thread.allocate_lock()

    def _check(self, header: Any) -> None: ...


def _incoming(dice: random.Random, memory: GuestMemory) -> int:
    """One stream, from its header to wherever it comes."""
    receiver = _Receiver(_Machine(memory))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        head = encode({})
        data = stream.frame(stream.HEADER, len(head)) + head if dice.random() < 0.95 else b""
        for _ in range(dice.randrange(6)):
            data += frame(dice)
            if dice.random() < 0.2:
                data += stream.frame(stream.END)
        theirs.setblocking(False)
        try:
            theirs.send(data)
        except BlockingIOError:
            return 0
        theirs.shutdown(socket.SHUT_WR)
        try:
            receiver._receive(0, ours)
        except (KvikError, OSError, MemoryError, *MALFORMED):
            return 1
    return 0


class _Uffd:
    """Puts pages where the real one would; and checks that they were to come."""

    fd = -1

    def __init__(self, board: Board) -> None:
        self.board = board

    def _placed(self, address: int, size: int, again: bool = False) -> None:
        region = self.board.regions[0]
        offset = address - region.address
        assert size > 0 and not offset % PAGE and not size % PAGE and 0 <= offset <= region.size - size, (offset, size)
        assert all_set(self.board.bitmap(0), offset // PAGE, size // PAGE), "a page that was not missing"

    def copy(self, address: int, source: int, size: int, again: bool = False) -> None:
        self._placed(address, size)
        assert size <= stream.PIECE

    zero = _placed

    def wake(self, address: int, size: int) -> None: ...


def _pages(dice: random.Random, memory: GuestMemory) -> int:
    """A source in post-copy, up to its first lie."""
    board = Board(memory.regions, 1)
    board.bitmap(0)[:] = dice.choice((bytes([255]), dice.randbytes(1))) * len(board.bitmap(0))
    channels = [socket.socketpair() for _ in range(dice.choice((1, 2)))]
    orders, vmm = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one = pager.Pager(
        board,
        _Uffd(board),  # type: ignore[arg-type]  # answers as a Userfaultfd, with no kernel behind it
        [],
        [ours for ours, _ in channels],
        token=bytes(16),
        orders=orders,
        running=dice.random() < 0.5,
    )
    for channel in one._channels:
        one._poll.register(channel.sock)
    lied = 0
    try:
        for _ in range(dice.randrange(1, 12)):
            chance = dice.random()
            before = board.pages
            channel = dice.choice(one._channels)
            if chance < 0.15:
                vmm.send(pager.WANT + struct.pack("<Q", dice.choice((*ADDRESSES, dice.randrange(SIZE)))))
                one._order()
            else:
                channels[channel.number][1].setblocking(False)
                try:
                    channels[channel.number][1].send(frame(dice))
                except BlockingIOError:
                    break
                one._read(channel)
            assert board.pages <= before and one._left == board.pages
            one._finish()
            if not one._channels:
                break
    except (KvikError, OSError) as error:
        one._lose(str(error))
        lied = 1
        assert one._lost and not one._channels
    finally:
        for ours, theirs in channels:
            ours.close()
            theirs.close()
        orders.close()
        vmm.close()
        board.close()
    return lied


def _requests(dice: random.Random, memory: GuestMemory, own: int) -> int:
    """A destination in post-copy: asks for what it likes."""
    board = Board(memory.regions, dice.choice((1, 2)))
    board.bitmap(0)[:] = bytes([255]) * len(board.bitmap(0))
    ours, theirs = socket.socketpair()
    orders, vmm = socket.socketpair()
    sender = Sender(board, 0, ours, own, orders)
    sender.prepare()
    sender._serving, sender._left = True, sender._mine()
    with ours, theirs, orders, vmm:
        for sock in (ours, theirs, orders):
            sock.settimeout(1)
        learning = dice.random() < 0.2
        data = b"".join(frame(dice) for _ in range(dice.randrange(1, 4)))
        theirs.setblocking(False)
        try:
            theirs.send(data)
        except BlockingIOError:
            return 0
        theirs.shutdown(socket.SHUT_WR)
        try:
            while True:
                if learning:
                    sender._receive_map()
                else:
                    sender._hear()
                    assert sender._left == sender._mine()
        except (KvikError, OSError):
            return 1
    return 0


def fuzz(name: str, operations: int, seed: int) -> int:
    """How many peers were refused. Raises what should have been dealt with."""
    before = signal.signal(signal.SIGALRM, _stuck)
    dice, refused, start = random.Random(seed), 0, 0
    memory = GuestMemory.allocate(SIZE)
    own = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for number in range(operations):
            if number % ROUND == 0:
                signal.alarm(STUCK)
                if number == 20 * ROUND:
                    start = resident()
                elif start and resident() - start > GROWTH:
                    raise MemoryError(f"{(resident() - start) >> 20} MiB more after {number} operations")
            if name == "migration-incoming":
                refused += _incoming(dice, memory)
            elif name == "migration-pages":
                refused += _pages(dice, memory)
            else:
                refused += _requests(dice, memory, own)
        return refused
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        os.close(own)
        memory.close()


__all__ = ["TARGETS", "fuzz"]
