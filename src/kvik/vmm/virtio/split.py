"""The split virtqueue (virtio 1.2, 2.7): descriptor table, available ring, used ring."""

from __future__ import annotations

from struct import Struct

from kvik.vmm.faults import GuestFault
from kvik.vmm.virtio.queue import (
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    DESCRIPTOR,
    MAX_CHAIN_BYTES,
    Chain,
    Queue,
    log_written,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_unpack_descriptor = DESCRIPTOR.unpack_from
_unpack_buffer = Struct("<QIH2x").unpack_from  # a descriptor without `next`
_iter_descriptors = DESCRIPTOR.iter_unpack


class SplitQueue(Queue):
    """`desc`, `avail` and `used` are where the driver put the three parts."""

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
        "again",
    )

    def reset(self) -> None:
        super().reset()
        self.again: list[int] = []  # heads that were taken before, by whoever served this queue then: they come first
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
        if self.again:
            chain = self._chain(self.again[0])
            chain.order = -1
            del self.again[0]
            return chain
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
        chain = self._chain(avail[2 + (last & self._mask)])
        self._next_avail = (last + 1) & 0xFFFF
        chain.order = self._pop_order
        self._pop_order += 1
        return chain

    def _chain(self, head: int) -> Chain:
        """The request that begins with descriptor `head`."""
        size = self.size
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
        return chain

    def pop_singles(self, limit: int) -> tuple[list[int], list[int], list[int]]:
        """Single buffers to write to from the ring's front, up to `limit` and as long as they lie in one region, which
        `region` then tells: the head, the place in its view, and the bytes of each. None where something else comes
        next. For queues that are not IN_ORDER."""
        last, avail, size = self._next_avail, self._avail, self.size
        ahead = (avail[1] - last) & 0xFFFF
        if ahead > size:
            raise GuestFault(f"queue {self.index}: the available index is {ahead} ahead, of {size} entries")
        start, desc, base, room = last & self._mask, self._desc, self._base, self._end - self._base
        places: list[int] = []
        sizes: list[int] = []
        heads = avail[2 + start : 2 + min(start + ahead, start + limit, size)].tolist()
        for head in heads:
            if head >= size:
                break  # `pop` says what is wrong with it
            address, length, flags = _unpack_buffer(desc, head << 4)
            place = address - base
            if flags != DESC_WRITE or not length:
                break
            if not 0 <= place <= room - length:
                if places:
                    break
                self._buffer(address, length)  # finds its region
                base, room = self._base, self._end - self._base
                place = address - base
                if not 0 <= place <= room - length:
                    break
            places.append(place)
            sizes.append(length)
        count = len(places)
        self._next_avail = (last + count) & 0xFFFF
        return heads[:count], places, sizes

    @property
    def region(self) -> tuple[memoryview, int]:
        """The region of RAM that was found last: all of it, and its address."""
        return self._ram, self._base

    def undo_pops(self, count: int) -> None:
        """Give back what the last calls of `pop_singles` returned."""
        self._next_avail = (self._next_avail - count) & 0xFFFF

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
                if number == length >> 4:
                    chain.table, chain.distance = copy, self._distance
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
        if chain.order < 0:
            self.again.insert(0, chain.head)
            return
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
        memory = self.memory
        if memory.dirty_log is not None:
            for chain, written in zip(chains, lengths, strict=True):
                log_written(memory, chain, written)
        self.put([chain.head for chain in chains], lengths)

    def put(self, heads: list[int], lengths: list[int]) -> None:
        """Give back requests by their heads, all in one step: to those that were not popped as chains."""
        ring, slot, count = self._used_ring, self._next_used & self._mask, len(heads)
        for head, written in zip(heads, lengths, strict=True):
            ring[2 * slot] = head
            ring[2 * slot + 1] = written & 0xFFFFFFFF
            slot = (slot + 1) & self._mask
        self._next_used = self._used[1] = (self._next_used + count) & 0xFFFF  # x86 keeps the order of stores
        if self.memory.dirty_log is not None:
            self.memory.touched(self.used, 4 + 8 * self.size)

    def show(self, count: int) -> None:
        """The next `count` requests were served without `pop`, and the next `count` entries of the used ring written:
        let the driver see them. Not under IN_ORDER."""
        self._next_avail = (self._next_avail + count) & 0xFFFF
        self._next_used = self._used[1] = (self._next_used + count) & 0xFFFF  # x86 keeps the order of stores

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
        return self.ready and (self._avail[1] != self._next_avail or bool(self.again))

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
