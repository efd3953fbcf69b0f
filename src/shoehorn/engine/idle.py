"""Idle stop: the engine is stopped after a time without requests, and started by the next one.

Rules: only requests of clients count, not probes and scrapes; a request that arrives while the engine stops is
finished, or refused with 503 and starts the engine again; nothing here counts in the restart budget.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import httpx

from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, StateFile
from shoehorn_vllm.protocol import ACTIVITY_PATH

log = logging.getLogger("engine")


class IdleWatch:
    """Watches the requests of one run of the engine.

    Args:
        client: reaches the engine as `http://engine`.
        limit_seconds: time without requests; None never ends.
        look_seconds: between two looks.
        clock: monotonic seconds.
    """

    def __init__(self, client: httpx.Client, limit_seconds: int | None, look_seconds: float,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._client, self._limit, self._look, self._clock = client, limit_seconds, look_seconds, clock
        self._began = self._looked_at = clock()

    def is_over(self) -> bool:
        """Return True if no request arrived for the time. Cheap."""
        now = self._clock()
        if self._limit is None or now - self._began < self._limit or now - self._looked_at < self._look:
            return False
        self._looked_at = now
        try:
            activity = self._client.get(f"http://engine{ACTIVITY_PATH}", timeout=self._look).json()
            return bool(activity["running"] == 0 and activity["idle_seconds"] >= self._limit)
        except (httpx.TransportError, ValueError, KeyError, TypeError):
            return False  # a dead or hung engine is found by others


def publish(states: StateFile) -> None:
    """Publish the phase; requests that arrive from now on wake the engine."""
    RunDir(states.run_dir).wake_request.unlink(missing_ok=True)
    states.update(phase=Phase.IDLE, progress=None, detail="stopped while idle; the next request starts the engine")


def wait_for_request(states: StateFile, tick_seconds: float) -> None:
    """Wait until a request asks for the engine."""
    log.info("engine stopped while idle, memory freed; the next request starts it")
    wake = RunDir(states.run_dir).wake_request
    while not wake.exists():
        time.sleep(tick_seconds)
    log.info("starting the engine: a request arrived")
    states.update(phase=Phase.LOADING, progress=None, detail="starting the engine")
