"""A limit on how fast a download may be, shared by all its threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pace:
    """Lets bytes pass at a rate: whoever took some waits until they are paid for.

    Args:
        bytes_per_second: the limit; None for none.
        clock: seconds.
    """

    def __init__(self, bytes_per_second: int | None, clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], None] = time.sleep) -> None:
        self._rate, self._clock, self._sleep = bytes_per_second, clock, sleep
        self._lock = threading.Lock()
        self._paid_at = 0.0

    def take(self, count_bytes: int) -> None:
        """Wait as long as the bytes that arrived need at this rate, after those of the others."""
        if self._rate is None:
            return
        with self._lock:
            now = self._clock()
            self._paid_at = max(self._paid_at, now) + count_bytes / self._rate
            wait = self._paid_at - now
        self._sleep(wait)
