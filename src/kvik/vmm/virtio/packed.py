"""The packed virtqueue (virtio 1.2, 2.8): one ring of descriptors that both sides write, and two event structures.

A descriptor is available when its AVAIL flag equals the driver's wrap counter and its USED flag does not; it is used
when both equal the device's. The counters flip each time around the ring.
"""

from __future__ import annotations

from kvik.vmm.faults import GuestFault
from kvik.vmm.virtio.queue import (
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    DESCRIPTOR,
    Chain,
    Queue,
    log_written,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

AVAIL, USED = 1 << 7, 1 << 15
EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC = 0, 1, 2  # flags of an event suppression structure (2.8.14)

_unpack_descriptor = DESCRIPTOR.unpack_from


class PackedQueue(Queue):
    """`desc` is the ring, `avail` the driver's event structure, `used` the device's."""

    __slots__ = (
        *("_avail_at", "_avail_wrap", "_device_event", "_driver_event", "_flags", "_ring"),
        *("_signalled_at", "_signalled_wrap", "_used_at", "_used_wrap", "_words"),
    )

    packed = True

    def reset(self) -> None:
        super().reset()
        self._avail_at = self._used_at = self._signalled_at = 0
        self._avail_wrap = self._used_wrap = self._signalled_wrap = True
        self._ring = self._flags = self._words = memoryview(b"")
        self._device_event = self._driver_event = self._ring

    def _map(self) -> None:
        self._ring = self._area("descriptor ring", self.desc, 16 * self.size, 16)
        self._flags = self._ring.cast("H")  # descriptor i's id at 8 * i + 6, flags at 8 * i + 7
        self._words = self._ring.cast("I")  # its length at 4 * i + 2
        self._driver_event = self._area("driver event area", self.avail, 4, 4).cast("H")
        self._device_event = self._area("device event area", self.used, 4, 4).cast("H")

    def _available(self) -> bool:
        flags = self._flags[8 * self._avail_at + 7]
        return bool(flags & AVAIL) == self._avail_wrap != bool(flags & USED)

    def pending(self) -> bool:
        return self.ready and self._available()

    def pop(self) -> Chain | None:
        if not self._available() and (self._polling or not self._arm()):
            return None
        size, at, ring = self.size, self._avail_at, self._ring
        count = 1
        chain = Chain(0, 0)
        # The descriptor is read after its flags told that it is available; x86 does not reorder loads.
        address, length, identity, flags = _unpack_descriptor(ring, at << 4)
        if flags & DESC_INDIRECT:
            self._indirect(chain, address, length, flags)
        else:
            while True:
                self._add(chain, address, length, flags)
                if not flags & DESC_NEXT:
                    break
                count += 1
                at = at + 1 if at + 1 < size else 0
                if count > size:
                    raise GuestFault(f"queue {self.index}: a chain longer than the ring of {size}")
                address, length, identity, flags = _unpack_descriptor(ring, at << 4)  # the last one's id counts
        chain.head, chain.count = identity, count
        self._avail_at += count
        if self._avail_at >= size:
            self._avail_at -= size
            self._avail_wrap = not self._avail_wrap
        chain.order = self._pop_order
        self._pop_order += 1
        return chain

    def _walk_indirect(self, chain: Chain, table: bytes) -> None:
        for address, length, _, flags in DESCRIPTOR.iter_unpack(table):
            self._add(chain, address, length, flags & (DESC_WRITE | DESC_INDIRECT))  # others are reserved here (2.8.7)

    def undo_pop(self, chain: Chain) -> None:
        self._avail_at -= chain.count
        if self._avail_at < 0:
            self._avail_at += self.size
            self._avail_wrap = not self._avail_wrap
        self._pop_order -= 1

    def _put(self, chain: Chain, written: int) -> None:
        self._show(self._fill(chain, written))

    def _put_all(self, chains: list[Chain], lengths: list[int]) -> None:
        # The driver looks at them in order, so it sees none before the first.
        first = self._fill(chains[0], lengths[0])
        for chain, written in zip(chains[1:], lengths[1:], strict=True):
            self._show(self._fill(chain, written))
        self._show(first)

    def _show(self, entry: tuple[int, int]) -> None:
        self._flags[entry[0]] = entry[1]

    def _fill(self, chain: Chain, written: int) -> tuple[int, int]:
        """Write the next used descriptor but for its flags: with them it is the driver's, so they come last, and x86
        keeps the order of stores. Where they lie, and what they are."""
        at = self._used_at
        self._words[4 * at + 2] = written & 0xFFFFFFFF
        self._flags[8 * at + 6] = chain.head
        flags = (AVAIL | USED if self._used_wrap else 0) | (DESC_WRITE if written else 0)
        self._used_at += chain.count
        if self._used_at >= self.size:
            self._used_at -= self.size
            self._used_wrap = not self._used_wrap
        memory = self.memory
        if memory.dirty_log is not None:
            memory.touched(self.desc + 16 * at, 16)
            log_written(memory, chain, written)
        return 8 * at + 7, flags

    def disable_notifications(self) -> None:
        self._polling = True
        self._device_event[1] = EVENT_DISABLE
        self.memory.touched(self.used, 4)

    def enable_notifications(self) -> bool:
        self._polling = False
        if not self.event_idx:
            self._device_event[1] = EVENT_ENABLE
            self.memory.touched(self.used, 4)
            with self._fence:  # the wish is visible before the ring is looked at, as for the split ring
                pass
            return self._available()
        self._arm()
        return self._available()

    def _arm(self) -> bool:
        """The ring is empty: ask for a notification of the next request. Whether one came meanwhile."""
        if not self.event_idx:
            return False
        self._device_event[0] = self._avail_at | self._avail_wrap << 15
        self._device_event[1] = EVENT_DESC
        self.memory.touched(self.used, 4)
        with self._fence:
            pass
        return self._available()

    def flush(self) -> None:
        new, wrap = self._used_at, self._used_wrap
        old, old_wrap = self._signalled_at, self._signalled_wrap
        if new == old and wrap == old_wrap:
            return
        with self._fence:  # what was used is visible before the driver's wish is read
            pass
        self._signalled_at, self._signalled_wrap = new, wrap
        flags = self._driver_event[1] & 3
        if flags == EVENT_DESC and self.event_idx:
            # Positions on a line without wraps: `new` is at or behind `old`, at most one ring further (2.8.10).
            event = self._driver_event[0]
            size = self.size
            ahead = new - old if wrap == old_wrap else new + size - old
            where = (event & 0x7FFF) - old if bool(event >> 15) == old_wrap else (event & 0x7FFF) + size - old
            wanted = 0 <= where < ahead
        else:
            wanted = flags != EVENT_DISABLE
        if wanted:
            self.notify()

    def _position(self) -> dict[str, Any]:
        return {
            "next_avail": self._avail_at | self._avail_wrap << 15,
            "next_used": self._used_at | self._used_wrap << 15,
            "signalled": self._signalled_at | self._signalled_wrap << 15,
        }

    def _set_position(self, state: dict[str, Any]) -> None:
        positions = []
        for name in ("next_avail", "next_used", "signalled"):
            value = int(state[name])
            if value & 0x7FFF >= self.size:
                raise GuestFault(f"queue {self.index}: a position of {value & 0x7FFF} in a ring of {self.size}")
            positions.append((value & 0x7FFF, bool(value >> 15)))
        (self._avail_at, self._avail_wrap), (self._used_at, self._used_wrap) = positions[:2]
        self._signalled_at, self._signalled_wrap = positions[2]
