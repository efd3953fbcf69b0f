"""Is the engine alive, or does it only answer? vLLM's /health says 200 while its engine core hangs.

Rules:
- an engine whose counters move is left alone: nothing is asked of it;
- when nothing has moved for a while it gets one token to write; only if that does not come, and still nothing has
  moved, it is hung: a long queue or a long prompt is none;
- any answer proves life, also a refusal; the token is asked for past the bound on the queue, whose refusals come from
  the API server alone;
- what the API server counts by itself, such as clients that leave, is no sign of life.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx

from shoehorn.engine.readiness import TOKEN
from shoehorn.engine.timing import Timing

_COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:iteration_tokens_total_count")
_PROBE = "http://engine/-/probe"  # shoehorn_vllm.api.middleware.PROBE_PATH


class Watchdog:
    """Watches one life of the engine.

    Args:
        client: reaches the engine as `http://engine`.
        model: the name that it serves.
        patience_seconds: for one token, when nothing moves; several times what the longest batch took.
        timing: of the looks and the probe.
        clock: seconds.
    """

    def __init__(self, client: httpx.Client, model: str, patience_seconds: float, timing: Timing,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._client, self._model, self._timing, self._clock = client, model, timing, clock
        self._patience = max(timing.patience, patience_seconds)
        self._seen: float | None = None
        self._moved_at = self._looked_at = clock()

    def hung(self) -> bool:
        """Whether the engine hangs. Cheap, but for the token that a quiet engine is asked for."""
        now = self._clock()
        if now - self._looked_at < self._timing.look:
            return False
        self._looked_at = now
        if self._moves() or self._clock() - self._moved_at < self._timing.quiet:
            return False
        if self._answers() or self._moves():
            self._moved_at = self._clock()
            return False
        return True

    def _moves(self) -> bool:
        """Whether any counter has changed since the last look; counters that cannot be had do not move."""
        try:
            text = self._client.get("http://engine/metrics", timeout=self._timing.look).text
            seen = sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(_COUNTERS))
        except (httpx.TransportError, ValueError, IndexError):
            return False
        moved = seen != self._seen
        self._seen = seen
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
            return True  # its process has ended, or is about to: others see to that
        return True
