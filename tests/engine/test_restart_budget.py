"""Restart budget: failures in a window, and the delay before the next start."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shoehorn.engine.restart_budget import LIMIT, WINDOW_SECONDS, RestartBudget
from shoehorn.engine.timing import Timing


def test_budget_is_exhausted_by_failures_within_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic() + 10_000
    monkeypatch.setattr(time, "monotonic", lambda: now)
    path = tmp_path / "restarts.json"
    for number in range(1, LIMIT + 1):
        assert not RestartBudget(path).is_exhausted
        assert RestartBudget(path).record() == number
    assert RestartBudget(path).is_exhausted
    now += WINDOW_SECONDS + 1
    assert not RestartBudget(path).is_exhausted


@pytest.mark.fault("Record of restarts corrupt", "Counts as empty.")
def test_damaged_record_counts_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "restarts.json"
    path.write_text("[1, ")
    assert not RestartBudget(path).is_exhausted


def test_delay_grows_up_to_a_limit() -> None:
    assert [Timing().restart_delay(failures) for failures in (0, 1, 2, 3, 4, 50)] == [1, 1, 2, 4, 8, 30]
