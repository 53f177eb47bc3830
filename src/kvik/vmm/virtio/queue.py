"""Virtqueues, the device's side: what both kinds share, and the split ring (virtio 1.2, 2.6, 2.7).

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
from struct import Struct

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
_unpack_descriptor = DESCRIPTOR.unpack_from
_iter_descriptors = DESCRIPTOR.iter_unpack


class Chain:
    """One request: what the driver lets the device read, then what it lets it write.

    The memoryviews lie in guest memory: the guest can change their contents at any time, so a value that is checked
    must be copied first (`read_all`, `take_front`).
    """

    __slots__ = ("count", "head", "order", "readable", "readable_size", "targets", "writable", "writable_size")

    def __init__(self, head: int, count: int) -> None:
        self.head = head  # split: the first descriptor's index; packed: the buffer id
        self.count = count  # ring entries it takes (packed ring)
        self.order = 0  # its place in the sequence of pops, for IN_ORDER
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []
        self.readable_size = 0  # bytes
        self.writable_size = 0
        self.targets: list[tuple[int, int]] = []  # (address, length) of each writable part, for the dirty log

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
        self._base = self._end = 0
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


class SplitQueue(Queue):
    """The split virtqueue (2.7): descriptor table, available ring, used ring."""

    __slots__ = (
        "_avail",
        "_desc",
        "_mask",
        "_next_avail",
        "_next_used",
        "_signalled",
        "_table_limit",
        "_used",
        "_used_ring",
    )

    def reset(self) -> None:
        super().reset()
        self._next_avail = self._next_used = self._signalled = 0
        self._desc = memoryview(b"")
        self._avail = self._used = self._used_ring = self._desc
        self._mask = self._table_limit = 0

    def _map(self) -> None:
        size = self.size
        if size & (size - 1):
            raise GuestFault(f"queue {self.index}: a split ring of {size} entries, no power of 2")
        self._desc = self._area("descriptor table", self.desc, 16 * size, 16)
        # 16-bit words: flags, idx, ring[size], used_event
        self._avail = self._area("available ring", self.avail, 6 + 2 * size, 2).cast("H")
        used = self._area("used ring", self.used, 6 + 8 * size, 4)
        self._used = used.cast("H")  # flags, idx, ..., avail_event
        self._used_ring = used[4 : 4 + 8 * size].cast("I")  # id, len, id, len, ...
        self._mask = size - 1
        self._table_limit = 16 * size if self.indirect else 0

    def pop(self) -> Chain | None:
        last = self._next_avail
        avail = self._avail
        ahead = (avail[1] - last) & 0xFFFF  # x86 does not reorder loads: the entry is read behind the index
        if not ahead:
            if self._polling or not self._arm():
                return None
            ahead = (avail[1] - last) & 0xFFFF
        size = self.size
        if ahead > size:
            raise GuestFault(f"queue {self.index}: the available index is {ahead} ahead, of {size} entries")
        head = avail[2 + (last & self._mask)]
        if head >= size:
            raise GuestFault(f"queue {self.index}: descriptor {head} of {size}")
        chain = Chain(head, 1)
        address, length, flags, following = _unpack_descriptor(self._desc, head << 4)
        if flags & DESC_INDIRECT:
            self._indirect(chain, address, length, flags)
        else:
            left = size
            while True:
                self._add(chain, address, length, flags)
                if not flags & DESC_NEXT:
                    break
                left -= 1
                if following >= size or not left:
                    raise GuestFault(f"queue {self.index}: a chain that loops, or goes on at {following} of {size}")
                address, length, flags, following = _unpack_descriptor(self._desc, following << 4)
                if flags & DESC_INDIRECT:
                    # 2.7.5.3.1 lets a table end a chain of direct descriptors, though Linux never does it
                    self._indirect(chain, address, length, flags)
                    break
        self._next_avail = (last + 1) & 0xFFFF
        chain.order = self._pop_order
        self._pop_order += 1
        return chain

    def pop_many(self, limit: int) -> list[Chain]:
        last, avail, size, mask = self._next_avail, self._avail, self.size, self._mask
        ahead = (avail[1] - last) & 0xFFFF
        if ahead > size:
            raise GuestFault(f"queue {self.index}: the available index is {ahead} ahead, of {size} entries")
        chains: list[Chain] = []
        desc, base, end, ram, order = self._desc, self._base, self._end, self._ram, self._pop_order
        for _ in range(min(ahead, limit)):
            head = avail[2 + (last & mask)]
            if head >= size:
                break  # `pop` says what is wrong with it
            address, length, flags, _ = _unpack_descriptor(desc, head << 4)
            if flags != DESC_WRITE or not length or address < base or address + length > end:
                break
            chain = Chain(head, 1)  # a single buffer to write to, where the last one was: a receive queue's all
            chain.writable.append(ram[address - base : address - base + length])
            chain.targets.append((address, length))
            chain.writable_size = length
            chain.order = order
            order += 1
            last = (last + 1) & 0xFFFF
            chains.append(chain)
        self._next_avail, self._pop_order = last, order
        if len(chains) < min(ahead, limit):
            chains += super().pop_many(limit - len(chains))
        return chains

    def _indirect(self, chain: Chain, address: int, length: int, flags: int) -> None:
        # As drivers write tables: alone, in order, all in one region of RAM. Anything else, and whatever is wrong, is
        # left to the careful walk, which begins anew.
        base, end, ram = self._base, self._end, self._ram
        at = address - base
        if at < 0 or address + length > end or not 0 < length <= self._table_limit or length & 15:
            super()._indirect(chain, address, length, flags)
            return
        readable, writable, targets = chain.readable, chain.writable, chain.targets
        if flags & DESC_NEXT or readable or writable:
            super()._indirect(chain, address, length, flags)
            return
        read = written = 0
        copy = bytes(ram[at : at + length])
        for number, (start, size, kind, following) in enumerate(_iter_descriptors(copy), 1):
            at = start - base
            if at < 0 or start + size > end or not size or kind & DESC_INDIRECT:
                break
            if kind & DESC_WRITE:
                writable.append(ram[at : at + size])
                targets.append((start, size))
                written += size
            elif writable:
                break
            else:
                readable.append(ram[at : at + size])
                read += size
            if not kind & DESC_NEXT:
                if read + written > MAX_CHAIN_BYTES:
                    break
                chain.readable_size, chain.writable_size = read, written
                return
            if following != number:
                break
        readable.clear()
        writable.clear()
        targets.clear()
        super()._indirect(chain, address, length, flags)

    def _walk_indirect(self, chain: Chain, table: bytes) -> None:
        count = len(table) >> 4
        following = 0
        for _ in range(count):
            address, length, flags, following = _unpack_descriptor(table, following << 4)
            self._add(chain, address, length, flags)
            if not flags & DESC_NEXT:
                return
            if following >= count:
                break
        raise GuestFault(f"queue {self.index}: an indirect chain that loops, or leaves its {count} descriptors")

    def undo_pop(self, chain: Chain) -> None:
        self._next_avail = (self._next_avail - 1) & 0xFFFF
        self._pop_order -= 1

    def _put(self, chain: Chain, written: int) -> None:
        memory = self.memory
        used = self._next_used
        slot = used & self._mask
        ring = self._used_ring
        ring[2 * slot] = chain.head
        ring[2 * slot + 1] = written & 0xFFFFFFFF
        self._next_used = self._used[1] = (used + 1) & 0xFFFF  # x86 keeps the order of stores
        if memory.dirty_log is not None:
            memory.touched(self.used, 4)
            memory.touched(self.used + 4 + 8 * slot, 8)
            log_written(memory, chain, written)

    def _put_all(self, chains: list[Chain], lengths: list[int]) -> None:
        ring, mask, index = self._used_ring, self._mask, self._next_used
        for chain, written in zip(chains, lengths, strict=True):
            slot = (index & mask) << 1
            ring[slot] = chain.head
            ring[slot + 1] = written & 0xFFFFFFFF
            index += 1
        first, self._next_used = self._next_used, index & 0xFFFF
        self._used[1] = self._next_used  # x86 keeps the order of stores
        memory = self.memory
        if memory.dirty_log is not None:
            memory.touched(self.used, 4)
            for number, (chain, written) in enumerate(zip(chains, lengths, strict=True)):
                memory.touched(self.used + 4 + 8 * ((first + number) & mask), 8)
                log_written(memory, chain, written)

    def disable_notifications(self) -> None:
        self._polling = True
        if not self.event_idx:
            self._used[0] = 1  # VIRTQ_USED_F_NO_NOTIFY
            self.memory.touched(self.used, 2)
        # With EVENT_IDX the old avail_event stays behind the index, which silences the driver.

    def enable_notifications(self) -> bool:
        self._polling = False
        if not self.event_idx:
            self._used[0] = 0
            self.memory.touched(self.used, 2)
            with self._fence:  # as in `_arm`
                pass
            return self._avail[1] != self._next_avail
        self._arm()
        return self._avail[1] != self._next_avail

    def _arm(self) -> bool:
        """The ring is empty: ask for a notification of the next request. Whether one came meanwhile."""
        if not self.event_idx:
            return False
        self._used[2 + 4 * self.size] = self._next_avail  # avail_event
        self.memory.touched(self.used + 4 + 8 * self.size, 2)
        # The store above must be seen before the index is read, or a request put in between is never heard of
        # (2.7.10.1). x86 reorders exactly this pair; taking a lock is a full barrier.
        with self._fence:
            pass
        return self._avail[1] != self._next_avail

    def pending(self) -> bool:
        return self.ready and self._avail[1] != self._next_avail

    def flush(self) -> None:
        new, old = self._next_used, self._signalled
        if new == old:
            return
        with self._fence:  # the used index is visible before the driver's wish is read (2.7.7.2)
            pass
        self._signalled = new
        if self.event_idx:
            event = self._avail[2 + self.size]  # used_event
            wanted = (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            wanted = not self._avail[0] & 1  # VIRTQ_AVAIL_F_NO_INTERRUPT
        if wanted:
            self.notify()

    def _position(self) -> dict[str, Any]:
        return {"next_avail": self._next_avail, "next_used": self._next_used, "signalled": self._signalled}

    def _set_position(self, state: dict[str, Any]) -> None:
        self._next_avail, self._next_used = state["next_avail"] & 0xFFFF, state["next_used"] & 0xFFFF
        self._signalled = state["signalled"] & 0xFFFF


def log_written(memory: GuestMemory, chain: Chain, written: int) -> None:
    """Tell the dirty log of the first `written` bytes of a chain."""
    for address, length in chain.targets:
        if written <= 0:
            return
        memory.touched(address, min(length, written))
        written -= length
