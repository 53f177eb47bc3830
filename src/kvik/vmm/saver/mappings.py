"""Where RAM is: in the VMM, whose word counts, and in each other process that has it mapped. All that they say is
checked: the VMM may have been taken over by its guest."""

from __future__ import annotations

import json
import os
import socket

from kvik.errors import HostError, OperationFailed
from kvik.vmm.layout import PAGE
from kvik.vmm.state.protection import MAX_MESSAGE, without
from kvik.vmm.state.stream import CHUNK
from kvik.vmm.state.userfaultfd import Userfaultfd
from kvik.vmm.state.values import Fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Mapping", "Memory", "Piece", "hear"]

MAX_FDS = 253  # SCM_MAX_FD
_MAX_ADDRESS = 1 << 52
Piece = tuple[int, int]  # guest-physical address and bytes


def hear(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What a process says, once, and the descriptors that came with it: the caller's."""
    data, fds, flags, _ = socket.recv_fds(channel, MAX_MESSAGE, MAX_FDS)
    try:
        if not data:
            raise OperationFailed("a process that has the memory mapped has ended")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise OperationFailed("what is said of the memory is too long")
        told = json.loads(data)
        if not isinstance(told, dict) or not fds:
            raise OperationFailed("what is said of the memory is malformed")
    except (ValueError, RecursionError, OperationFailed) as error:
        for fd in fds:
            os.close(fd)
        if isinstance(error, OperationFailed):
            raise
        raise OperationFailed("what is said of the memory is malformed") from error
    return told, fds


class Mapping:
    """One process's mappings, and the descriptor by which writes to them are let through."""

    def __init__(self, told: dict[str, Any], fd: int, channel: socket.socket) -> None:
        self.channel = channel
        self.uffd = Userfaultfd.of(fd)
        self.regions = sorted((start, size, at) for start, size, at in _numbers(told, "regions", 3))
        end = 0
        for start, size, address in self.regions:
            if start < end or not size or (start | size | address) % PAGE:
                raise OperationFailed("what is said of the memory is malformed")
            end = start + size

    def here(self, address: int) -> int:
        """Where that process has a guest-physical address."""
        for start, size, at in self.regions:
            if start <= address < start + size:
                return at + address - start
        raise OperationFailed(f"a process has no memory at {address:#x} mapped")

    def guest(self, here: int) -> int:
        for start, size, at in self.regions:
            if at <= here < at + size:
                return start + here - at
        raise OperationFailed(f"a process waits at {here:#x}, which is no guest memory of its")


class Memory:
    """RAM as the VMM says it is, read piece by piece. `head`, `tail`: the stream before and behind the pages."""

    def __init__(self, told: dict[str, Any], fds: list[int], channel: socket.socket) -> None:
        if len(fds) < 4:
            raise OperationFailed("descriptors of the machine's memory are missing")
        self.mapping = Mapping(told, fds[0], channel)
        self._memory, self.head, self.tail = fds[1:4]
        self.first = Fields(told, "the VMM").number("first", 0, 1 << 31)
        files = _numbers(told, "files", 2)
        if len(files) != len(fds) - 4:
            raise OperationFailed("descriptors of the machine's memory are missing")
        self._files = {start: (fd, offset) for (start, offset), fd in zip(files, fds[4:], strict=True)}
        self.pieces: dict[int, list[Piece]] = {}  # by multiple of CHUNK
        self.protected: list[Piece] = []  # as large as can be
        left = [(address, size) for address, size in _numbers(told, "left", 2)]
        for start, size, _ in self.mapping.regions:
            for begin, end in without(start, start + size, left):
                self.protected.append((begin, end - begin))
                while begin < end:
                    stop = min((begin // CHUNK + 1) * CHUNK, end)
                    self.pieces.setdefault(begin // CHUNK, []).append((begin, stop - begin))
                    begin = stop

    def read(self, piece: Piece, buffer: memoryview) -> bool:
        """Fill the front of `buffer`; False if nothing but zeroes was ever there."""
        address, size = piece
        start = next(start for start, length, _ in self.mapping.regions if start <= address < start + length)
        if start in self._files:
            fd, at = self._files[start][0], self._files[start][1] + address - start
            try:
                if os.lseek(fd, at, os.SEEK_DATA) >= at + size:
                    return False
            except OSError:  # ENXIO: a hole to the end
                return False
        else:
            fd, at = self._memory, self.mapping.here(address)
        done = 0
        while done < size:
            try:
                count = os.preadv(fd, [buffer[done:size]], at + done)
            except OSError as error:
                raise HostError(f"the machine's memory cannot be read: {error.strerror}") from error
            if not count:
                raise OperationFailed("the VMM has ended")
            done += count
        return True


def _numbers(told: dict[str, Any], name: str, width: int) -> list[tuple[int, ...]]:
    """Rows of so many numbers."""
    rows = told.get(name)
    if not isinstance(rows, list) or any(
        not isinstance(row, list)
        or len(row) != width
        or any(not isinstance(value, int) or not 0 <= value < _MAX_ADDRESS for value in row)
        for row in rows
    ):
        raise OperationFailed(f"what is said of the memory is malformed: {name}")
    return [tuple(row) for row in rows]
