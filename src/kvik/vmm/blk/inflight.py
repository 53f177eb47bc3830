"""Which requests were taken from the rings and not answered, in memory that the VMM keeps while this process may die.

QEMU's docs/interop/vhost-user, "Inflight I/O tracking", for split rings. The VMM asks for the memory
(GET_INFLIGHT_FD), holds it, and gives it to the process that comes after this one (SET_INFLIGHT_FD), which works on
what it finds there. A request is marked when it is taken. When answers are shown to the driver, these steps make each
moment one of "not answered" and "answered":

    1. their list: each one's `next`, then `last_batch_head`
    2. the used ring's index, which shows them
    3. marks off
    4. `used_idx`: the same index. Where it is not, 3 was not done, and is done for that list

A burst (`virtio/blkburst.py`) is taken and answered in one step and never marked: its list is empty.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from struct import Struct

from kvik.errors import HostError
from kvik.vmm.faults import GuestFault
from kvik.vmm.virtio.split import SplitQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvik.vmm.virtio.queue import Chain

__all__ = ["Inflight", "InflightRing", "TrackedQueue", "inflight_memory"]

_RING = Struct("=QHHHH")  # features, version, entries, last_batch_head, used_idx
_ENTRY = 16  # inflight (8 bits), 5 bytes, next (16), counter (64)
_ALIGN = 64
_VERSION, _LAST, _USED = 4, 6, 7  # as words of 16 bits
_NOBODY = 0xFFFF  # no descriptor's number
F_SEAL_SHRINK, F_ADD_SEALS = 2, 1033


def _room(size: int) -> int:
    return -(-(_RING.size + _ENTRY * size) // _ALIGN) * _ALIGN


def inflight_memory(queues: int, size: int) -> int:
    """A memfd for so many rings. Raises OSError."""
    fd = os.memfd_create("inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, queues * _room(size))
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)  # to read it never fails
    return fd


class Inflight:
    """Maps `length` bytes of `fd` at `offset`, for `queues` rings of up to `size` entries. `fresh`: forget what is
    there. Raises `HostError`."""

    def __init__(self, fd: int, length: int, offset: int, queues: int, size: int, *, fresh: bool = False) -> None:
        if queues * _room(size) > length or offset % mmap.ALLOCATIONGRANULARITY:
            raise HostError(f"{length} bytes at {offset} cannot tell the requests of {queues} rings of {size}")
        try:
            self._map = mmap.mmap(fd, length, offset=offset)
        except (OSError, ValueError, OverflowError) as error:
            raise HostError(f"the memory for requests in flight cannot be mapped: {error}") from error
        self._queues, self._size = queues, size
        if fresh:
            self._map[:] = bytes(length)

    @property
    def length(self) -> int:
        return len(self._map)

    def ring(self, index: int, size: int) -> InflightRing:
        """Raises `HostError`."""
        if index >= self._queues or size > self._size:
            raise HostError(f"ring {index} of {size} entries has no place among the requests in flight")
        room = _room(self._size)
        return InflightRing(memoryview(self._map)[index * room : (index + 1) * room], size)


class InflightRing:
    """Of one ring. What it holds is checked: the VMM can write there."""

    __slots__ = ("_bytes", "_counter", "_longs", "_size", "_words")

    def __init__(self, memory: memoryview, size: int) -> None:
        self._bytes, self._words, self._longs = memory, memory.cast("H"), memory.cast("Q")
        self._size, self._counter = size, 0

    def recover(self, used: int) -> list[int] | None:
        """The requests that were taken and not answered, in that order; None for a ring that is new. `used`: the used
        ring's index. GuestFault for what cannot be."""
        words, size = self._words, self._size
        if not words[_VERSION]:
            _RING.pack_into(self._bytes, 0, 0, 0, size, _NOBODY, used)
            words[_VERSION] = 1
            return None
        _, version, entries, head, known = _RING.unpack_from(self._bytes)
        if version != 1 or entries != size:
            raise GuestFault(f"its requests in flight are those of a ring of {entries} entries, version {version}")
        for _ in range(min((used - known) & 0xFFFF, size)):
            if head >= size:
                break
            self._bytes[_RING.size + _ENTRY * head] = 0
            head = words[(_RING.size + _ENTRY * head + 6) >> 1]
        words[_USED] = used
        base = _RING.size >> 3
        marked = [item for item in range(size) if self._bytes[_RING.size + _ENTRY * item]]
        marked.sort(key=lambda item: self._longs[base + 2 * item + 1])
        self._counter = self._longs[base + 2 * marked[-1] + 1] + 1 & (1 << 64) - 1 if marked else 0
        return marked

    def take(self, head: int) -> None:
        self._longs[(_RING.size >> 3) + 2 * head + 1] = self._counter
        self._counter += 1
        self._bytes[_RING.size + _ENTRY * head] = 1

    def untake(self, head: int) -> None:
        self._bytes[_RING.size + _ENTRY * head] = 0

    def show(self, heads: Sequence[int]) -> None:
        """Before the used ring's index says that these are answered."""
        words, following = self._words, _NOBODY
        for head in heads:
            words[(_RING.size + _ENTRY * head + 6) >> 1] = following
            following = head
        words[_LAST] = following

    def shown(self, heads: Sequence[int], used: int) -> None:
        """After that; `used` is the index."""
        marks = self._bytes
        for head in heads:
            marks[_RING.size + _ENTRY * head] = 0
        self._words[_USED] = used


class TrackedQueue(SplitQueue):
    """A split virtqueue that notes what is in flight, where there is a place for that. Not under IN_ORDER."""

    __slots__ = ("inflight",)

    def reset(self) -> None:
        super().reset()
        self.inflight: InflightRing | None = None

    def pop(self) -> Chain | None:
        chain = super().pop()
        if chain is not None and self.inflight is not None:
            self.inflight.take(chain.head)
        return chain

    def undo_pop(self, chain: Chain) -> None:
        super().undo_pop(chain)
        if self.inflight is not None and chain.head not in self.again:
            self.inflight.untake(chain.head)

    def _put(self, chain: Chain, written: int) -> None:
        if self.inflight is not None:
            self.inflight.show([chain.head])
        super()._put(chain, written)
        if self.inflight is not None:
            self.inflight.shown([chain.head], self._next_used)

    def put(self, heads: list[int], lengths: list[int]) -> None:
        if self.inflight is not None:
            self.inflight.show(heads)
        super().put(heads, lengths)
        if self.inflight is not None:
            self.inflight.shown(heads, self._next_used)

    def show(self, count: int) -> None:
        if self.inflight is not None:
            self.inflight.show(())
        super().show(count)
        if self.inflight is not None:
            self.inflight.shown((), self._next_used)
