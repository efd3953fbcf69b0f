"""Waiting for what real processes and containers do."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

SLACK = 6
"""Limits of time are there to find what hangs; they are for a machine at rest."""


def wait_until(condition: Callable[[], object], seconds: float, what: str | Callable[[], str]) -> None:
    """Wait for a condition; fails, naming it, when it does not come true in `SLACK` times as long."""
    deadline = time.monotonic() + SLACK * seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {SLACK * seconds} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.1)
