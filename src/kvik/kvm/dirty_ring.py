"""The dirty ring of one vCPU: which pages it wrote, without scanning (api.rst 8.29, KVM_CAP_DIRTY_LOG_RING)."""

from __future__ import annotations

import mmap
import struct

from kvik.kvm.constants import DIRTY_GFN_DIRTY, DIRTY_GFN_RESET, DIRTY_LOG_PAGE_OFFSET

_ENTRY = struct.Struct("<IIQ")  # struct kvm_dirty_gfn: flags, slot, offset


class DirtyRing:
    """The ring in the vCPU's mapping. The kernel fills entries in turn; what was taken is free for it only after
    `Vm.reset_dirty_rings`, which also makes writes to those pages count anew."""

    def __init__(self, fd: int, size: int) -> None:
        """`size` in bytes, as enabled on the machine."""
        offset = DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        self._entries = size // _ENTRY.size
        self._next = 0

    def close(self) -> None:
        self._map.close()

    def take(self) -> list[tuple[int, int]]:
        """(slot, page in it) of each write since the last call, in order. The slot's upper 16 bits are the address
        space. x86 keeps stores in order, so seeing the flag means the rest of the entry is there."""
        taken: list[tuple[int, int]] = []
        entries, view = self._entries, self._map
        while len(taken) < entries:
            place = self._next % entries * _ENTRY.size
            flags, slot, page = _ENTRY.unpack_from(view, place)
            if flags & (DIRTY_GFN_DIRTY | DIRTY_GFN_RESET) != DIRTY_GFN_DIRTY:
                break
            taken.append((slot, page))
            struct.pack_into("<I", view, place, DIRTY_GFN_RESET)
            self._next += 1
        return taken
