"""Progress reports of long phases."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shoehorn.common.progress import Meter, Progress, report_progress


def test_progress_is_monotonic_and_never_exceeds_the_total() -> None:
    now = iter(range(100))
    meter = Meter("pulling", 100, lambda: next(now))
    assert [meter.at(done).bytes_done for done in (0, 50, 20, 60, 1000, 0)] == [0, 50, 50, 60, 100, 100]


def test_rate_is_the_average_of_the_last_seconds() -> None:
    now = [0.0]
    meter = Meter("pulling", 10**9, lambda: now[0])
    assert meter.at(1000).rate_bytes_per_second == 0, "earlier bytes do not count"
    rates = []
    for second in range(1, 31):
        now[0] = float(second)
        rates.append(meter.at(1000 + 100 * min(second, 15)).rate_bytes_per_second)
    assert rates[10] == 100
    assert rates[19] == 50
    assert rates[29] == 0, "a stall is visible"


def test_phase_is_reported_at_its_start_periodically_and_at_its_end() -> None:
    reports: list[Progress] = []
    done = 0
    with report_progress("verifying", 10, lambda: done, reports.append, period_seconds=0.01):
        end = time.monotonic() + 60
        while len(reports) < 5 and time.monotonic() < end:
            time.sleep(0.01)
        periodic = len(reports)
        done = 10
    assert (reports[0].bytes_done, reports[-1].bytes_done) == (0, 10)
    assert periodic > 4


def test_failed_phase_has_no_final_report() -> None:
    reports: list[Progress] = []
    with pytest.raises(FileNotFoundError), \
            report_progress("pulling", 10, lambda: len(reports), reports.append):
        Path("/nowhere/at/all").stat()
    assert [progress.bytes_done for progress in reports] == [0]
