"""Numbers of KVM's memory slots, and the read-only ones that answer a guest's reads without an exit."""

from __future__ import annotations

import ctypes
import mmap
from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.kvm.vm import Vm

__all__ = ["MemorySlots", "Pages"]

_MEM_READONLY = 1 << 1


class MemorySlots:
    """Hands out slot numbers of one machine; any thread.

    `readonly`: the kernel has KVM_CAP_READONLY_MEM (api.rst 4.35). Without it `show` does nothing, and every access
    to such pages arrives as MMIO, which is slower and nothing else.
    """

    def __init__(self, vm: Vm, *, readonly: bool, limit: int = 32764) -> None:
        self._vm, self._readonly, self._limit = vm, readonly, limit
        self._lock = allocate_lock()
        self._free: list[int] = []
        self._next = 0

    def take(self) -> int:
        """An unused slot number; -1 if there are none left."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._next >= self._limit:
                return -1
            self._next += 1
            return self._next - 1

    def give(self, slot: int) -> None:
        """The slot is deleted, its number free again."""
        with self._lock:
            self._free.append(slot)

    def show(self, guest_address: int, size: int, address: int) -> int:
        """Let the guest read `size` bytes of this process without an exit; its writes still arrive as MMIO.
        The slot, or -1 where that cannot be had."""
        if not self._readonly or (slot := self.take()) < 0:
            return -1
        try:
            self._vm.set_user_memory_region(slot, guest_address, size, address, _MEM_READONLY)
        except OSError:  # it overlaps RAM or another slot: then as plain MMIO
            self.give(slot)
            return -1
        return slot

    def hide(self, slot: int) -> None:
        """Undo `show`: from now on reads exit. They are complete when this returns (KVM waits for all vCPUs)."""
        self._vm.set_user_memory_region(slot, 0, 0, 0)
        self.give(slot)


class Pages:
    """Pages of registers in this process, shown to the guest at one place of its address space or none."""

    __slots__ = ("_slot", "_slots", "address", "at", "size", "view")

    def __init__(self, size: int) -> None:
        self.size = size
        place = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # the view keeps it
        self.address = ctypes.addressof(ctypes.c_ubyte.from_buffer(place))
        self.view = memoryview(place)
        self.at = -1  # guest-physical, -1: nowhere
        self._slot = -1
        self._slots: MemorySlots | None = None

    def place(self, slots: MemorySlots | None, guest_address: int) -> None:
        """Show the pages at `guest_address`; -1: nowhere."""
        self.hide()
        self._slots, self.at = slots, guest_address
        self.show()

    def hide(self) -> None:
        """Reads exit until `show`: a change of more than one register is then seen whole or not at all."""
        if self._slots is not None and self._slot >= 0:
            self._slots.hide(self._slot)
            self._slot = -1

    def show(self) -> None:
        if self._slots is not None and self.at >= 0 and self._slot < 0:
            self._slot = self._slots.show(self.at, self.size, self.address)

    @property
    def shown(self) -> bool:
        """Whether the guest reads without an exit."""
        return self._slot >= 0
