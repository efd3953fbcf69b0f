"""How far a long phase is: told at least every half second, only rising, never above the total."""

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
    """A moment of a pull.

    Attributes:
        phase: `pulling`, `verifying` or `converting`; each can come more than once.
        rate_bytes_per_second: over the last ten seconds; 0 while unknown.
    """

    phase: str
    bytes_done: int
    bytes_total: int
    rate_bytes_per_second: float


Report = Callable[[Progress], None]


class Meter:
    """Turns measured bytes into `Progress`. `clock` gives seconds."""

    def __init__(self, phase: str, total_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._phase, self._total, self._clock = phase, total_bytes, clock
        self._most = 0
        self._moments: deque[tuple[float, int]] = deque()

    def at(self, bytes_done: int) -> Progress:
        """The progress at this moment. A measure that fell back, or is too large, does not show."""
        self._most = max(self._most, min(bytes_done, self._total))
        now = self._clock()
        self._moments.append((now, self._most))
        while now - self._moments[0][0] > _WINDOW_SECONDS:
            self._moments.popleft()
        seconds, gained = now - self._moments[0][0], self._most - self._moments[0][1]
        return Progress(self._phase, self._most, self._total, gained / seconds if seconds > 0 else 0.0)


@contextmanager
def reported(phase: str, total_bytes: int, measure: Callable[[], int], report: Report,
             period_seconds: float = 0.5) -> Iterator[None]:
    """Report the progress of what is inside: at its start, every period, and at its end when that is a good one.

    Args:
        measure: the bytes done so far; called from another thread, must not raise.
    """
    meter, ended = Meter(phase, total_bytes), threading.Event()

    def watch() -> None:
        while not ended.wait(period_seconds):
            report(meter.at(measure()))

    report(meter.at(measure()))
    thread = threading.Thread(target=watch, name=phase, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    report(meter.at(measure()))
