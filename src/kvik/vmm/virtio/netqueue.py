"""virtio-net's own datapath: one receive queue and one transmit queue between guest memory and a backend.

Packets are read and written straight from and to guest memory. No wake-up is ever lost, because whenever a queue's
`run` returns, exactly one of these will call it again, and each is armed before the last look at its condition:

| it stopped because | what wakes it |
|---|---|
| the backend has no packet, or no room | the descriptor's readiness, which is level-triggered |
| the driver has put no buffer, no packet | the driver's notification: armed, then looked again (2.7.10.1) |
| the rate limit | a timer |
| it has worked long enough | `call_soon` |

A driver's notification that comes in another state is without meaning: what it tells of is found by the next `run`.
"""

from __future__ import annotations

from kvik.vmm.backends.net import HEADER, MAX_FRAME, MAX_PACKET, BackendGone, scatter
from kvik.vmm.backends.request import advance
from kvik.vmm.virtio.netbuffers import Chains, Singles, buffers_for

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.loop import Timer
    from kvik.vmm.ratelimit import RateLimiter
    from kvik.vmm.virtio.net import NetDevice
    from kvik.vmm.virtio.queue import Queue

_BUDGET = 256  # packets before other devices of the loop have their turn
_MAX_FAILURES = 1024  # of reads without one that succeeds: a descriptor that stays readable and broken would spin
_BATCH = 32  # packets received before the driver hears of them
_MAX_SPREAD = 64  # buffers given to one read
_AHEAD = 16  # buffers popped at once, at least
_MAX_PARTS = 512  # buffers in one readv, whose limit is IOV_MAX = 1024; a chain has no more than a queue's 512


class _Half:
    """What both directions share: their queue, what wakes them, their counters."""

    def __init__(self, device: NetDevice, pair: int, queue: Queue, limiter: RateLimiter) -> None:
        self.device = device
        self.pair = pair
        self.queue = queue
        self.limiter = limiter
        self.timer: Timer | None = None
        self.scheduled = False
        self.fd = device.backend.fd(pair)
        self.waiting = False  # for the descriptor
        self.closed = False

    def run(self) -> None:
        raise NotImplementedError

    def _later(self, seconds: float) -> None:
        self.timer = self.device.loop.call_later(seconds, self._timed)

    def _timed(self) -> None:
        self.timer = None
        self._guarded()

    def _soon(self) -> None:
        if not self.scheduled:
            self.scheduled = True
            self.device.loop.call_soon(self._turn)

    def _turn(self) -> None:
        self.scheduled = False
        self._guarded()

    def _guarded(self) -> None:
        """`run` from the loop, not from a kick."""
        if not self.closed:
            self.device.guarded(self.run)

    def stop(self) -> None:
        """Nothing wakes it any more."""
        self.closed = True
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self._unwatch()

    def _unwatch(self) -> None:
        raise NotImplementedError


class Receiver(_Half):
    """Backend -> driver. Buffers are popped ahead (netbuffers.py).

    A packet is read into the first few of them and a private overflow behind them, so that small packets cost few
    buffers' work and none is cut. What landed in the overflow is copied to further buffers; if the driver has none
    yet, the packet waits for them.
    """

    def __init__(self, device: NetDevice, pair: int, queue: Queue, limiter: RateLimiter, *, mergeable: bool) -> None:
        super().__init__(device, pair, queue, limiter)
        self.mergeable = mergeable
        self.buffers = buffers_for(queue)
        self.starved = False
        self._spread = 2  # buffers given to the next read
        self._overflow = memoryview(bytearray(MAX_PACKET))
        self._size = 0  # bytes of a packet that waits for buffers, of which ...
        self._placed = 0  # ... so many lie in the buffers, the rest in the overflow
        self.failures = 0  # of reads, one behind the other
        self.packets = self.bytes = self.dropped = 0

    def kick(self) -> None:
        """The driver put buffers."""
        if self.starved:
            self.starved = False
            self.queue.disable_notifications()
            self.run()

    def run(self) -> None:
        if self.starved or not self.queue.ready:
            self._unwatch()
            return
        device, limiter = self.device, self.limiter
        limited = limiter.limited
        for count in range(_BUDGET):
            if not self._size:
                if limited and (wait := limiter.delay()):
                    self.queue.flush()
                    self._unwatch()
                    if self.timer is None:
                        self._later(wait)
                    return
                if len(self.buffers) < self._spread:
                    self._fill(self._spread if self.mergeable else 1)
                    if not len(self.buffers):
                        self._starve()
                        return
                try:
                    self._receive()
                except BlockingIOError:
                    self.queue.flush()
                    self._watch()
                    return
                except OSError as error:
                    self.dropped += 1
                    device.backend_errors += 1
                    self.failures += 1
                    if self.failures > _MAX_FAILURES:
                        raise BackendGone(f"reading fails again and again: {error.strerror}") from error
                    continue
                self.failures = 0
                if not self._size:
                    continue
            if not self._deliver():
                self._starve()
                return
            if count % _BATCH == _BATCH - 1:
                self.queue.flush()
        self.queue.flush()
        self._soon()

    def _fill(self, wanted: int) -> None:
        """Up to `wanted` buffers, as far as the driver gave some; if fewer, its next notification is armed."""
        queue = self.queue
        missing = wanted - len(self.buffers)
        while missing > 0:
            popped = self._pop(missing)
            if not popped:
                if not queue.enable_notifications():
                    break
                popped = self._pop(missing)
                queue.disable_notifications()
                if not popped:
                    break  # the driver took its index back
            missing -= popped

    def _pop(self, count: int) -> int:
        popped = self.buffers.fill(max(count, _AHEAD))
        if not popped and self.queue.pending() and isinstance(self.buffers, Singles):  # something that is not usual
            self.buffers.give_back()
            self.buffers = Chains(self.queue)
            popped = self.buffers.fill(max(count, _AHEAD))
        return popped

    def _receive(self) -> None:
        """Read a packet: sets `_size` and `_placed`."""
        views = self.buffers.views(self._spread if self.mergeable else 1)
        del views[_MAX_PARTS:]
        room = len(views[0])
        views.append(self._overflow)
        size = self.device.backend.receive(self.pair, views)
        if size <= HEADER or not self.device.link:
            self.dropped += size > 0
            return
        self._size = self._placed = size
        if size > room:
            self._placed = min(size, sum(map(len, views)) - len(self._overflow))

    def _deliver(self) -> bool:
        """Hand the packet that was read to the driver; False if that takes more buffers than there are."""
        size = self._size
        limit = self.queue.size if self.mergeable else 1
        while True:
            shares = self.buffers.shares(size, limit)
            used = len(shares)
            if sum(shares) == size:
                break
            if used == limit:  # larger than all that the driver could ever give
                self._size = 0
                self.dropped += 1
                return True
            self._fill(used + 1)
            if used == len(self.buffers):
                return False
        self._size = 0
        if self._placed < size:  # the overflow is copied once all its buffers are there
            rest = advance(self.buffers.views(used), self._placed)
            scatter(self._overflow[: size - self._placed], rest)
        self.buffers.use(shares)
        # As many as this one took, less only slowly: acknowledgements come among full packets.
        self._spread = max(min(used + 1, _MAX_SPREAD), self._spread * 3 >> 2)
        self.packets += 1
        self.bytes += size - HEADER
        if self.limiter.limited:
            self.limiter.spend(size - HEADER)
        return True

    def _starve(self) -> None:
        """No buffers; `_fill` has armed the driver's notification."""
        self.starved = True
        self.queue.flush()
        self._unwatch()

    def _watch(self) -> None:
        if not self.waiting:
            self.waiting = True
            self.device.loop.add_reader(self.fd, self._guarded)

    def _unwatch(self) -> None:
        if self.waiting:
            self.waiting = False
            self.device.loop.remove_reader(self.fd)

    def forget(self) -> None:
        """The driver took the queue back: its buffers are not ours any more."""
        self.buffers.clear()
        self._size = 0
        self.starved = True  # until the driver puts buffers into the new queue

    def give_back(self) -> None:
        """Undo the pops, so that no request is in flight; a packet that waits is lost, as on a wire."""
        self.buffers.give_back()
        self._size = 0


class Transmitter(_Half):
    """Driver -> backend."""

    def __init__(self, device: NetDevice, pair: int, queue: Queue, limiter: RateLimiter) -> None:
        super().__init__(device, pair, queue, limiter)
        self.packets = self.bytes = self.dropped = 0

    def kick(self) -> None:
        """The driver put packets."""
        if not (self.waiting or self.scheduled or self.timer is not None):
            self.run()

    def run(self) -> None:
        queue, device, limiter = self.queue, self.device, self.limiter
        if not queue.ready:  # reset by itself (RING_RESET): a kick comes when it is enabled
            self._unwatch()
            return
        backend, pair, limited, left = device.backend, self.pair, limiter.limited, _BUDGET
        try:
            if backend.unsent:
                backend.flush()
            while True:
                queue.disable_notifications()
                while left and (chain := queue.pop()) is not None:
                    left -= 1
                    size = chain.readable_size - HEADER
                    if not 0 < size <= MAX_FRAME or not device.link:
                        self.dropped += 1
                        queue.push(chain, 0)
                        continue
                    if limited and (wait := limiter.take(size)):
                        queue.undo_pop(chain)
                        queue.flush()
                        self._unwatch()
                        if self.timer is None:
                            self._later(wait)
                        return
                    try:
                        backend.send(pair, chain.readable)
                    except (BlockingIOError, BackendGone):
                        queue.undo_pop(chain)
                        if limited:
                            limiter.refund(size)
                        raise
                    except OSError:
                        self.dropped += 1
                        device.backend_errors += 1
                    else:
                        self.packets += 1
                        self.bytes += size
                    queue.push(chain, 0)
                queue.flush()
                if not left:
                    self._unwatch()
                    self._soon()
                    return
                if not queue.enable_notifications():
                    break
        except BlockingIOError:
            queue.flush()
            self._watch()
            return
        if backend.unsent:
            self._watch()
        else:
            self._unwatch()

    def _watch(self) -> None:
        if not self.waiting:
            self.waiting = True
            self.device.loop.add_writer(self.fd, self._guarded)

    def _unwatch(self) -> None:
        if self.waiting:
            self.waiting = False
            self.device.loop.remove_writer(self.fd)
