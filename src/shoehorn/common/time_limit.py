"""Time limit for calls that may hang, for example in a driver.

Rules: a hanging call cannot be cancelled and keeps its thread; no second call starts while it hangs; its late result is
discarded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class TimeLimitedCall(Generic[T]):
    """A call in a separate thread; thread-safe: concurrent callers share one call.

    Args:
        call: its exceptions go to the thread's exception hook; the result is then None.
    """

    def __init__(self, call: Callable[[], T], limit_seconds: float) -> None:
        self._call = call
        self._limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._attempt: _Attempt[T] | None = None

    def get(self) -> T | None:
        """Return the result, or None if the call did not finish within the limit."""
        with self._lock:
            if self._attempt is None or self._attempt.finished.is_set():
                self._attempt = _Attempt(self._call)
            attempt = self._attempt
        attempt.finished.wait(max(0.0, attempt.started_at + self._limit_seconds - time.monotonic()))
        return attempt.result


class _Attempt(Generic[T]):
    def __init__(self, call: Callable[[], T]) -> None:
        self.started_at = time.monotonic()
        self.finished = threading.Event()
        self.result: T | None = None
        threading.Thread(target=self._run, args=(call,), name="time-limited", daemon=True).start()

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self.result = call()
        finally:
            self.finished.set()
