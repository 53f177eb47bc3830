"""A process's mappings of guest RAM, protected against writing for another process, the saver (`vmm/saver`).

Whoever has RAM mapped writes through page tables of its own: the VMM (with KVM, vhost and io_uring, which use its),
and each kvik-blk that serves one of its disks. Each protects its own mappings, and hands the saver the descriptor that
lets it take the protection away again. None keeps a copy: if the saver is killed the kernel ends all waiting.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket

from kvik.errors import HostError, KvikError, OperationUnsupported
from kvik.vmm.state.userfaultfd import FEATURE_UNPOPULATED, FEATURE_WRITES, Userfaultfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from kvik.vmm.loop import EventLoop
    from kvik.vmm.memory import GuestMemory, Region

__all__ = ["ALL_SAVED", "LET_GO", "MAX_MESSAGE", "Protection", "without"]

ALL_SAVED, LET_GO = b"d", b"k"  # the saver's word when it has everything, and the answer
MAX_MESSAGE = 1 << 16  # bytes
_MADV_POPULATE_READ = 22
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def without(start: int, end: int, parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What is left of [start, end) when `parts`, (address, size), are taken out: (start, end) in order."""
    left = []
    for address, size in sorted(parts):
        if address >= end or address + size <= start:
            continue
        if start < address:
            left.append((start, address))
        start = max(start, address + size)
    return [*left, (start, end)] if start < end else left


class Protection:
    """One attempt, from getting ready (the guest runs) to the saver's last word. `channel`: a connection to the saver;
    `device`: /dev/userfaultfd. Both are taken. `ended` is called when it is over, with why if it failed.

    Raises `OperationUnsupported` where this kernel or this kind of memory cannot be protected."""

    def __init__(
        self, memory: GuestMemory, loop: EventLoop, channel: int, device: int, ended: Callable[[str], None]
    ) -> None:
        self._memory, self._loop, self._ended = memory, loop, ended
        self._channel = socket.socket(fileno=channel)
        self._uffd: Userfaultfd | None = None
        self._watched: list[tuple[Region, int, int]] = []  # region, offset, size
        try:
            if memory.keeper is not None:
                raise OperationUnsupported("the memory of this machine is being saved already")
            self._uffd = Userfaultfd(FEATURE_WRITES, device=device)
            memory.keeper = self.cancel
            self._watch(self._uffd)
        except KvikError as error:
            self.close()
            if isinstance(error, OperationUnsupported):
                raise
            raise OperationUnsupported(f"guest memory cannot be protected against writing here: {error}") from error
        except BaseException:
            self.close()
            raise
        finally:
            os.close(device)
        self._loop.add_reader(self._channel.fileno(), self._heard)

    def _watch(self, uffd: Userfaultfd) -> None:
        for region in self._memory.regions:
            for start, end in without(region.start, region.end, self._memory.mapped):
                at, size = region.address + start - region.start, end - start
                uffd.watch_writes(at, size)
                self._watched.append((region, start - region.start, size))
                # Before 6.4 a private page that is not there cannot be protected: the page of zeroes then is.
                populate = region.fd < 0 and not uffd.features & FEATURE_UNPOPULATED
                if populate and _libc.madvise(at, size, _MADV_POPULATE_READ) < 0:
                    number = ctypes.get_errno()
                    raise HostError(f"memory cannot be looked at: {os.strerror(number)}", errno=number)

    @property
    def regions(self) -> list[list[int]]:
        """Of those that are watched: guest-physical start, size, where it lies in this process."""
        seen = {region.start: region for region, _, _ in self._watched}
        return [[region.start, region.size, region.address] for region in seen.values()]

    def protect(self, facts: dict[str, Any], fds: Sequence[int]) -> None:
        """The guest stands still: from here on nobody writes before the saver says so. It is told `facts`, with `fds`
        beside our own. Raises `HostError`; then nothing is protected."""
        assert self._uffd is not None
        try:
            for region, offset, size in self._watched:
                self._uffd.protect(region.address + offset, size)
            message = json.dumps({"regions": self.regions, **facts}).encode()
            if len(message) > MAX_MESSAGE:
                raise HostError("the saver cannot be told of so many parts of memory", errno=errno.E2BIG)
            socket.send_fds(self._channel, [message], [self._uffd.fd, *fds])
        except OSError as error:
            self.cancel()
            if isinstance(error, HostError):
                raise
            raise HostError(f"the saver cannot be told: {error.strerror}", errno=error.errno or 0) from error
        self._uffd.close()

    def _heard(self) -> None:
        try:
            word = self._channel.recv(1)
            if word == ALL_SAVED:
                self._channel.send(LET_GO)
        except OSError:
            word = b""
        self.close()
        self._ended("" if word == ALL_SAVED else "the process that saves its memory has ended")

    def cancel(self) -> None:
        """It is not wanted any more, or cannot be whole."""
        if self._channel.fileno() >= 0:
            self.close()
            self._ended("it was given up")

    def close(self) -> None:
        """The saver, if it goes on, sees that and gives up."""
        if self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel.fileno())
            self._channel.close()
        if self._uffd is not None:
            self._uffd.close()
        if self._memory.keeper == self.cancel:
            self._memory.keeper = None
