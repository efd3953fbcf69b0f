"""Calls that may hang, such as those into a driver: waited for no longer than a limit.

Rules: a hanging call cannot be ended, only left behind in its thread; while it hangs no second one is started beside
it; its result, should it still come, is thrown away as too old.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class TimeLimited(Generic[T]):
    """`call`, in a thread of its own; thread-safe, and callers at the same time share one call.

    Args:
        call: its exceptions are shown by its thread and count as no answer.
    """

    def __init__(self, call: Callable[[], T], limit_seconds: float) -> None:
        self._call = call
        self._limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._attempt: _Attempt[T] | None = None

    def get(self) -> T | None:
        """The call's result, or None when there was none within the limit."""
        with self._lock:
            if self._attempt is None or self._attempt.ended.is_set():
                self._attempt = _Attempt(self._call)
            attempt = self._attempt
        attempt.ended.wait(max(0.0, attempt.begun + self._limit_seconds - time.monotonic()))
        return attempt.result


class _Attempt(Generic[T]):
    def __init__(self, call: Callable[[], T]) -> None:
        self.begun = time.monotonic()
        self.ended = threading.Event()
        self.result: T | None = None
        threading.Thread(target=self._run, args=(call,), name="time-limited", daemon=True).start()

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self.result = call()
        finally:
            self.ended.set()
