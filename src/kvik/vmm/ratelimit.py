"""Rate limits of disks and nets: token buckets for bytes and for operations, each with a burst.

A bucket holds at most `burst` tokens and gains `rate` a second. A request is admitted when both buckets hold what it
costs; else nothing is taken and the caller learns how long to wait. A request larger than a whole bucket is admitted
when that bucket is full and leaves it in debt, so it is slowed like any other and never stuck.

All arithmetic is on integers in billionths of a token, so the long-run rate is exact, and the clock is injected.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_NANO = 1_000_000_000


class TokenBucket:
    """`rate` tokens a second, at most `burst` saved up; `burst` 0 means what one second brings."""

    __slots__ = ("_balance", "_capacity", "_then", "burst", "rate")

    def __init__(self, rate: int, burst: int = 0, now: int = 0) -> None:
        if rate <= 0 or burst < 0:
            raise ValueError(f"a rate must be positive and a burst not negative: {rate}, {burst}")
        self.rate = rate
        self.burst = burst or rate
        self._capacity = self.burst * _NANO
        self._balance = self._capacity
        self._then = now

    def refill(self, now: int) -> None:
        """Add what the time since the last call brought; `now` in nanoseconds. A clock that steps back adds nothing."""
        if now > self._then:
            self._balance = min(self._capacity, self._balance + (now - self._then) * self.rate)
        self._then = now

    def wait(self, cost: int) -> int:
        """Nanoseconds until `cost` tokens are there; 0: now."""
        missing = min(cost * _NANO, self._capacity) - self._balance
        return -(-missing // self.rate) if missing > 0 else 0

    def take(self, cost: int) -> None:
        self._balance -= cost * _NANO

    @property
    def tokens(self) -> int:
        """Whole tokens left; negative while in debt."""
        return self._balance // _NANO

    def state(self) -> int:
        return self._balance

    def restore(self, balance: int, now: int) -> None:
        self._balance = min(self._capacity, balance)
        self._then = now


class RateLimiter:
    """What one direction of a net, or a disk, may do. Zero rates mean no limit; bytes and operations are independent.

        wait = limiter.take(len(packet))
        if wait:
            loop.call_later(wait, resume)

    Not thread-safe: it belongs to the loop of its device.
    """

    __slots__ = ("_bytes", "_clock", "_ops", "throttled")

    def __init__(
        self,
        bytes_per_second: int = 0,
        ops_per_second: int = 0,
        *,
        bytes_burst: int = 0,
        ops_burst: int = 0,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._clock = clock
        self._bytes: TokenBucket | None = None
        self._ops: TokenBucket | None = None
        self.throttled = 0  # requests that had to wait
        self.update(bytes_per_second, ops_per_second, bytes_burst=bytes_burst, ops_burst=ops_burst)

    def update(
        self, bytes_per_second: int = 0, ops_per_second: int = 0, *, bytes_burst: int = 0, ops_burst: int = 0
    ) -> None:
        """Set new limits, live; the buckets start full."""
        now = self._clock()
        if min(bytes_per_second, ops_per_second, bytes_burst, ops_burst) < 0:
            raise ValueError("a rate limit cannot be negative")
        self._bytes = TokenBucket(bytes_per_second, bytes_burst, now) if bytes_per_second else None
        self._ops = TokenBucket(ops_per_second, ops_burst, now) if ops_per_second else None

    @property
    def limited(self) -> bool:
        return self._bytes is not None or self._ops is not None

    def take(self, size: int, ops: int = 1) -> float:
        """Admit a request of `size` bytes: 0.0. Else the seconds after which to ask again, and nothing was taken."""
        by_bytes, by_ops = self._bytes, self._ops
        if by_bytes is None and by_ops is None:
            return 0.0
        now = self._clock()
        wait = 0
        if by_bytes is not None:
            by_bytes.refill(now)
            wait = by_bytes.wait(size)
        if by_ops is not None:
            by_ops.refill(now)
            wait = max(wait, by_ops.wait(ops))
        if wait:
            self.throttled += 1
            return wait / _NANO
        if by_bytes is not None:
            by_bytes.take(size)
        if by_ops is not None:
            by_ops.take(ops)
        return 0.0

    def delay(self) -> float:
        """Seconds until the next request may come, for those whose size is known only afterwards; 0.0: now."""
        wait = 0
        if self._bytes is not None or self._ops is not None:
            now = self._clock()
            for bucket in (self._bytes, self._ops):
                if bucket is not None:
                    bucket.refill(now)
                    wait = max(wait, bucket.wait(1))
        self.throttled += wait > 0
        return wait / _NANO

    def spend(self, size: int, ops: int = 1) -> None:
        """A request of `size` bytes was made; it may put the buckets in debt."""
        self.refund(-size, -ops)

    def refund(self, size: int, ops: int = 1) -> None:
        """Give back what `take` took for a request that was not made after all."""
        if self._bytes is not None:
            self._bytes.take(-size)
        if self._ops is not None:
            self._ops.take(-ops)

    def limits(self) -> dict[str, int]:
        """Rates and bursts as they are set: 0 for none."""
        by_bytes, by_ops = self._bytes, self._ops
        return {
            "bytes_per_second": by_bytes.rate if by_bytes else 0,
            "bytes_burst": by_bytes.burst if by_bytes else 0,
            "ops_per_second": by_ops.rate if by_ops else 0,
            "ops_burst": by_ops.burst if by_ops else 0,
        }

    def state(self) -> dict[str, int]:
        """Limits and balances, for a snapshot."""
        return {
            **self.limits(),
            "bytes_balance": self._bytes.state() if self._bytes else 0,
            "ops_balance": self._ops.state() if self._ops else 0,
        }

    def restore(self, state: dict[str, int]) -> None:
        """Limits and balances of `state()`; the time between the two counts for nothing."""
        self.update(
            state["bytes_per_second"],
            state["ops_per_second"],
            bytes_burst=state["bytes_burst"],
            ops_burst=state["ops_burst"],
        )
        now = self._clock()
        if self._bytes is not None:
            self._bytes.restore(state["bytes_balance"], now)
        if self._ops is not None:
            self._ops.restore(state["ops_balance"], now)
