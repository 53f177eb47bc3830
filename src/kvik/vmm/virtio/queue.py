"""Virtqueues, the device's side: requests, and what both kinds of ring share (virtio 1.2, 2.6).

A queue belongs to one event loop; no two threads may use it at once. Everything in the rings is the guest's and
hostile: each descriptor is read once, chains are bounded by the queue's size and 2^32 bytes, every address is checked
against RAM. What is malformed raises `GuestFault`, which the device layer turns into DEVICE_NEEDS_RESET.

    while (chain := queue.pop()) is not None:
        written = work(chain.readable, chain.writable)
        queue.push(chain, written)
    queue.flush()
"""

from __future__ import annotations

from _thread import allocate_lock
from struct import Struct, pack, unpack

from kvik.vmm.faults import GuestFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from kvik.vmm.memory import GuestMemory

# Feature bits that belong to the rings and the transport (virtio 1.2, 6)
INDIRECT_DESC = 1 << 28
EVENT_IDX = 1 << 29
VERSION_1 = 1 << 32
ACCESS_PLATFORM = 1 << 33
RING_PACKED = 1 << 34
IN_ORDER = 1 << 35
NOTIFICATION_DATA = 1 << 38
RING_RESET = 1 << 40

DESC_NEXT = 1
DESC_WRITE = 2
DESC_INDIRECT = 4

MAX_QUEUE_SIZE = 32768  # 2.6: "The maximum Queue Size value is 32768"
MAX_CHAIN_BYTES = 1 << 32  # 2.7.5.2: "the total length of a descriptor chain MUST NOT be more than 2^32 bytes"

DESCRIPTOR = Struct("<QIHH")  # split: addr, len, flags, next; packed: addr, len, id, flags


class Chain:
    """One request: what the driver lets the device read, then what it lets it write.

    The memoryviews lie in guest memory: the guest can change their contents at any time, so a value that is checked
    must be copied first (`read_all`, `take_front`).
    """

    __slots__ = (
        *("count", "distance", "head", "order", "readable", "readable_size", "table", "targets"),
        *("writable", "writable_size"),
    )

    def __init__(self, head: int, count: int) -> None:
        self.head = head  # split: the first descriptor's index; packed: the buffer id
        self.count = count  # ring entries it takes (packed ring)
        self.order = 0  # its place in the sequence of pops, for IN_ORDER
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []
        self.readable_size = 0  # bytes
        self.writable_size = 0
        self.targets: list[tuple[int, int]] = []  # (address, length) of each writable part, for the dirty log
        # The driver's table, as it was read, where all of it is in one region; from the guest's addresses to ours.
        self.table = b""
        self.distance = 0

    def vector(self, size: int) -> bytes:
        """What lies between a header of 16 bytes and a status of one, `size` bytes, as an array of struct iovec
        (readv(2)). Empty where the driver cut its request otherwise, or it is not in one table."""
        words = list(unpack(f"<{len(self.table) >> 3}Q", self.table))
        sizes = [word & 0xFFFFFFFF for word in words[1::2]]  # beside them flags and next; struct iovec has zeros there
        if len(sizes) < 3 or sizes[0] != 16 or sizes[-1] != 1 or sum(sizes) != size + 17:
            return b""
        distance = self.distance
        words[0::2] = [address + distance for address in words[0::2]]
        words[1::2] = sizes
        return pack(f"={len(words)}Q", *words)[16:-16]

    def read_all(self, limit: int) -> bytes:
        """A copy of what the driver wrote. GuestFault if it is longer than `limit` bytes."""
        if self.readable_size > limit:
            raise GuestFault(f"a request of {self.readable_size} bytes where at most {limit} are allowed")
        return b"".join(self.readable)

    def take_front(self, size: int) -> bytes:
        """Copy and remove the first `size` readable bytes, however the driver cut them (2.6.4: framing is free).

        GuestFault if there are fewer.
        """
        if self.readable_size < size:
            raise GuestFault(f"{self.readable_size} readable bytes where {size} are needed")
        self.readable_size -= size
        parts = self.readable
        first = parts[0] if parts else memoryview(b"")
        if len(first) == size:
            del parts[0]
            return bytes(first)
        if len(first) > size:
            parts[0] = first[size:]
            return bytes(first[:size])
        taken = bytearray()
        while len(taken) < size:
            part = parts[0]
            wanted = size - len(taken)
            taken += part[:wanted]
            if len(part) > wanted:
                parts[0] = part[wanted:]
            else:
                del parts[0]
        return bytes(taken)

    def take_tail(self) -> memoryview:
        """Remove the last writable byte and return it as a view (a request's status). GuestFault if there is none."""
        if not self.writable:
            raise GuestFault("no writable byte for the status")
        self.writable_size -= 1
        last = self.writable[-1]
        if len(last) == 1:
            del self.writable[-1]
            return last
        self.writable[-1] = last[:-1]
        return last[-1:]

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> int:
        """Copy `data` into the writable part from `offset`; the bytes that fitted."""
        rest = memoryview(data)
        done = 0
        for part in self.writable:
            if offset >= len(part):
                offset -= len(part)
                continue
            if not rest:
                break
            count = min(len(part) - offset, len(rest))
            part[offset : offset + count] = rest[:count]
            rest = rest[count:]
            done += count
            offset = 0
        return done


class Queue:
    """A virtqueue's registers and what both ring formats share. `SplitQueue` and `PackedQueue` complete it.

    The transport sets the registers while the queue is not `ready`; `start()` checks them and maps the rings.
    """

    __slots__ = (
        "_base",
        "_distance",
        "_end",
        "_fence",
        "_held",
        "_next_order",
        "_polling",
        "_pop_order",
        "_ram",
        "avail",
        "desc",
        "event_idx",
        "in_order",
        "index",
        "indirect",
        "max_size",
        "memory",
        "notify",
        "ready",
        "size",
        "used",
        "vector",
    )

    packed = False

    def __init__(self, memory: GuestMemory, index: int, max_size: int) -> None:
        self.memory = memory
        self.index = index
        self.max_size = max_size
        self.notify: Callable[[], None] = _nobody  # sends the used buffer notification
        self._fence = allocate_lock()
        self.reset()

    def reset(self) -> None:
        """Registers as after a device reset, or a queue reset (2.6.1)."""
        self.size = self.max_size
        self.ready = False
        self.desc = self.avail = self.used = 0  # guest-physical; packed: ring, driver area, device area
        self.vector = 0xFFFF  # MSI-X vector, 0xFFFF: none
        self.event_idx = self.indirect = self.in_order = False
        self._held: dict[int, tuple[Chain, int]] = {}
        self._pop_order = self._next_order = 0
        self._polling = False  # notifications are disabled
        self.forget_memory()

    def forget_memory(self) -> None:
        """RAM changed: forget the region that was found last."""
        self._base = self._end = self._distance = 0
        self._ram = memoryview(b"")

    def start(self, features: int) -> None:
        """The driver enabled the queue: check its registers, map the rings. `features` are the negotiated ones.

        GuestFault if a size or address is not allowed.
        """
        self.event_idx = bool(features & EVENT_IDX)
        self.indirect = bool(features & INDIRECT_DESC)
        self.in_order = bool(features & IN_ORDER)
        if not 0 < self.size <= self.max_size:
            raise GuestFault(f"queue {self.index}: a size of {self.size} where at most {self.max_size} are offered")
        self._map()
        self.ready = True

    def _map(self) -> None:
        raise NotImplementedError

    def pop(self) -> Chain | None:
        """The next request. None: there is none, and the driver will notify of the next one (unless that is disabled).
        GuestFault if it is malformed: the device must then stop."""
        raise NotImplementedError

    def push(self, chain: Chain, written: int) -> None:
        """Give a request back; the first `written` bytes of its writable part were filled. In any order: under
        IN_ORDER those that are early are held back. The driver is told by `flush`."""
        if not self.in_order:
            self._put(chain, written)
            return
        self._held[chain.order] = (chain, written)
        while (entry := self._held.pop(self._next_order, None)) is not None:
            self._put(*entry)
            self._next_order += 1

    def _put(self, chain: Chain, written: int) -> None:
        raise NotImplementedError

    def pop_many(self, limit: int) -> list[Chain]:
        """Up to `limit` requests that are there already; unlike `pop` it never asks for a notification."""
        polling, self._polling = self._polling, True
        chains: list[Chain] = []
        while len(chains) < limit and (chain := self.pop()) is not None:
            chains.append(chain)
        self._polling = polling
        return chains

    def push_all(self, chains: list[Chain], lengths: list[int]) -> None:
        """`push` for the buffers of one packet: the driver sees all of them used, or none (5.1.6.4.1)."""
        if self.in_order:
            for chain, written in zip(chains, lengths, strict=True):
                self._held[chain.order] = (chain, written)
            chains, lengths = [], []
            while (entry := self._held.pop(self._next_order, None)) is not None:
                chains.append(entry[0])
                lengths.append(entry[1])
                self._next_order += 1
        if chains:
            self._put_all(chains, lengths)

    def _put_all(self, chains: list[Chain], lengths: list[int]) -> None:
        raise NotImplementedError

    def undo_pop(self, chain: Chain) -> None:
        """Give back the request popped last, unworked: the next `pop` returns it again (no packet was there, ...)."""
        raise NotImplementedError

    def disable_notifications(self) -> None:
        """The driver need not notify (2.7.10): the device polls, until `enable_notifications`. A hint only."""
        raise NotImplementedError

    def enable_notifications(self) -> bool:
        """The driver shall notify again. True: more requests came meanwhile, look again (2.7.10.1)."""
        raise NotImplementedError

    def flush(self) -> None:
        """Tell the driver of what was pushed, if it wants to know."""
        raise NotImplementedError

    def pending(self) -> bool:
        """Whether the driver has put a request that was not popped."""
        raise NotImplementedError

    def _position(self) -> dict[str, Any]:
        raise NotImplementedError

    def _set_position(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Registers and positions. Requests in flight must have been pushed before (a paused device)."""
        return {
            "size": self.size,
            "ready": self.ready,
            "desc": self.desc,
            "avail": self.avail,
            "used": self.used,
            "vector": self.vector,
            **self._position(),
        }

    def restore(self, state: dict[str, Any], features: int) -> None:
        """What `state` gave, with the negotiated features. GuestFault if the registers are not allowed."""
        self.reset()
        self.size, self.vector = state["size"], state["vector"]
        self.desc, self.avail, self.used = state["desc"], state["avail"], state["used"]
        if state["ready"]:
            self.start(features)
        self._set_position(state)

    # --- descriptors

    def _area(self, what: str, address: int, size: int, alignment: int) -> memoryview:
        if address % alignment:
            raise GuestFault(f"queue {self.index}: the {what} at {address:#x} is not aligned to {alignment}")
        return self.memory.view(address, size)

    def _buffer(self, address: int, length: int) -> memoryview:
        """`length` bytes of RAM; GuestFault if they are not. The region found last is tried first."""
        start = address - self._base
        if start < 0 or address + length > self._end:
            view = self.memory.view(address, length)  # checks
            for region in self.memory.regions if self.memory.arrival is None else ():
                if region.start <= address < region.start + region.size:
                    self._base, self._end, self._ram = region.start, region.start + region.size, region.view
                    self._distance = region.address - region.start
            return view
        return self._ram[start : start + length]

    def _indirect(self, chain: Chain, address: int, length: int, flags: int) -> None:
        """Fill `chain` from an indirect table (2.7.5.3, 2.8.7), which is copied once."""
        if not self.indirect:
            raise GuestFault(f"queue {self.index}: an indirect table without VIRTIO_F_INDIRECT_DESC")
        if flags & DESC_NEXT:
            raise GuestFault(f"queue {self.index}: a descriptor is both INDIRECT and NEXT")
        # 2.7.5.3.1: no chain is longer than the queue, with what came before the table; iovecs rely on it.
        room = self.size - len(chain.readable) - len(chain.writable)
        if length % 16 or not 0 < length <= 16 * room:
            raise GuestFault(f"queue {self.index}: an indirect table of {length} bytes")
        self._walk_indirect(chain, bytes(self._buffer(address, length)))

    def _walk_indirect(self, chain: Chain, table: bytes) -> None:
        raise NotImplementedError

    def _add(self, chain: Chain, address: int, length: int, flags: int) -> None:
        """Add one buffer to `chain`."""
        if not length:
            raise GuestFault(f"queue {self.index}: a buffer of no length")
        if flags & DESC_INDIRECT:
            raise GuestFault(f"queue {self.index}: an indirect table inside a chain of another")
        start = address - self._base
        if start < 0 or address + length > self._end:
            view = self._buffer(address, length)
        else:
            view = self._ram[start : start + length]
        if flags & DESC_WRITE:
            chain.writable.append(view)
            chain.targets.append((address, length))
            chain.writable_size += length
        else:
            if chain.writable:  # 2.7.4.2: "any device-writable ... after any device-readable"
                raise GuestFault(f"queue {self.index}: a readable buffer behind a writable one")
            chain.readable.append(view)
            chain.readable_size += length
        if chain.readable_size + chain.writable_size > MAX_CHAIN_BYTES:
            raise GuestFault(f"queue {self.index}: a chain of more than 2^32 bytes")

    def __iter__(self) -> Iterator[Chain]:
        """Pop until nothing is left."""
        while (chain := self.pop()) is not None:
            yield chain


def _nobody() -> None:
    pass


def log_written(memory: GuestMemory, chain: Chain, written: int) -> None:
    """Tell the dirty log of the first `written` bytes of a chain."""
    for address, length in chain.targets:
        if written <= 0:
            return
        memory.touched(address, min(length, written))
        written -= length
