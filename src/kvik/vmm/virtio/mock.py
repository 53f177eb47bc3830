"""The driver's side of a virtqueue, in Python: for unit tests, benchmarks and fuzzers. Never part of a machine.

driver = MockDriver(memory, queue)                 # rings at `base`, the queue started on them
request = driver.add([b"read me"], [512])          # readable parts, sizes of writable parts
... the device works ...
for done in driver.collect():                      # in the order of the used ring
    done.written, done.data                        # bytes, contents of the writable parts
"""

from __future__ import annotations

import struct

from kvik.vmm.virtio.queue import (
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    EVENT_IDX,
    IN_ORDER,
    INDIRECT_DESC,
    RING_PACKED,
    VERSION_1,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvik.vmm.memory import GuestMemory
    from kvik.vmm.virtio.queue import Queue

__all__ = ["MockDriver", "MockRequest"]

_AVAIL, _USED = 1 << 7, 1 << 15


class MockRequest:
    """What was put into the ring, and, once it was used, what came of it."""

    __slots__ = ("count", "data", "head", "slots", "writable", "written")

    def __init__(self, head: int, count: int, writable: list[tuple[int, int]]) -> None:
        self.head, self.count, self.writable = head, count, writable
        self.slots = [head]  # descriptors of the table, or the buffer id, that are free again afterwards
        self.written = -1
        self.data = b""


class MockDriver:
    """Rings at `base`, buffers behind them, `area` bytes in all. Buffers are given out round and round: keep what is
    in flight smaller than the area."""

    def __init__(
        self,
        memory: GuestMemory,
        queue: Queue,
        *,
        base: int = 0x10000,
        area: int = 1 << 20,
        features: int = 0,
        start: bool = True,
    ) -> None:
        self.memory, self.queue = memory, queue
        self.size = queue.size
        self.features = features | VERSION_1
        self.indirect = bool(features & INDIRECT_DESC)
        self.event_idx = bool(features & EVENT_IDX)
        self.in_order = bool(features & IN_ORDER)
        self.packed = bool(features & RING_PACKED)
        self.desc, at = base, base + 16 * self.size
        self.avail = at
        at += 8 + 2 * self.size
        self.used = (at + 3) & ~3
        self._tables = (self.used + 8 + 8 * self.size + 15) & ~15  # one page of descriptors for each slot
        self.buffers = self._tables + 16 * 64 * self.size
        self.end = base + area
        if self.buffers + 4096 > self.end:
            raise ValueError("the area is too small for rings of this size")
        self.rewind()
        if start:
            queue.desc, queue.avail, queue.used = self.desc, self.avail, self.used
            queue.start(self.features)

    def rewind(self) -> None:
        """Empty rings."""
        self.memory.write(self.desc, bytes(self.buffers - self.desc))
        self._free = list(range(self.size - 1, -1, -1))
        self._next_buffer = self.buffers
        self._avail_index = self._used_index = 0
        self._kicked = 1 << 15 if self.packed else 0  # packed: position and wrap counter
        self._at, self._wrap, self._used_at, self._used_wrap = 0, True, 0, True
        self._room = self.size
        self.in_flight: dict[int, MockRequest] = {}

    # --- giving

    def _buffer(self, size: int) -> int:
        if self._next_buffer + size > self.end:
            self._next_buffer = self.buffers
        if self._next_buffer + size > self.end:
            raise ValueError(f"a buffer of {size} bytes does not fit into the area")
        address = self._next_buffer
        self._next_buffer = (address + size + 15) & ~15
        return address

    def add(self, readable: Sequence[bytes] = (), writable: Sequence[int] = ()) -> MockRequest:
        """Put a request into the ring. ValueError if it is full."""
        parts = []
        for data in readable:
            address = self._buffer(len(data))
            self.memory.write(address, data)
            parts.append((address, len(data), 0))
        targets = [(self._buffer(size), size) for size in writable]
        parts += [(address, size, DESC_WRITE) for address, size in targets]
        return self.add_raw(parts, targets)

    def add_raw(
        self, parts: Sequence[tuple[int, int, int]], targets: list[tuple[int, int]] | None = None
    ) -> MockRequest:
        """Put (address, length, flags) into the ring as they are: also what no honest driver would."""
        needed = 1 if self.indirect else len(parts)
        if self._room < needed or not parts:
            raise ValueError("the ring is full")
        head = self._free.pop()
        request = MockRequest(head, needed, targets or [])
        if self.packed:
            self._put_packed(request, parts)
        else:
            self._put_split(request, parts)
        self._room -= needed
        self.in_flight[head] = request
        return request

    def _table(self, head: int, parts: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
        """An indirect table in guest memory, as one descriptor."""
        if len(parts) > 64:
            raise ValueError("at most 64 descriptors in an indirect table")
        table, last = b"", len(parts) - 1
        for number, (address, length, flags) in enumerate(parts):
            more = DESC_NEXT if number < last else 0
            words = (0, flags) if self.packed else (flags | more, number + 1)  # id, flags; or flags, next
            table += struct.pack("<QIHH", address, length, *words)
        address = self._tables + 16 * 64 * head
        self.memory.write(address, table)
        return address, len(table), DESC_INDIRECT

    def _put_split(self, request: MockRequest, parts: Sequence[tuple[int, int, int]]) -> None:
        memory = self.memory
        if self.indirect:
            parts = [self._table(request.head, parts)]
        slots = [request.head] + [self._free.pop() for _ in parts[1:]]
        for number, (address, length, flags) in enumerate(parts):
            more, following = (DESC_NEXT, slots[number + 1]) if number + 1 < len(parts) else (0, 0)
            memory.write(self.desc + 16 * slots[number], struct.pack("<QIHH", address, length, flags | more, following))
        request.slots = slots
        memory.put_u16(self.avail + 4 + 2 * (self._avail_index % self.size), request.head)
        self._avail_index = (self._avail_index + 1) & 0xFFFF
        memory.put_u16(self.avail + 2, self._avail_index)

    def _put_packed(self, request: MockRequest, parts: Sequence[tuple[int, int, int]]) -> None:
        if self.indirect:
            parts = [self._table(request.head, parts)]
        writes = []
        for number, (address, length, flags) in enumerate(parts):
            more = DESC_NEXT if number + 1 < len(parts) else 0
            wrap = _AVAIL if self._wrap else _USED
            descriptor = struct.pack("<QIHH", address, length, request.head, flags | more | wrap)
            writes.append((self.desc + 16 * self._at, descriptor))
            self._at += 1
            if self._at == self.size:
                self._at, self._wrap = 0, not self._wrap
        for place, descriptor in reversed(writes):  # the first one last: it makes the chain available
            self.memory.write(place, descriptor)

    def wants_kick(self) -> bool:
        """Whether the device wants to be notified of what was added since the last call."""
        memory = self.memory
        if self.packed:
            offset, flags = memory.u16(self.used), memory.u16(self.used + 2) & 3
            old, self._kicked = self._kicked, self._at | self._wrap << 15
            if flags == 2:
                here = offset & 0x7FFF
                new_line = self._at + (0 if (old >> 15) == self._wrap else self.size)
                event_line = here + (0 if (old >> 15) == offset >> 15 else self.size)
                return (old & 0x7FFF) <= event_line < new_line
            return flags != 1
        old, self._kicked = self._kicked, self._avail_index
        if self.event_idx:
            event = memory.u16(self.used + 4 + 8 * self.size)
            return (self._avail_index - event - 1) & 0xFFFF < (self._avail_index - old) & 0xFFFF
        return not memory.u16(self.used) & 1

    # --- taking

    def collect(self) -> list[MockRequest]:
        """What the device has used since the last call. AssertionError if it used what was not given."""
        done = self._collect_packed() if self.packed else self._collect_split()
        for request in done:
            left, data = request.written, b""
            for address, size in request.writable:
                data += self.memory.read(address, min(size, max(left, 0)))
                left -= size
            request.data = data
            self._free.extend(reversed(request.slots))
            self._room += request.count
        return done

    def _collect_split(self) -> list[MockRequest]:
        done = []
        index = self.memory.u16(self.used + 2)
        while self._used_index != index:
            place = self.used + 4 + 8 * (self._used_index % self.size)
            head, written = struct.unpack("<II", self.memory.read(place, 8))
            assert head in self.in_flight, f"the device used {head}, which it was not given"
            request = self.in_flight.pop(head)
            request.written = written
            done.append(request)
            self._used_index = (self._used_index + 1) & 0xFFFF
        return done

    def _collect_packed(self) -> list[MockRequest]:
        done: list[MockRequest] = []
        while True:
            _, written, head, flags = struct.unpack("<QIHH", self.memory.read(self.desc + 16 * self._used_at, 16))
            if not bool(flags & _AVAIL) == bool(flags & _USED) == self._used_wrap or not self.in_flight:
                return done
            assert head in self.in_flight, f"the device used {head}, which it was not given"
            request = self.in_flight.pop(head)
            request.written = written
            done.append(request)
            self._used_at += request.count
            if self._used_at >= self.size:
                self._used_at, self._used_wrap = self._used_at - self.size, not self._used_wrap

    def ask(self, *, interrupts: bool) -> None:
        """Whether the device shall notify of used buffers; with EVENT_IDX: of the next one, or of one far away."""
        memory = self.memory
        if self.packed:
            if self.event_idx and interrupts:
                memory.put_u16(self.avail, self._used_at | self._used_wrap << 15)
                memory.put_u16(self.avail + 2, 2)
            else:
                memory.put_u16(self.avail + 2, 0 if interrupts else 1)
        elif self.event_idx:
            event = self._used_index if interrupts else self._used_index - 1
            memory.put_u16(self.avail + 4 + 2 * self.size, event & 0xFFFF)
        else:
            memory.put_u16(self.avail, 0 if interrupts else 1)
