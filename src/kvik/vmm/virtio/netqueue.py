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

from collections import deque
from struct import Struct

from kvik.vmm.backends.net import HEADER, MAX_FRAME, MAX_PACKET, BackendGone
from kvik.vmm.faults import GuestFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.loop import Timer
    from kvik.vmm.ratelimit import RateLimiter
    from kvik.vmm.virtio.net import NetDevice
    from kvik.vmm.virtio.queue import Chain, Queue

_BUDGET = 256  # packets before other devices of the loop have their turn
_MAX_FAILURES = 1024  # of reads without one that succeeds: a descriptor that stays readable and broken would spin
_BATCH = 32  # packets received before the driver hears of them
_MAX_SPREAD = 64  # buffers given to one read
_AHEAD = 16  # buffers popped at once, at least
_MAX_PARTS = 512  # buffers in one readv, whose limit is IOV_MAX = 1024; a chain has no more than a queue's 512
_NUM_BUFFERS = Struct("<H").pack
_ONE = _NUM_BUFFERS(1)


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
    """Backend -> driver. Buffers are popped ahead into a stash: a packet of 64 KiB needs dozens of them.

    A packet is read into the first few buffers of the stash and a private overflow behind them, so that small packets
    cost few buffers' work and none is cut. What landed in the overflow is copied to further buffers; if the driver has
    none yet, the packet waits for them.
    """

    def __init__(self, device: NetDevice, pair: int, queue: Queue, limiter: RateLimiter, *, mergeable: bool) -> None:
        super().__init__(device, pair, queue, limiter)
        self.mergeable = mergeable
        self.stash: deque[Chain] = deque()
        self.starved = False
        self._spread = 2  # chains given to the next read
        self._overflow = memoryview(bytearray(MAX_PACKET))
        self._size = 0  # bytes of a packet that waits for buffers, of which ...
        self._placed = 0  # ... so many lie in the stash, the rest in the overflow
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
                if len(self.stash) < self._spread:
                    self._fill_stash(self._spread if self.mergeable else 1)
                    if not self.stash:
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

    def _fill_stash(self, wanted: int) -> None:
        """Up to `wanted` chains, as far as the driver gave some; if fewer, its next notification is armed."""
        stash, queue = self.stash, self.queue
        missing = wanted - len(stash)
        while missing > 0:
            chains = queue.pop_many(max(missing, _AHEAD))
            if not chains:
                if not queue.enable_notifications():
                    break
                chains = queue.pop_many(max(missing, _AHEAD))
                queue.disable_notifications()
                if not chains:
                    break  # the driver took its index back
            for chain in chains:
                if chain.writable_size < HEADER or chain.readable:
                    raise GuestFault(f"a receive buffer of {chain.writable_size} writable bytes")
            stash += chains
            missing -= len(chains)

    def _receive(self) -> None:
        """Read a packet: sets `_size` and `_placed`."""
        buffers: list[memoryview] = []
        room = 0
        wanted = self._spread if self.mergeable else 1
        for chain in self.stash:
            buffers += chain.writable
            room += chain.writable_size
            wanted -= 1
            if not wanted or len(buffers) >= _MAX_PARTS:
                break
        buffers.append(self._overflow)
        size = self.device.backend.receive(self.pair, buffers)
        if size <= HEADER or not self.device.link:
            self.dropped += size > 0
            return
        self._size, self._placed = size, min(size, room)

    def _deliver(self) -> bool:
        """Hand the packet that was read to the driver; False if that takes more buffers than there are."""
        size, stash, queue = self._size, self.stash, self.queue
        limit = queue.size if self.mergeable else 1
        shares: list[int] = []
        room = used = 0
        while room < size:
            if used == limit:  # larger than all that the driver could ever give
                self._size = 0
                self.dropped += 1
                return True
            if used == len(stash):
                self._fill_stash(used + 1)
                if used == len(stash):
                    return False
            share = min(stash[used].writable_size, size - room)
            shares.append(share)
            room += share
            used += 1
        self._size = 0
        if self._placed < size:  # the overflow is copied once all its buffers are there
            self._copy_rest(self._overflow[: size - self._placed], shares)
        stash[0].write(_ONE if used == 1 else _NUM_BUFFERS(used), 10)
        if used == 1:
            queue.push(stash.popleft(), size)
        else:
            queue.push_all([stash.popleft() for _ in shares], shares)
        # As many as this one took, less only slowly: acknowledgements come among full packets.
        self._spread = max(min(used + 1, _MAX_SPREAD), self._spread * 3 >> 2)
        self.packets += 1
        self.bytes += size - HEADER
        if self.limiter.limited:
            self.limiter.spend(size - HEADER)
        return True

    def _copy_rest(self, rest: memoryview, shares: list[int]) -> None:
        """Copy the overflow to where it belongs: from byte `_placed` of the packet on."""
        start = 0
        for chain, share in zip(self.stash, shares, strict=False):
            end = start + share
            if end > self._placed:
                inside = max(self._placed - start, 0)
                count = share - inside
                chain.write(rest[:count], inside)
                rest = rest[count:]
            start = end

    def _starve(self) -> None:
        """No buffers; `_fill_stash` has armed the driver's notification."""
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
        self.stash.clear()
        self._size = 0
        self.starved = True  # until the driver puts buffers into the new queue

    def give_back(self) -> None:
        """Undo the pops of the stash, so that no request is in flight; a packet that waits is lost, as on a wire."""
        while self.stash:
            self.queue.undo_pop(self.stash.pop())
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
