"""virtio-balloon (virtio 1.2, 5.5): memory that the guest gives back, what it says about the rest, and pages that it
reports as free and the host takes without asking.

`num_pages` of the configuration space is what the host wants; the driver inflates (gives page numbers, which are
discarded here) or deflates (uses pages again, which then read as zeroes), and tells with `actual` how far it is.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import time

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.virtio.config import Field
from kvik.vmm.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State
    from kvik.vmm.virtio.queue import Chain, Queue

__all__ = ["Balloon"]

MUST_TELL_HOST, STATS_VQ, DEFLATE_ON_OOM, PAGE_REPORTING = 1 << 0, 1 << 1, 1 << 2, 1 << 5  # VIRTIO_BALLOON_F_*, 5.5.3
PAGE_SHIFT = 12  # the device's pages are 4 KiB whatever the guest's are
PAGE = 1 << PAGE_SHIFT
MAX_PFNS = 64 << 10  # page numbers of one request; Linux sends 256
MAX_STATS = 64
_STAT = struct.Struct("<HQ")  # tag, value
ROUND = 64

# 5.5.6.3: the tags, in the words of QMP's guest-stats (qapi: GuestStats of virtio-balloon)
STATS = (
    "stat-swap-in",
    "stat-swap-out",
    "stat-major-faults",
    "stat-minor-faults",
    "stat-free-memory",
    "stat-total-memory",
    "stat-available-memory",
    "stat-disk-caches",
    "stat-htlb-pgalloc",
    "stat-htlb-pgfail",
)


class Balloon(VirtioDevice):
    """`deflate_on_oom`: a guest short of memory may take pages back. `reporting`: it tells which are free."""

    kind = "virtio-balloon"
    device_id = 5
    queue_sizes: tuple[int, ...] = (128, 128, 128, 128)
    config_fields = (
        Field("num_pages", 0, 4),
        Field("actual", 4, 4, writable=True),
        Field("free_page_hint_cmd_id", 8, 4),
        Field("poison_val", 12, 4, writable=True),
    )

    def __init__(self, name: str, *, deflate_on_oom: bool = True, reporting: bool = True) -> None:
        self.features = MUST_TELL_HOST | STATS_VQ
        self.features |= DEFLATE_ON_OOM if deflate_on_oom else 0
        self.features |= PAGE_REPORTING if reporting else 0
        if not reporting:
            self.queue_sizes = self.queue_sizes[:3]
        self.paused = False
        self.discards = True  # off while somebody relies on every page as it is (post-copy, a lazy snapshot)
        self.guest_stats: dict[str, int] = {}
        self.stats_time = 0.0  # seconds since the epoch; 0: none came yet
        self.interval = 0  # seconds between questions for statistics; 0: never
        self.inflated = self.deflated = self.reported = 0  # bytes since the start
        self._roles: list[str] = []
        self._held: Chain | None = None  # the statistics buffer: given back when fresh ones are wanted
        self._polls = 0
        self._cannot = ""
        super().__init__(name)

    def activate(self) -> None:
        # 5.5.2 numbers the queues, but drivers and QEMU leave no gap for a feature that was not negotiated.
        self._roles = ["inflate", "deflate"]
        self._roles += ["stats"] if self.has(STATS_VQ) else []
        self._roles += ["report"] if self.has(PAGE_REPORTING) else []
        self._held = None
        if "stats" in self._roles:
            # Linux puts its buffer and kicks before DRIVER_OK (init_vqs in its virtio_balloon.c), when nobody listens.
            index = self._roles.index("stats")
            self.loop.call_soon(lambda: self.kick(index))

    def deactivate(self) -> None:
        self._held = None

    def queue_reset(self, index: int) -> None:
        if index < len(self._roles) and self._roles[index] == "stats":
            self._held = None  # the buffer is the driver's again

    def reset(self) -> None:
        super().reset()
        self._held = None
        self.guest_stats, self.stats_time = {}, 0.0
        self.config["actual"] = 0

    def config_written(self, offset: int, size: int) -> None:
        if offset <= 7 and offset + size > 4 and self.machine is not None:
            self.machine.emit("BALLOON_CHANGE", {"actual": self.actual})

    # Queues ------------------------------------------------------------------------------------------------------

    def queue_kicked(self, index: int) -> None:
        if self.paused or index >= len(self._roles):
            return
        queue, role = self.queues[index], self._roles[index]
        if role == "stats":
            self._take_stats(queue)
            return
        for _ in range(ROUND):
            chain = queue.pop()
            if chain is None:
                self._rearm(queue)
                break
            if role == "inflate":
                self._inflate(chain)
            elif role == "deflate":
                self.deflated += chain.readable_size // 4 * PAGE
            else:
                self._report(chain)
            queue.push(chain, 0)
        else:
            self.loop.call_soon(lambda: self.kick(index))
        queue.flush()

    def _rearm(self, queue: Queue) -> None:
        """All is taken: let the driver kick again, and look once more if it put something meanwhile."""
        if queue.enable_notifications():
            self.loop.call_soon(lambda: self.kick(queue.index))

    def _inflate(self, chain: Chain) -> None:
        data = chain.read_all(4 * MAX_PFNS)
        frames = sorted(set(struct.unpack(f"<{len(data) // 4}I", data[: len(data) & ~3])))
        start = count = 0
        for frame in frames:
            if count and frame == start + count:
                count += 1
                continue
            if count:
                self._discard(start << PAGE_SHIFT, count << PAGE_SHIFT)
            start, count = frame, 1
        if count:
            self._discard(start << PAGE_SHIFT, count << PAGE_SHIFT)
        self.inflated += len(frames) * PAGE

    def _report(self, chain: Chain) -> None:
        for view in chain.writable:
            address = self._guest_address(view)
            start = (address + PAGE - 1) & -PAGE
            end = (address + len(view)) & -PAGE
            if start < end:
                self._discard(start, end - start)
                self.reported += end - start

    def _guest_address(self, view: memoryview) -> int:
        host = ctypes.addressof(ctypes.c_char.from_buffer(view))
        for region in self.memory.regions:
            if region.address <= host < region.address + region.size:
                return region.start + host - region.address
        raise AssertionError("a view that is not of guest memory")

    def _discard(self, address: int, size: int) -> None:
        """Give the host pages that the guest does not use. They may lie in several regions."""
        if not self.discards or self._cannot:
            self.memory.view(address, 1)
            return
        end = address + size
        while address < end:
            part = min(end, self.memory.find(address).end) - address
            try:
                self.memory.discard(address, part)
            except HostError as error:  # huge pages: they go only as a whole
                if error.errno == errno.EBUSY:  # memory that is still arriving: another time
                    return
                self._cannot = str(error)
                if self.machine is not None:
                    self.machine.log(f"{self.name}: pages are not given back to the host: {error}")
                return
            address += part

    # Statistics --------------------------------------------------------------------------------------------------

    def _take_stats(self, queue: Queue) -> None:
        while (chain := queue.pop()) is not None:
            if self._held is not None:
                queue.push(self._held, 0)
            self._held = chain
            data = chain.read_all(MAX_STATS * _STAT.size)
            found = _STAT.iter_unpack(data[: len(data) // _STAT.size * _STAT.size])
            self.guest_stats = {STATS[tag]: value for tag, value in found if tag < len(STATS)}
            self.stats_time = time.time()
        self._rearm(queue)
        queue.flush()

    def ask_for_stats(self) -> None:
        """Give the buffer back: the driver answers with fresh numbers."""
        with self.lock:
            held = self._held
            if held is None or not self.active or self.paused:
                return
            self._held = None
            queue = self.queues[self._roles.index("stats")]
            queue.push(held, 0)
            queue.flush()

    def set_interval(self, seconds: int) -> None:
        """Ask for statistics every so many seconds; 0: not any more (QMP guest-stats-polling-interval)."""
        if not 0 <= seconds <= 0xFFFFFFFF:
            raise InvalidArgument(f"a polling interval of {seconds} seconds")
        self.interval = seconds
        self._polls += 1
        if seconds:
            self._poll(self._polls)

    def _poll(self, generation: int) -> None:
        if generation == self._polls and self.interval and self.machine is not None:
            self.ask_for_stats()
            self.loop.call_later(self.interval, lambda: self._poll(generation))

    # Control -----------------------------------------------------------------------------------------------------

    @property
    def actual(self) -> int:
        """Bytes of memory that the guest has for itself (QMP query-balloon), of what it began with: virtio-mem's
        comes and goes on its own."""
        return max(self.memory.boot_size - (self.config["actual"] << PAGE_SHIFT), 0)

    def set_target(self, size: int) -> None:
        """Ask the guest to live with `size` bytes (QMP balloon)."""
        if size <= 0:
            raise InvalidArgument(f"a machine cannot be left {size} bytes of memory")
        pages = max(self.memory.boot_size - size, 0) >> PAGE_SHIFT

        def change() -> None:
            self.config["num_pages"] = pages

        self.config_changed(change)

    def pause(self) -> None:
        with self.lock:
            self.paused = True
            if self._held is not None:  # back into the queue, so that nothing is in flight
                self.queues[self._roles.index("stats")].undo_pop(self._held)
                self._held = None

    def resume(self) -> None:
        with self.lock:
            self.paused = False
        for index in range(len(self._roles)):
            self.loop.call_soon(lambda index=index: self.kick(index))  # type: ignore[misc]  # mypy: default of a lambda

    def restore(self, state: State) -> None:
        super().restore(state)
        self._held = None

    def stats(self) -> dict[str, int]:
        own = {"inflated_bytes": self.inflated, "deflated_bytes": self.deflated, "reported_bytes": self.reported}
        return {**super().stats(), **own}
