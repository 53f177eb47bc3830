"""Host I/O through the kernel's io_uring (io_uring_setup(2), io_uring_enter(2)): a batch of requests for one call.

Only reads, writes and flushes go through the ring; what has several steps (discard, zeroes, the rest of a short
transfer) goes to a thread pool that starts no thread until then. The ring's descriptor is readable while results
wait, so it is what the device's loop watches: no eventfd, no notice lost.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import struct

from kvik.vmm.backends.pool import ThreadPool
from kvik.vmm.backends.request import FLUSH, IOV_MAX, READ, advance

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.backends.request import Request

__all__ = ["Uring"]

SYS_IO_URING_SETUP, SYS_IO_URING_ENTER = 425, 426
IORING_OFF_SQ_RING, IORING_OFF_SQES = 0, 0x10000000
IORING_FEAT_SINGLE_MMAP, IORING_FEAT_NODROP = 1 << 0, 1 << 1
IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC, IORING_OP_READ, IORING_OP_WRITE = 1, 2, 3, 22, 23
IORING_FSYNC_DATASYNC = 1
IOSQE_ASYNC = 1 << 4
LARGE = 512 << 10  # bytes of a buffered transfer that a thread of the kernel's copies: several go on beside each other

# struct io_uring_params: sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, 3 reserved,
# then the offsets: sq head, tail, ring_mask, ring_entries, flags, dropped, array, reserved, user address;
# cq head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved, user address.
_PARAMS = struct.Struct("=10I 8IQ 8IQ")
# struct io_uring_sqe: opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data, 24 bytes that are zero here.
_SQE = struct.Struct("=BBHiQQIIQ24x")
_CQE = struct.Struct("=QiI")  # struct io_uring_cqe: user_data, res, flags
_IOVEC = struct.Struct("=QQ")

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_long = ctypes.c_long
_byte = ctypes.c_char


class Uring:
    """Not for two threads at once: the device's lock guards it."""

    name = "io_uring"

    def __init__(self, entries: int = 256) -> None:
        """`OSError` where the kernel has no io_uring or forbids it (sysctl kernel.io_uring_disabled, seccomp)."""
        params = ctypes.create_string_buffer(_PARAMS.size)
        self.fd = _syscall(_long(SYS_IO_URING_SETUP), _long(entries), ctypes.byref(params))
        if self.fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"io_uring_setup: {os.strerror(number)}")
        values = _PARAMS.unpack(params.raw)
        self.entries: int = values[0]
        cq_entries: int = values[1]
        sq, cq = values[10:19], values[19:28]
        try:
            if not values[5] & IORING_FEAT_SINGLE_MMAP or not values[5] & IORING_FEAT_NODROP:
                raise OSError(errno.ENOSYS, "io_uring: a kernel older than 5.5")
            size = max(sq[6] + self.entries * 4, cq[5] + cq_entries * _CQE.size)
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._ring = mmap.mmap(self.fd, size, flags, offset=IORING_OFF_SQ_RING)
            self._sqes = mmap.mmap(self.fd, self.entries * _SQE.size, flags, offset=IORING_OFF_SQES)
        except OSError:
            os.close(self.fd)
            raise
        os.set_inheritable(self.fd, False)
        # x86 keeps stores in order and loads in order, and io_uring_enter is a full barrier: plain words suffice.
        self._words = memoryview(self._ring)[: size & ~3].cast("I")
        self._sq_tail, self._cq_head, self._cq_tail = sq[1] // 4, cq[0] // 4, cq[1] // 4
        self._sq_mask: int = self._words[sq[2] // 4]
        self._cq_mask: int = self._words[cq[2] // 4]
        self._cqes: int = cq[5]
        array = sq[6] // 4
        for index in range(self.entries):
            self._words[array + index] = index
        self._flying: dict[int, Request] = {}
        self._backlog: list[Request] = []
        self._queued = 0
        self._next = 0
        self._slow = ThreadPool(4)
        self._limit = cq_entries  # never more in flight than results have room

    @property
    def in_flight(self) -> int:
        return len(self._flying) + len(self._backlog) + self._slow.in_flight

    @property
    def fds(self) -> tuple[int, ...]:
        """Readable while results wait: the loop then has `reap` called."""
        return (self.fd, self._slow.fd)

    def submit(self, request: Request) -> None:
        """Queues it; `flush` sends what is queued."""
        op = request.op
        if op > FLUSH or len(request.buffers) > IOV_MAX:
            self._slow.submit(request)
        elif self._queued >= self.entries or len(self._flying) >= self._limit:
            self._backlog.append(request)
        else:
            self._queue(request)

    def _queue(self, request: Request) -> None:
        token = self._next
        self._next = token + 1
        self._flying[token] = request
        op, buffers = request.op, request.buffers
        if op == FLUSH:
            code, address, length, flags = IORING_OP_FSYNC, 0, 0, IORING_FSYNC_DATASYNC
        elif len(buffers) == 1:
            view = buffers[0]
            pinned = _byte.from_buffer(view)
            request.keep = pinned
            code = IORING_OP_READ if op == READ else IORING_OP_WRITE
            address, length, flags = ctypes.addressof(pinned), len(view), request.flags
        elif request.vector:  # the buffers, which the request holds, keep what it points to
            vector = ctypes.create_string_buffer(request.vector)
            request.keep = vector
            code = IORING_OP_READV if op == READ else IORING_OP_WRITEV
            address, length, flags = ctypes.addressof(vector), len(buffers), request.flags
        else:
            pins = [_byte.from_buffer(view) for view in buffers]
            vector = ctypes.create_string_buffer(
                b"".join(
                    [_IOVEC.pack(ctypes.addressof(pin), len(view)) for pin, view in zip(pins, buffers, strict=True)]
                )
            )
            request.keep = (pins, vector)
            code = IORING_OP_READV if op == READ else IORING_OP_WRITEV
            address, length, flags = ctypes.addressof(vector), len(buffers), request.flags
        words, position = self._words, self._sq_tail
        tail = words[position]
        _SQE.pack_into(
            self._sqes,
            (tail & self._sq_mask) * 64,
            code,
            IOSQE_ASYNC if request.length >= LARGE and request.buffered_fd < 0 else 0,
            0,
            request.fd,
            request.offset,
            address,
            length,
            flags,
            token,
        )
        words[position] = (tail + 1) & 0xFFFFFFFF
        self._queued += 1

    def flush(self) -> None:
        """Sends the batch, and completes at once whatever the kernel had at hand (cached reads)."""
        while self._queued:
            sent = _syscall(
                _long(SYS_IO_URING_ENTER), _long(self.fd), _long(self._queued), _long(0), _long(0), None, _long(0)
            )
            if sent < 0:
                number = ctypes.get_errno()
                if number == errno.EINTR:
                    continue
                if number not in (errno.EAGAIN, errno.EBUSY):
                    raise OSError(number, f"io_uring_enter: {os.strerror(number)}")
                if not self._collect():  # out of memory or of room for results: let some of them end first
                    select.select([self.fd], [], [], 0.01)
                continue
            self._queued -= sent
            self._collect()

    def reap(self) -> None:
        """Calls `done` of whatever is complete. The loop calls this when one of `fds` is readable."""
        self._collect()
        self._slow.reap()
        if self._queued:  # from the backlog
            self.flush()

    def _collect(self) -> int:
        words, ring = self._words, self._ring
        count = 0
        head = words[self._cq_head]
        while head != words[self._cq_tail]:
            token, result, _ = _CQE.unpack_from(ring, self._cqes + (head & self._cq_mask) * 16)
            head = (head + 1) & 0xFFFFFFFF
            words[self._cq_head] = head
            count += 1
            request = self._flying.pop(token)
            request.keep = None
            self._complete(request, result)
            head = words[self._cq_head]  # `done` may have submitted, flushed and so collected
        while self._backlog and self._queued < self.entries and len(self._flying) < self._limit:
            self._queue(self._backlog.pop(0))
        return count

    def _complete(self, request: Request, result: int) -> None:
        if result in (-errno.EAGAIN, -errno.EINTR, -errno.EINVAL):
            self._slow.submit(request)
            return
        if result >= 0 and request.op != FLUSH and result < request.length:
            # Short: the end of the file, a full disk, or more than one call transfers. The pool asks for the rest.
            request.buffers = advance(request.buffers, result)
            request.vector = b""
            request.offset += result
            request.length -= result
            self._slow.submit(request)
            return
        request.result = min(result, 0)
        if request.done is not None:
            request.done(request)

    def wait(self, seconds: float) -> bool:
        """Waits for one result or more and reaps. False: nothing came in that time."""
        self.flush()
        if not self.in_flight:  # sending the batch completed all of it: there is nothing to wait for
            return True
        ready = bool(select.select([self.fd, self._slow.fd], [], [], seconds)[0])
        self.reap()
        self.flush()
        return ready

    def close(self) -> None:
        if self.fd < 0:
            return
        while self.in_flight and self.wait(5):
            pass
        self._slow.close()
        self._words.release()
        self._ring.close()
        self._sqes.close()
        fd, self.fd = self.fd, -1
        os.close(fd)
