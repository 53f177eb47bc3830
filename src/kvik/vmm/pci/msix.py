"""MSI-X: a table of messages, one for each vector, and the pending bits of those that are masked (PCI 3.0, 6.8.2).

The table lies in pages that the guest reads without an exit. A vector's route in KVM is made when it is first used.
"""

from __future__ import annotations

import select
from _thread import RLock

from kvik.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvik.vmm.interrupts import Interrupts, MsiRoute

MAX_VECTORS = 256  # one page of table; the specification's limit is 2048
ENTRY = 16  # message address (8), message data (4), vector control (4)
CONTROL_MASKED = 1
ENABLE, FUNCTION_MASK = 1 << 15, 1 << 14  # of the capability's message control


class Msix:
    """The vectors of one function. The device's lock is held in all calls but `signal`, which any thread may call."""

    def __init__(self, vectors: int, table: memoryview) -> None:
        if not 0 < vectors <= MAX_VECTORS:
            raise InvalidArgument(f"{vectors} MSI-X vectors, where 1 to {MAX_VECTORS} are possible")
        self.vectors = vectors
        self.enabled = False
        self._function_masked = False
        self._table = table[: vectors * ENTRY]
        self._words = self._table.cast("I")
        self._open = [False] * vectors  # enabled and not masked in any way
        self._pending = 0
        self._lock = RLock()  # over _open, _pending and _routes; nothing else is locked under it
        self._routes: dict[int, MsiRoute] = {}
        self._polled: dict[int, int] = {}  # vector -> descriptor that somebody else signals
        self._interrupts: Interrupts | None = None
        self.on_enable: Callable[[], None] | None = None  # MSI-X was enabled or disabled
        self.reset()

    def attach(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    def reset(self) -> None:
        self.enabled = self._function_masked = False
        self._pending = 0
        self._table[:] = (b"\0" * 12 + b"\1\0\0\0") * self.vectors  # 6.8.2.9: masked after a reset
        self._update()

    # --- the device's side

    def signal(self, vector: int) -> None:
        """Interrupt the guest by a vector; remembered while it is masked. Nothing for a vector that is not there."""
        if not 0 <= vector < self.vectors:
            return
        if self._open[vector]:
            self._route(vector).signal()
            return
        with self._lock:
            if self._open[vector]:  # unmasked meanwhile
                self._route(vector).signal()
            elif self.enabled:
                self._pending |= 1 << vector

    def fd(self, vector: int) -> int:
        """An eventfd that interrupts by this vector, for the kernel or another process."""
        with self._lock:
            route = self._route(vector)
            if vector not in self._polled:
                self._polled[vector] = route.fd()
                if not self._open[vector]:
                    route.mask()
            return self._polled[vector]

    def _route(self, vector: int) -> MsiRoute:
        route = self._routes.get(vector)
        if route is not None:
            return route
        with self._lock:
            if vector not in self._routes:
                assert self._interrupts is not None
                made = self._interrupts.msi()
                low, high, data, _ = self._words[vector * 4 : vector * 4 + 4]
                made.update(high << 32 | low, data)
                self._routes[vector] = made
            return self._routes[vector]

    # --- the guest's side

    def set_control(self, control: int) -> None:
        """The guest wrote the message control of the capability."""
        was = self.enabled
        self.enabled, self._function_masked = bool(control & ENABLE), bool(control & FUNCTION_MASK)
        self._update()
        if was != self.enabled and self.on_enable is not None:
            self.on_enable()

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes to the table: whole and aligned double words or quad words only (6.8.2)."""
        if size not in (4, 8) or offset % size or offset + size > len(self._table):
            return
        for position in range(offset // 4, (offset + size) // 4):
            word = value & 0xFFFFFFFF
            value >>= 32
            self._words[position] = word & CONTROL_MASKED if position % 4 == 3 else word
        self._update_vector(offset // ENTRY, changed=True)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._table[offset : offset + size], "little")

    def read_pending(self, offset: int, size: int) -> int:
        """The guest reads the pending bit array."""
        pending = self._pending
        for vector, fd in self._polled.items():
            if not self._open[vector] and select.select([fd], [], [], 0)[0]:
                pending |= 1 << vector
        return pending >> 8 * offset & (1 << 8 * size) - 1

    def _update(self) -> None:
        for vector in range(self.vectors):
            self._update_vector(vector)

    def _update_vector(self, vector: int, changed: bool = False) -> None:
        with self._lock:
            low, high, data, control = self._words[vector * 4 : vector * 4 + 4]
            was = self._open[vector]
            now = self.enabled and not self._function_masked and not control & CONTROL_MASKED
            route = self._routes.get(vector)
            if route is not None and now and (changed or not was):
                route.update(high << 32 | low, data)
            self._open[vector] = now
            if route is not None and now != was and vector in self._polled:
                if now:
                    route.unmask()
                else:
                    route.mask()
            if now and self._pending >> vector & 1:
                self._pending &= ~(1 << vector)
                self._route(vector).signal()

    def state(self) -> dict[str, Any]:
        return {"table": bytes(self._table), "pending": self.read_pending(0, MAX_VECTORS // 8)}

    def restore(self, state: dict[str, Any], control: int) -> None:
        """`control` is the capability's, restored before. ValueError if the number of vectors differs."""
        if len(state["table"]) != len(self._table):
            raise ValueError(f"the state has {len(state['table']) // ENTRY} MSI-X vectors, the device {self.vectors}")
        self.reset()
        self._table[:] = state["table"]
        self._pending = int(state["pending"])
        for vector, route in self._routes.items():
            low, high, data, _ = self._words[vector * 4 : vector * 4 + 4]
            route.update(high << 32 | low, data)
        self.set_control(control)

    def close(self) -> None:
        for route in self._routes.values():
            route.close()
        self._routes.clear()
        self._polled.clear()
