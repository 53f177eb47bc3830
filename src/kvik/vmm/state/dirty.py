"""Which pages of RAM changed: by the guest, by this process, by the kernel's vhost.

    who writes              who knows it
    the guest               KVM's dirty log, one bitmap a slot (api.rst 4.8)
    this process            `GuestMemory.write` and `touched`, which tell `dirty_log`
    vhost                   its own bitmap, which `vhost.Rings.take_log` hands to `touched`
    vhost-user              the same, in a memfd (`virtio.vhost_user.VhostUserDevice.take_log`)

KVM protects pages against writes again when it hands out the log, so a page costs its guest one fault a round.
"""

from __future__ import annotations

from kvik.errors import OperationInvalid, OperationUnsupported
from kvik.vmm.layout import PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from kvik.vmm.machine import Machine
    from kvik.vmm.memory import Region

__all__ = ["DirtyPages", "all_set", "clear_run", "page_runs"]

LOG_DIRTY_PAGES = 1  # KVM_MEM_LOG_DIRTY_PAGES
_BLOCK = 512  # bytes of bitmap that are compared with zeroes in one go: 16 MiB of RAM
_ZEROES = bytes(_BLOCK)


def page_runs(bitmap: bytes | bytearray | memoryview) -> Iterator[tuple[int, int]]:
    """(first page, pages) of each run of set bits. `bitmap` is a multiple of 8 bytes long. Made for bitmaps that are
    mostly empty: 0.4 ms for 64 GiB of RAM without a dirty page."""
    view = memoryview(bitmap).cast("B")
    first = end = -1
    for start in range(0, len(view), _BLOCK):
        block = bytes(view[start : start + _BLOCK])
        if block == _ZEROES[: len(block)]:
            continue
        for index, word in enumerate(memoryview(block).cast("Q"), start // 8):
            page = index * 64
            while word:
                low = (word & -word).bit_length() - 1
                word >>= low
                count = ((word + 1) & ~word).bit_length() - 1  # ones from here on
                word >>= count
                page += low
                if page == end:
                    end += count
                else:
                    if first >= 0:
                        yield first, end - first
                    first, end = page, page + count
                page += count
    if first >= 0:
        yield first, end - first


def _window(first: int, count: int) -> tuple[slice, int]:
    """The bytes of a bitmap that hold a run, and the run's mask among them."""
    start, stop = first >> 3, (first + count + 7) >> 3
    return slice(start, stop), ((1 << count) - 1) << (first & 7)


def all_set(bitmap: memoryview, first: int, count: int) -> bool:
    """Whether all bits of the run are set."""
    span, mask = _window(first, count)
    return int.from_bytes(bitmap[span], "little") & mask == mask


def clear_run(bitmap: memoryview, first: int, count: int) -> None:
    span, mask = _window(first, count)
    rest = int.from_bytes(bitmap[span], "little") & ~mask
    bitmap[span] = rest.to_bytes(span.stop - span.start, "little")


class DirtyPages:
    """Logs from `start` on. One at a time a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.regions: list[Region] = []
        self._bitmaps: list[bytearray] = []
        self._ours: set[int] = set()  # guest-physical page numbers
        self._vhosts: list[Any] = []

    def start(self) -> None:
        memory = self.machine.memory
        memory.require_whole("be copied")
        if memory.dirty_log is not None:
            raise OperationInvalid("the machine's dirty pages are logged already", remedy="one checkpoint or migration")
        self.regions = list(memory.regions)
        self._bitmaps = [bytearray(-(-region.size // PAGE // 64) * 8) for region in self.regions]
        devices: list[Any] = [self.machine.find(name) for name in self.machine.devices]
        served = [device for device in devices if hasattr(device, "start_log")]
        for device in served:
            if not device.logs:
                self.regions = []
                raise OperationUnsupported(
                    f"the back end of {device.name} ({device.kind}) does not tell which pages it writes",
                    remedy="unplug it first (device_del), or serve it by one that offers VHOST_F_LOG_ALL",
                )
        memory.dirty_log = self._touched
        # A device amid its work may not know of the log yet; whoever looks at RAM behind `start` sees that work.
        for device in list(self.machine.devices.values()):
            with device.lock:
                pass
        for region in self.regions:
            self.machine.back(region, LOG_DIRTY_PAGES)
        for carrier in self.machine.devices.values():
            vhost = getattr(getattr(carrier, "device", carrier), "vhost", None)
            if (rings := getattr(vhost, "rings", None)) is not None:
                rings.start_log()
                self._vhosts.append(rings)
        for device in served:
            device.start_log()
            self._vhosts.append(device)

    def _touched(self, address: int, size: int) -> None:
        """Any thread. The set is never exchanged for another: a page that came to the old one would be lost."""
        first = address // PAGE
        if size <= PAGE - address % PAGE:
            self._ours.add(first)
        else:
            self._ours.update(range(first, (address + size - 1) // PAGE + 1))

    @property
    def changed_layout(self) -> bool:
        """RAM came or went since `start`."""
        return self.regions != self.machine.memory.regions

    def take(self) -> list[tuple[Region, bytearray]]:
        """The bitmaps of what was written since the last call; they are overwritten by the next. Writes that come
        meanwhile are in this one or in the next."""
        for rings in self._vhosts:
            rings.take_log()
        ours = []
        while self._ours:
            ours.append(self._ours.pop())
        taken = []
        for region, bitmap in zip(self.regions, self._bitmaps, strict=True):
            self.machine.vm.get_dirty_log(region.slot, bitmap)
            taken.append((region, bitmap))
        for page in ours:
            for region, bitmap in taken:
                offset = page - region.start // PAGE
                if 0 <= offset < region.size // PAGE:
                    bitmap[offset >> 3] |= 1 << (offset & 7)
                    break
        return taken

    def stop(self) -> None:
        """No harm if it never started. Pages are written without faults again."""
        if not self.regions:
            return
        self.machine.memory.dirty_log = None
        for rings in self._vhosts:
            rings.stop_log()
        for region in self.regions:
            if region in self.machine.memory.regions and region.slot >= 0:
                self.machine.back(region)
        self.regions, self._vhosts = [], []
