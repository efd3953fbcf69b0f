"""Token-bucket rate limiter of a download."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RateLimiter:
    """Rate limiter shared by all download threads.

    Args:
        bytes_per_second: None for no limit.
        clock: returns seconds.
    """

    def __init__(self, bytes_per_second: int | None, clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], None] = time.sleep) -> None:
        self._rate, self._clock, self._sleep = bytes_per_second, clock, sleep
        self._lock = threading.Lock()
        self._available_at = 0.0

    def acquire(self, count_bytes: int) -> None:
        """Wait until the limit permits these bytes, after those of earlier calls."""
        if self._rate is None:
            return
        with self._lock:
            now = self._clock()
            self._available_at = max(self._available_at, now) + count_bytes / self._rate
            wait = self._available_at - now
        self._sleep(wait)
