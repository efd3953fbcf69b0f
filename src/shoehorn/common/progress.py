"""Progress of long phases: reported every half second, monotonic, never above the total."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_WINDOW_SECONDS = 10.0


@dataclass(frozen=True)
class Progress:
    """Progress at one moment.

    Attributes:
        phase: `pulling`, `verifying` or `converting`; each can occur more than once.
        rate_bytes_per_second: average of the last ten seconds; 0 if unknown.
    """

    phase: str
    bytes_done: int
    bytes_total: int
    rate_bytes_per_second: float


Report = Callable[[Progress], None]


class Meter:
    """Conversion of measured bytes to `Progress`. `clock` returns seconds."""

    def __init__(self, phase: str, total_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._phase, self._total, self._clock = phase, total_bytes, clock
        self._maximum = 0
        self._moments: deque[tuple[float, int]] = deque()

    def at(self, bytes_done: int) -> Progress:
        """Return the progress now; a value below an earlier one or above the total is corrected."""
        self._maximum = max(self._maximum, min(bytes_done, self._total))
        now = self._clock()
        self._moments.append((now, self._maximum))
        while now - self._moments[0][0] > _WINDOW_SECONDS:
            self._moments.popleft()
        seconds, count = now - self._moments[0][0], self._maximum - self._moments[0][1]
        return Progress(self._phase, self._maximum, self._total, count / seconds if seconds > 0 else 0.0)


@contextmanager
def report_progress(phase: str, total_bytes: int, measure: Callable[[], int], report: Report,
                    period_seconds: float = 0.5) -> Iterator[None]:
    """Report the progress of a `with` block: at its start, every period, and at its end unless it raised.

    Args:
        measure: returns the bytes done so far; called from another thread, must not raise.
    """
    meter, finished = Meter(phase, total_bytes), threading.Event()

    def watch() -> None:
        while not finished.wait(period_seconds):
            report(meter.at(measure()))

    report(meter.at(measure()))
    thread = threading.Thread(target=watch, name=phase, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
    report(meter.at(measure()))
