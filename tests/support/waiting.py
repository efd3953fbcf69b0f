"""Waits for events of real processes and containers."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

SLACK = 6
"""Factor on time limits, which are chosen for an idle machine: they only detect hangs."""


def wait_until(condition: Callable[[], object], seconds: float, what: str | Callable[[], str]) -> None:
    """Wait for a condition; fail with `what` if it does not hold within `SLACK` times as many seconds."""
    deadline = time.monotonic() + SLACK * seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"timed out after {SLACK * seconds} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.05)
