"""The reset loop: a machine goes back to a checkpoint in place, by the pages that changed since.

For fuzzing, for teaching, for a test that needs a fresh guest each time: a reset costs milliseconds, and in proportion
to what the guest did. Disks, networks and files that the guest wrote to are outside: give it disks that are read-only
or not worth keeping.
"""

from __future__ import annotations

import ctypes

from kvik.errors import OperationInvalid
from kvik.vmm.layout import MIB, PAGE
from kvik.vmm.memory import map_memory, unmap_memory
from kvik.vmm.state.capture import apply, capture
from kvik.vmm.state.dirty import DirtyPages, page_runs
from kvik.vmm.state.memory_file import data_runs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.machine import Machine
    from kvik.vmm.memory import Region

__all__ = ["Checkpoint"]

_PRIVATE_ANONYMOUS, _NORESERVE = 0x22, 0x4000


class Checkpoint:
    """A machine's state, and a copy of its RAM beside it: pages of zeroes take no room."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.dirty = DirtyPages(machine)
        self._copies: dict[int, tuple[Region, int]] = {}  # by the region's start: it, and where its copy lies
        with machine.paused():
            try:
                self.dirty.start()
                self.state = capture(machine)
                for region in machine.memory.regions:
                    copy = map_memory(region.size, _PRIVATE_ANONYMOUS | _NORESERVE, align=2 * MIB)
                    self._copies[region.start] = region, copy
                    for offset, size in data_runs(region):
                        ctypes.memmove(copy + offset, region.address + offset, size)
                # What the pause itself wrote (requests that ended) is in the copy: it is no change.
                self.dirty.take()
            except BaseException:
                self.close()
                raise

    def rewind(self) -> int:
        """Go back; how many pages had changed. The guest goes on if it ran."""
        machine = self.machine
        if self.dirty.changed_layout or self.state["devices"].keys() != machine.devices.keys():
            raise OperationInvalid(
                "memory or devices came or went since the checkpoint", remedy="take the checkpoint behind the change"
            )
        pages = 0
        with machine.paused():
            if machine.status in ("shutdown", "guest-panicked", "internal-error"):
                machine.status = "paused"
            for region, bitmap in self.dirty.take():
                copy = self._copies[region.start][1]
                for page, count in page_runs(bitmap):
                    ctypes.memmove(region.address + page * PAGE, copy + page * PAGE, count * PAGE)
                    pages += count
            apply(machine, self.state, "the checkpoint", identity=False, same=True)
        return pages

    def close(self) -> None:
        self.dirty.stop()
        for region, copy in self._copies.values():
            unmap_memory(copy, region.size)
        self._copies.clear()
