"""Token buckets, on a clock that the test turns."""

from __future__ import annotations

import pytest

from kvik.vmm.ratelimit import RateLimiter, TokenBucket

SECOND = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now = 5 * SECOND

    def __call__(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)


def test_no_limit_admits_everything():
    limiter = RateLimiter()
    assert not limiter.limited
    assert all(limiter.take(1 << 30) == 0.0 for _ in range(1000))


def test_the_burst_goes_at_once_then_the_rate_holds():
    clock = Clock()
    limiter = RateLimiter(1000, bytes_burst=3000, clock=clock)
    assert [limiter.take(1000) for _ in range(3)] == [0.0, 0.0, 0.0]
    wait = limiter.take(1000)
    assert wait == 1.0
    clock.sleep(wait)
    assert limiter.take(1000) == 0.0
    assert limiter.take(1) == 0.001
    assert limiter.throttled == 2


def test_a_refused_request_costs_nothing():
    clock = Clock()
    limiter = RateLimiter(100, 10, clock=clock)
    assert limiter.take(100) == 0.0
    for _ in range(50):
        assert limiter.take(100) == 1.0  # the operations bucket must not drain while bytes refuse
    clock.sleep(1)
    assert limiter.take(100) == 0.0


def test_operations_and_bytes_both_limit():
    clock = Clock()
    limiter = RateLimiter(1_000_000, 2, clock=clock)
    assert limiter.take(1) == limiter.take(1) == 0.0
    assert limiter.take(1) == 0.5


def test_a_request_larger_than_the_bucket_passes_and_is_paid_for():
    clock = Clock()
    limiter = RateLimiter(1000, bytes_burst=1000, clock=clock)
    assert limiter.take(5000) == 0.0
    assert limiter.take(1000) == 5.0
    clock.sleep(4.999)
    assert limiter.take(1000) > 0
    clock.sleep(0.001)
    assert limiter.take(1000) == 0.0


@pytest.mark.parametrize("rate", [1, 3, 777, 10**9])
def test_the_long_run_rate_is_exact(rate):
    clock = Clock()
    limiter = RateLimiter(rate, bytes_burst=1, clock=clock)
    limiter.take(1)
    admitted, started = 0, clock.now
    while admitted < 1000:
        wait = limiter.take(1)
        clock.now += -(-round(wait * SECOND * 1000) // 1000)
        admitted += wait == 0
    assert abs((clock.now - started) - 1000 * SECOND / rate) <= 1001


def test_a_clock_that_steps_back_gives_nothing_and_breaks_nothing():
    bucket = TokenBucket(10, now=100 * SECOND)
    bucket.take(10)
    bucket.refill(50 * SECOND)
    assert bucket.tokens == 0
    bucket.refill(51 * SECOND)
    assert bucket.tokens == 10


def test_refund():
    limiter = RateLimiter(10, clock=Clock())
    assert limiter.take(10) == 0.0
    limiter.refund(10)
    assert limiter.take(10) == 0.0


def test_update_is_live_and_zero_lifts_the_limit():
    limiter = RateLimiter(1, clock=Clock())
    limiter.take(1)
    assert limiter.take(1) == 1.0
    limiter.update()
    assert limiter.take(1 << 20) == 0.0
    assert limiter.limits() == dict.fromkeys(("bytes_per_second", "bytes_burst", "ops_per_second", "ops_burst"), 0)


def test_state_goes_over_to_another_host():
    clock = Clock()
    limiter = RateLimiter(100, 10, ops_burst=20, clock=clock)
    limiter.take(70, 5)
    state = limiter.state()
    later = Clock()
    later.now = 1
    other = RateLimiter(clock=later)
    other.restore(state)
    assert other.state() == state
    assert other.take(40) == 0.1


@pytest.mark.parametrize("arguments", [(-1,), (0, -1)])
def test_negative_limits_are_refused(arguments):
    with pytest.raises(ValueError, match="negative"):
        RateLimiter(*arguments)
