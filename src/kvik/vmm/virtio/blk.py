"""virtio-blk (virtio 1.2, 5.2): a disk.

A request is a header of 16 bytes, data, and a status byte, however the driver cut them into descriptors. It becomes
one `Request` to the image (one for each segment of a discard), and is pushed when that is done. The guest's numbers
are checked against the image's size as it is now, not against what the configuration space says.

The image's engine may be used by any thread that holds `lock`: the loop (kicks, completions), the thread that pauses
the machine, and a vCPU that resets the device. The last two wait until nothing is in flight, because the kernel writes
into guest memory until then.
"""

from __future__ import annotations

import errno
import os
import struct
import time

from kvik.errors import InvalidArgument, OperationInvalid, OperationTimeout
from kvik.vmm.backends.block_stats import BlockStats
from kvik.vmm.backends.request import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES, Request
from kvik.vmm.ratelimit import RateLimiter
from kvik.vmm.virtio.blkburst import BATCH_BYTES, HAND_OVER, REQUEST_COST, SECTOR, T_IN, T_OUT, serve
from kvik.vmm.virtio.config import Field
from kvik.vmm.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.backends.block import BlockImage
    from kvik.vmm.blk.block_jobs import BlockJobs
    from kvik.vmm.blk.overlay import Overlays
    from kvik.vmm.device import State
    from kvik.vmm.loop import EventLoop
    from kvik.vmm.machine import Machine
    from kvik.vmm.virtio.queue import Chain, Queue

__all__ = ["Blk"]

SEG_MAX, BLK_SIZE, TOPOLOGY, RO = 1 << 2, 1 << 6, 1 << 10, 1 << 5  # VIRTIO_BLK_F_*, 5.2.3
F_FLUSH, CONFIG_WCE, MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 9, 1 << 11, 1 << 12, 1 << 13, 1 << 14

T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 4, 8, 11, 13  # VIRTIO_BLK_T_*, 5.2.6
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2
_HEADER = struct.Struct("<IIQ")  # type, reserved, sector
_unpack_header = _HEADER.unpack_from
_SEGMENT = struct.Struct("<QII")  # sector, num_sectors, flags
F_UNMAP = 1
_clock = time.monotonic_ns
ID_BYTES = 20

MAX_SEGMENTS = 64  # of one discard or write-zeroes
MAX_RANGE_SECTORS = (1 << 30) // SECTOR  # of one segment: bounds how long one request takes
ROUND = 512  # requests of one turn: then others on the loop have theirs
DRAIN_SECONDS = 30.0

POLICIES = ("report", "stop", "ignore", "enospc")  # QEMU's rerror= and werror=

FIELDS = (
    Field("capacity", 0, 8),  # sectors
    Field("size_max", 8, 4),
    Field("seg_max", 12, 4),
    Field("geometry", 16, 4),
    Field("blk_size", 20, 4),
    Field("physical_block_exp", 24, 1),
    Field("alignment_offset", 25, 1),
    Field("min_io_size", 26, 2),  # logical blocks
    Field("opt_io_size", 28, 4),  # logical blocks
    Field("writeback", 32, 1, writable=True),
    Field("unused0", 33, 1),
    Field("num_queues", 34, 2),
    Field("max_discard_sectors", 36, 4),
    Field("max_discard_seg", 40, 4),
    Field("discard_sector_alignment", 44, 4),
    Field("max_write_zeroes_sectors", 48, 4),
    Field("max_write_zeroes_seg", 52, 4),
    Field("write_zeroes_may_unmap", 56, 1),
)


class _Operation:
    """One request of the guest while it is worked on."""

    __slots__ = ("began", "chain", "left", "op", "queue", "ranges", "result", "size", "status")

    def __init__(self, op: int, queue: Queue, chain: Chain, status: memoryview, size: int) -> None:
        self.op, self.queue, self.chain, self.status, self.size = op, queue, chain, status, size
        self.began = _clock()
        self.ranges: list[tuple[int, int, bool]] = []  # offset, length, may unmap
        self.left = 0
        self.result = 0


class Blk(VirtioDevice):
    """A disk on `image`. `serial` is what the guest reads as its identity (20 bytes). `loop`: of an I/O thread that
    serves this disk alone; without it the machine's own.

    `rerror`, `werror`: what a failed read or write does: "report" it to the guest, "stop" the machine with status
    io-error and try again when it goes on, "ignore" it; "enospc" stops when the host is full, else reports.
    """

    kind = "virtio-blk"
    device_id = 2
    pci_class = 0x010000
    config_fields = FIELDS

    def __init__(
        self,
        name: str,
        image: BlockImage,
        *,
        serial: str = "",
        queues: int = 1,
        queue_size: int = 256,
        rerror: str = "report",
        werror: str = "enospc",
        loop: EventLoop | None = None,
    ) -> None:
        if rerror not in POLICIES or werror not in POLICIES or rerror == "enospc":
            raise InvalidArgument(f"disk {name}: rerror={rerror}, werror={werror}: use report, stop or ignore")
        if not 1 <= queues <= 256 or not 4 <= queue_size <= 1024 or queue_size & (queue_size - 1):
            raise InvalidArgument(f"disk {name}: {queues} queues of {queue_size}: up to 256 of a power of 2 up to 1024")
        if len(serial.encode()) > ID_BYTES:
            raise InvalidArgument(f"disk {name}: the serial {serial!r} is longer than {ID_BYTES} bytes")
        self.image = image
        self.serial = serial
        self.rerror, self.werror = rerror, werror
        self.overlays: Overlays | None = None  # in kvik-vmm, once a new image was to be put on top
        self.block_jobs: BlockJobs | None = None  # there once one was begun
        self.block_stats = BlockStats()
        self.limits = {key: RateLimiter() for key in ("total", "read", "write")}
        self.paused = False
        self._private = loop is not None
        self._parked: list[_Operation] = []
        self._answered: dict[Queue, tuple[list[Chain], list[int]]] = {}  # done, and not yet shown to the driver
        self._waiting: set[int] = set()  # queues that wait for the rate limit
        self._limited = False
        self._copied = 0  # since the last `_publish`
        self._write_through = False
        self._started = False
        self.queue_sizes = (queue_size,) * queues
        self.features = SEG_MAX | BLK_SIZE | TOPOLOGY | F_FLUSH | CONFIG_WCE
        self.features |= MQ if queues > 1 else 0
        if image.read_only:
            self.features |= RO
        else:
            self.features |= F_WRITE_ZEROES | (F_DISCARD if image.can_discard else 0)
        if loop is not None:
            self.loop = loop
        super().__init__(name)
        self._fill_config()

    def _fill_config(self) -> None:
        config, image = self.config, self.image
        ratio = max(image.physical_block_size // image.block_size, 1)
        config["capacity"] = image.size // SECTOR
        config["seg_max"] = self.queue_sizes[0] - 2  # header and status take a descriptor each
        config["blk_size"] = image.block_size
        config["physical_block_exp"] = ratio.bit_length() - 1
        config["min_io_size"] = min(ratio, 0xFFFF)
        config["writeback"] = not image.sync
        config["num_queues"] = len(self.queue_sizes)
        config["max_discard_sectors"] = config["max_write_zeroes_sectors"] = MAX_RANGE_SECTORS
        config["max_discard_seg"] = config["max_write_zeroes_seg"] = MAX_SEGMENTS
        config["discard_sector_alignment"] = max(image.physical_block_size, 4096) // SECTOR
        config["write_zeroes_may_unmap"] = image.can_discard

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self.image.start(self.loop, private=self._private, on_ready=self._completions)
        self._started = True
        self._limits_changed()

    # The driver's side -------------------------------------------------------------------------------------------

    def activate(self) -> None:
        self._set_write_through()

    def _set_write_through(self) -> None:
        # 5.2.6.2: without FLUSH and CONFIG_WCE the driver cannot flush, so every write must reach the medium.
        if self.has(CONFIG_WCE):
            self._write_through = not self.config["writeback"]
        else:
            self._write_through = not self.has(F_FLUSH)

    def config_written(self, offset: int, size: int) -> None:
        self.config["writeback"] = self.config["writeback"] & 1
        self._set_write_through()

    def deactivate(self) -> None:
        self._parked.clear()
        self._drain("reset")
        self._parked.clear()
        self._answered.clear()

    def queue_reset(self, index: int) -> None:
        self._drain("queue reset")
        self._publish()
        self._parked = [operation for operation in self._parked if operation.queue.index != index]

    def reset(self) -> None:
        super().reset()
        if self._started:
            self.deactivate()
        self.config["writeback"] = not self.image.sync

    def queue_kicked(self, index: int) -> None:
        if self.paused or index in self._waiting:
            return
        queue, image, stats = self.queues[index], self.image, self.block_stats
        left = ROUND
        queue.disable_notifications()
        while True:
            while left:
                if not self._limited and (done := serve(queue, image, stats, left, write_through=self._write_through)):
                    left -= done
                    queue.flush()
                    continue
                chain = queue.pop()
                if chain is None:
                    break
                left -= 1
                if not self._begin(queue, chain):
                    left = -1
                    break
                if self._copied >= BATCH_BYTES:
                    self._publish()
            image.flush()
            self._publish()
            if left <= 0:
                if left == 0:  # the rest in the next round
                    self.loop.call_soon(lambda: self.kick(index))
                return
            if not queue.enable_notifications():
                return
            queue.disable_notifications()

    def _begin(self, queue: Queue, chain: Chain) -> bool:
        """Start one request. False: its queue must wait for the rate limit, and the request is back in it."""
        parts = chain.readable
        if parts and len(parts[0]) == 16:  # as all drivers cut it
            kind, _, sector = _unpack_header(parts.pop(0))
            chain.readable_size -= 16
        else:
            kind, _, sector = _HEADER.unpack(chain.take_front(16))
        status = chain.take_tail()
        if kind == T_IN:
            op, size, buffers = READ, chain.writable_size, chain.writable
        elif kind == T_OUT:
            op, size, buffers = WRITE, chain.readable_size, chain.readable
        else:
            self._begin_other(queue, chain, status, kind)
            return True
        if self._limited and (wait := self._admit(op, size)):
            queue.undo_pop(chain)
            self._wait(queue.index, wait)
            return False
        offset = sector * SECTOR
        image = self.image
        if not size or size % SECTOR or offset + size > image.size or (op == WRITE and image.read_only):
            self.block_stats.invalid[op] += 1
            self._answer(queue, chain, status, S_IOERR)
            return True
        began = _clock()
        # Else it is copied while the next one is looked at. Writes to one file do not go on beside each other.
        alone = size < HAND_OVER or not (queue.pending() or (op == WRITE and image.in_flight))
        if alone and image.now(op, buffers, offset, size, self._write_through):
            self.block_stats.done(op, size, offset + size, began)
            self._copied += size + REQUEST_COST
            self._answer(queue, chain, status, S_OK)
            return True
        operation = _Operation(op, queue, chain, status, size)
        operation.ranges.append((offset, size, False))
        self._issue(operation)
        if size >= HAND_OVER:  # copied while we look at the next one
            image.flush()
        return True

    def _begin_other(self, queue: Queue, chain: Chain, status: memoryview, kind: int) -> None:
        if kind == T_FLUSH:
            operation = _Operation(FLUSH, queue, chain, status, 0)
            operation.ranges.append((0, 0, False))
            self._issue(operation)
        elif kind == T_GET_ID:
            chain.write(self.serial.encode().ljust(ID_BYTES, b"\0"))
            self._answer(queue, chain, status, S_OK)
        elif kind == T_DISCARD and self.has(F_DISCARD):
            self._begin_ranges(queue, chain, status, DISCARD)
        elif kind == T_WRITE_ZEROES and self.has(F_WRITE_ZEROES):
            self._begin_ranges(queue, chain, status, WRITE_ZEROES)
        else:
            self._answer(queue, chain, status, S_UNSUPP)

    def _begin_ranges(self, queue: Queue, chain: Chain, status: memoryview, op: int) -> None:
        """A discard or write-zeroes: each segment is checked before the first is done (5.2.6.2)."""
        code = S_OK
        operation = _Operation(op, queue, chain, status, 0)
        if not 0 < chain.readable_size <= MAX_SEGMENTS * _SEGMENT.size or chain.readable_size % _SEGMENT.size:
            code = S_IOERR
        else:
            for sector, count, flags in _SEGMENT.iter_unpack(chain.read_all(MAX_SEGMENTS * _SEGMENT.size)):
                if flags & ~F_UNMAP or (op == DISCARD and flags):
                    code = S_UNSUPP
                elif count > MAX_RANGE_SECTORS or (sector + count) * SECTOR > self.image.size:
                    code = code or S_IOERR
                elif count:
                    operation.ranges.append((sector * SECTOR, count * SECTOR, bool(flags) and self.image.can_discard))
                    operation.size += count * SECTOR
        if code:
            self.block_stats.invalid[op] += 1
        if code or not operation.ranges:
            self._answer(queue, chain, status, code)
        else:
            self._issue(operation)

    # The image's side --------------------------------------------------------------------------------------------

    def _issue(self, operation: _Operation) -> None:
        """Give all parts of an operation to the image: anew, when it failed and is tried again."""
        operation.result = 0
        operation.left = len(operation.ranges)
        op, chain = operation.op, operation.chain
        buffers = chain.writable if op == READ else chain.readable
        for offset, length, unmap in operation.ranges:
            request = Request(op, offset, length, buffers, self._part_done, unmap=unmap)
            request.context = operation
            if op <= WRITE and length >= HAND_OVER and len(buffers) > 1:
                request.vector = chain.vector(length)
            if self.image.submit(request, write_through=self._write_through):
                self._part_done(request)

    def _part_done(self, request: Request) -> None:
        operation = request.context
        assert isinstance(operation, _Operation)
        operation.left -= 1
        operation.result = operation.result or request.result
        if not operation.left:
            self._finish(operation)

    def _finish(self, operation: _Operation) -> None:
        op = operation.op
        code = S_OK
        if operation.result:
            self.block_stats.failed[op] += 1
            if not self.active:
                return
            action = self._failed(operation)
            if action == "stop":
                self._parked.append(operation)
                return
            code = S_OK if action == "ignore" else S_IOERR
        else:
            offset, length, _ = operation.ranges[-1]
            self.block_stats.done(op, operation.size, offset + length, operation.began)
            if not self.active:  # the driver reset the device meanwhile: the rings are no longer ours
                return
        self._answer(operation.queue, operation.chain, operation.status, code)

    def _answer(self, queue: Queue, chain: Chain, status: memoryview, code: int) -> None:
        status[0] = code
        answers = self._answered.get(queue)
        if answers is None:
            answers = self._answered[queue] = ([], [])
        answers[0].append(chain)
        answers[1].append(chain.writable_size + 1)

    def _publish(self) -> None:
        """Show the driver what was answered, all at once. One by one it would take them one by one: a driver that is
        looking already asks anew for each, and every such small round costs a kick and an interrupt."""
        self._copied = 0
        if self._answered:
            answered, self._answered = self._answered, {}
            for queue, (chains, lengths) in answered.items():
                queue.push_all(chains, lengths)
                queue.flush()

    def _completions(self) -> None:
        """On the loop: the engine has results."""
        with self.lock:
            self.image.reap()
            self.image.flush()
            self._publish()

    def _failed(self, operation: _Operation) -> str:
        """What to do about a host's error: the action, told to the manager as QMP's BLOCK_IO_ERROR."""
        number = -operation.result
        policy = self.rerror if operation.op == READ else self.werror
        full = number in (errno.ENOSPC, errno.EDQUOT)
        if policy == "enospc":
            policy = "stop" if full else "report"
        machine = self.machine
        if machine is not None:
            event = {
                "device": self.name,
                "qom-path": f"/machine/{self.name}",
                "node-name": self.name,
                "operation": "read" if operation.op == READ else "write",
                "action": policy,
                "nospace": full,
                "reason": os.strerror(number),
            }
            if policy == "stop":
                machine.request_stop("io-error", "BLOCK_IO_ERROR", event)
            else:
                machine.emit("BLOCK_IO_ERROR", event)
        return policy

    # Pause, snapshot ---------------------------------------------------------------------------------------------

    def _drain(self, what: str) -> None:
        if not self.image.drain(DRAIN_SECONDS):
            raise OperationTimeout(
                f"disk {self.name}: host I/O on {self.image.name} has not ended for {DRAIN_SECONDS:.0f} s at {what}",
                remedy="look at the host's storage: the machine cannot go on before it answers",
            )

    def pause(self) -> None:
        with self.lock:
            self.paused = True
            self._drain("pause")
            self._publish()

    def resume(self) -> None:
        with self.lock:
            if self.overlays is not None:  # an image that was put on top meanwhile is there to stay
                self.overlays.keep()
            self.paused = False
            parked, self._parked = self._parked, []
        self.loop.call_soon(lambda: self._go_on(parked))

    def _go_on(self, parked: list[_Operation]) -> None:
        with self.lock:
            if not self.active:
                return
            for operation in parked:
                self._issue(operation)
            self.image.flush()
            self._publish()
            for queue in self.queues:
                self.kick(queue.index)

    def state(self) -> State:
        if self._parked:
            raise OperationInvalid(
                f"disk {self.name} stopped the machine with failed requests that wait to be tried again",
                remedy="mend the cause (space on the host?) and let the machine go on before saving it",
            )
        return {**super().state(), "limits": {key: limit.state() for key, limit in self.limits.items()}}

    def restore(self, state: State) -> None:
        super().restore(state)
        for key, limit in self.limits.items():
            if "limits" in state:  # not in that of a disk which another process served
                limit.restore(state["limits"][key])
        self._limits_changed()
        self.config["capacity"] = self.image.size // SECTOR  # the disk as it is, whatever the state says
        self._set_write_through()

    def close(self) -> None:
        with self.lock:
            super().close()
            if self.block_jobs is not None:
                self.block_jobs.close()
            if self.overlays is not None:
                self.overlays.close()
            self.image.close()
            self._started = False

    # Control -----------------------------------------------------------------------------------------------------

    def resize(self, size: int) -> None:
        """Make the disk `size` bytes long and tell the guest (QMP block_resize)."""
        with self.lock:
            self.image.resize(size)
            self._tell_capacity()

    def refresh_size(self) -> bool:
        """Somebody else resized the image: tell the guest. Whether it was so."""
        with self.lock:
            changed = self.image.refresh_size()
            if changed:
                self._tell_capacity()
            return changed

    def _tell_capacity(self) -> None:
        def change() -> None:
            self.config["capacity"] = self.image.size // SECTOR

        self.config_changed(change)

    def _limits_changed(self) -> None:
        self._limited = any(limit.limited for limit in self.limits.values())

    def set_limits(self, **limits: tuple[int, int, int, int]) -> None:
        """For "total", "read", "write": bytes a second, their burst, operations a second, their burst; 0: none."""
        with self.lock:
            for key, (size, size_burst, ops, ops_burst) in limits.items():
                self.limits[key].update(size, ops, bytes_burst=size_burst, ops_burst=ops_burst)
            self._limits_changed()

    def _admit(self, op: int, size: int) -> float:
        """0.0: go. Else the seconds to wait."""
        total, own = self.limits["total"], self.limits["read" if op == READ else "write"]
        if wait := total.take(size):
            return wait
        if wait := own.take(size):
            total.refund(size)
            return wait
        return 0.0

    def _wait(self, index: int, seconds: float) -> None:
        self._waiting.add(index)

        def again() -> None:
            self._waiting.discard(index)
            self.kick(index)

        self.loop.call_later(seconds, again)

    def stats(self) -> dict[str, int]:
        return {**super().stats(), **self.block_stats.report()}
