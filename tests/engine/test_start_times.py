"""Seconds of the parts of a start, from lines as vLLM 0.32.0 writes them."""

from __future__ import annotations

import pytest

from shoehorn.engine.start_times import PARTS, StartTimes, measured, table

_LINES = (
    "(Worker_TP0 pid=1) INFO 11-28 05:04:28 [default_loader.py:501] Loading weights took 20.25 seconds",
    "(Worker_TP1 pid=2) INFO 11-28 05:04:28 [default_loader.py:501] Loading weights took 21.00 seconds",
    "(Worker_TP1 pid=2) INFO 11-28 05:04:28 [gpu_model_runner.py:5150] Model loading took 17.9 GiB memory and "
    "24.500000 seconds",
    "(Worker_TP0 pid=1) INFO 11-28 05:04:40 [gpu_model_runner.py:6582] Graph capturing finished in 4 secs, took 0.90 "
    "GiB",
    "(EngineCore pid=3) INFO 11-28 05:04:41 [core.py:402] init engine (profile, create kv cache, warmup model) took "
    "60.00 s (compilation: 50.50 s)",
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("shoehorn.engine.start_times.time.monotonic", lambda: now[0])
    return now


def test_parts_add_up_to_the_total(clock: list[float]) -> None:
    earlier: dict[str, float] = {}
    for part, duration in (("plan", 2.0), ("pull", 30.0), ("plan", 1.0)):
        with measured(earlier, part):
            clock[0] += duration
    times = StartTimes(earlier)
    with measured(times.seconds, "import"):
        clock[0] += 5.0
    for line in _LINES:
        times.read_line(line)
    clock[0] += 90.0
    with measured(times.seconds, "warm_up"):
        clock[0] += 1.5
    seconds = times.finish()
    assert seconds == {"plan": 3.0, "pull": 30.0, "import": 5.0, "read": 21.0, "repack": 3.5, "compile": 50.5,
                       "graphs": 4.0, "cache": 5.5, "warm_up": 1.5, "other": 5.5, "total": 129.5}
    assert sum(seconds.values()) == 2 * seconds["total"]
    assert set(seconds) <= set(PARTS)
    assert table(seconds)[-1] == "total       129.5 s"


def test_part_that_did_not_occur_is_absent(clock: list[float]) -> None:
    times = StartTimes({})
    times.read_line("init engine (profile, create kv cache, warmup model) took 0.92 s")
    clock[0] += 3.0
    assert times.finish() == {"cache": 0.92, "other": 2.08, "total": 3.0}


def test_failed_part_is_measured_too(clock: list[float]) -> None:
    seconds: dict[str, float] = {}

    def pull() -> None:
        with measured(seconds, "pull"):
            clock[0] += 7.0
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        pull()
    assert seconds == {"pull": 7.0}
