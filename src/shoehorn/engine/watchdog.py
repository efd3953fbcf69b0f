"""Watchdog: detects an engine that hangs. vLLM's /health answers 200 while its engine core hangs.

Rules:
- an engine whose counters change is not probed;
- after a quiet time it is asked for one token; it hangs only if that token does not arrive and the counters still do
  not change: a long queue or a long prompt is not a hang;
- any answer, a refusal included, is a sign of life; the probe bypasses the queue limit, whose refusals come from the
  API server alone;
- counters of the API server alone, such as disconnected clients, are not a sign of life.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx

from shoehorn.engine.readiness import TOKEN
from shoehorn.engine.timing import Timing
from shoehorn_vllm.protocol import PROBE_PATH

_COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:iteration_tokens_total_count")
_PROBE = f"http://engine{PROBE_PATH}"


class Watchdog:
    """Watches one run of the engine.

    Args:
        client: reaches the engine as `http://engine`.
        model: the name that it serves.
        patience_seconds: time limit of the probe: several times the duration of the longest batch.
        timing: of the looks and the probe.
        clock: seconds.
    """

    def __init__(self, client: httpx.Client, model: str, patience_seconds: float, timing: Timing,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._client, self._model, self._timing, self._clock = client, model, timing, clock
        self._patience = max(timing.patience, patience_seconds)
        self._counters: float | None = None
        self._moved_at = self._looked_at = clock()

    def is_hung(self) -> bool:
        """Return True if the engine hangs. Cheap, except for the probe of a quiet engine."""
        now = self._clock()
        if now - self._looked_at < self._timing.look:
            return False
        self._looked_at = now
        if self._has_moved() or self._clock() - self._moved_at < self._timing.quiet:
            return False
        if self._answers() or self._has_moved():
            self._moved_at = self._clock()
            return False
        return True

    def _has_moved(self) -> bool:
        """Return True if any counter changed since the last look; unavailable counters have not changed."""
        try:
            text = self._client.get("http://engine/metrics", timeout=self._timing.look).text
            counters = sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(_COUNTERS))
        except (httpx.TransportError, ValueError, IndexError):
            return False
        moved = counters != self._counters
        self._counters = counters
        if moved:
            self._moved_at = self._clock()
        return moved

    def _answers(self) -> bool:
        body = {"model": self._model, "prompt": [TOKEN], "max_tokens": 1, "temperature": 0}
        try:
            self._client.post(_PROBE, json=body, timeout=self._patience)
        except httpx.TimeoutException:
            return False
        except httpx.TransportError:
            return True  # the process has exited or is about to; the caller notices that
        return True
