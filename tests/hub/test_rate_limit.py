"""Rate limiter of downloads."""

from __future__ import annotations

from shoehorn.hub.rate_limit import RateLimiter


def test_limit_is_shared_and_idle_time_earns_nothing() -> None:
    now, delays = [100.0], list[float]()
    limiter = RateLimiter(1000, lambda: now[0], delays.append)
    limiter.acquire(500)
    limiter.acquire(500)
    now[0] = 200.0
    limiter.acquire(1000)
    assert delays == [0.5, 1.0, 1.0]


def test_no_limit_never_waits() -> None:
    delays = list[float]()
    RateLimiter(None, lambda: 0.0, delays.append).acquire(1 << 40)
    assert delays == []
