"""The buffers that a driver gave for packets to come, popped ahead: a packet of 64 KiB needs dozens of them.

`Singles` knows only what drivers put into a receive queue nearly always: a split ring of single buffers in one region
of RAM. It keeps three numbers for each and makes no object, which is half the price. `Chains` knows everything; a
queue changes to it, for good, at the first buffer that is not usual.
"""

from __future__ import annotations

from itertools import islice
from struct import Struct

from kvik.vmm.backends.net import HEADER
from kvik.vmm.faults import GuestFault
from kvik.vmm.virtio.split import SplitQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque

    from kvik.vmm.virtio.queue import Chain, Queue
else:
    from _collections import deque  # what is behind `collections`, which takes longer

__all__ = ["Buffers", "Chains", "Singles", "buffers_for"]

_NUM_BUFFERS = 10  # offset in struct virtio_net_hdr_v1
_U16 = Struct("<H")


class Buffers:
    """What both kinds can do; abstract, `Singles` and `Chains` have all of it. The first buffer is the one that the
    driver gave first."""

    def __len__(self) -> int:
        raise NotImplementedError

    def fill(self, count: int) -> int:
        """Pop up to `count` more; how many. GuestFault if one cannot hold a packet's header."""
        raise NotImplementedError

    def views(self, count: int) -> list[memoryview]:
        """Where the first `count` buffers lie."""
        raise NotImplementedError

    def shares(self, size: int, limit: int) -> list[int]:
        """How many of a packet's `size` bytes come into each of the first buffers, at most `limit` of them."""
        raise NotImplementedError

    def use(self, shares: list[int]) -> None:
        """A packet lies in the first buffers: write their number into its header, and give them to the driver, all
        in one step."""
        raise NotImplementedError

    def give_back(self) -> None:
        """Undo all pops."""
        raise NotImplementedError

    def clear(self) -> None:
        """The buffers are not ours any more."""
        raise NotImplementedError


def buffers_for(queue: Queue) -> Buffers:
    if type(queue) is SplitQueue and not queue.in_order:
        return Singles(queue)
    return Chains(queue)


class Chains(Buffers):
    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._chains: deque[Chain] = deque()

    def __len__(self) -> int:
        return len(self._chains)

    def fill(self, count: int) -> int:
        chains = self._queue.pop_many(count)
        for chain in chains:
            if chain.writable_size < HEADER or chain.readable:
                raise GuestFault(f"a receive buffer of {chain.writable_size} writable bytes")
        self._chains += chains
        return len(chains)

    def views(self, count: int) -> list[memoryview]:
        return [view for chain in islice(self._chains, count) for view in chain.writable]

    def shares(self, size: int, limit: int) -> list[int]:
        shares: list[int] = []
        for chain in islice(self._chains, limit):
            shares.append(min(chain.writable_size, size))
            size -= shares[-1]
            if not size:
                break
        return shares

    def use(self, shares: list[int]) -> None:
        chains = self._chains
        chains[0].write(_U16.pack(len(shares)), _NUM_BUFFERS)
        if len(shares) == 1:
            self._queue.push(chains.popleft(), shares[0])
        else:
            self._queue.push_all([chains.popleft() for _ in shares], shares)

    def give_back(self) -> None:
        while self._chains:
            self._queue.undo_pop(self._chains.pop())

    def clear(self) -> None:
        self._chains.clear()


class Singles(Buffers):
    def __init__(self, queue: SplitQueue) -> None:
        self._queue = queue
        self._heads: list[int] = []
        self._places: list[int] = []  # in `_ram`
        self._sizes: list[int] = []
        self._ram = memoryview(b"")
        self._base = 0  # the guest's address of `_ram`

    def __len__(self) -> int:
        return len(self._heads)

    def fill(self, count: int) -> int:
        heads, places, sizes = self._queue.pop_singles(count)
        ram, base = self._queue.region
        if not heads or (self._heads and ram is not self._ram):  # RAM changed: what is here lies in the old one
            self._queue.undo_pops(len(heads))
            return 0
        if min(sizes) < HEADER:
            raise GuestFault(f"a receive buffer of {min(sizes)} writable bytes")
        self._ram, self._base = ram, base
        self._heads += heads
        self._places += places
        self._sizes += sizes
        return len(heads)

    def views(self, count: int) -> list[memoryview]:
        ram, places, sizes = self._ram, self._places[:count], self._sizes
        return [ram[place : place + size] for place, size in zip(places, sizes, strict=False)]

    def shares(self, size: int, limit: int) -> list[int]:
        shares: list[int] = []
        for room in self._sizes:
            if room >= size:
                shares.append(size)
                break
            shares.append(room)
            size -= room
            if len(shares) == limit:
                break
        return shares

    def use(self, shares: list[int]) -> None:
        count = len(shares)
        ram, heads, places = self._ram, self._heads, self._places
        _U16.pack_into(ram, places[0] + _NUM_BUFFERS, count)
        queue = self._queue
        if (memory := queue.memory).dirty_log is not None:
            for place, share in zip(places, shares, strict=False):
                memory.touched(self._base + place, share)
        queue.put(heads[:count], shares)
        del heads[:count]
        del places[:count]
        del self._sizes[:count]

    def give_back(self) -> None:
        self._queue.undo_pops(len(self._heads))
        self.clear()

    def clear(self) -> None:
        self._heads.clear()
        self._places.clear()
        self._sizes.clear()
