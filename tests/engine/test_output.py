"""Lines of the engine in the log: their levels, and lines without information for an operator."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from shoehorn.engine.output import EngineOutput
from shoehorn.runtime.state import StateFile


@pytest.mark.parametrize(("line", "level"), [
    ("(APIServer pid=7) WARNING 11-28 06:17:24 [system_utils.py:255] Found ulimit", "WARNING"),
    ("ERROR 11-28 06:17:24 [core.py:1] failed", "ERROR"), ("(EngineCore pid=7) INFO 11-28 06:17:24 [a.py:1] x", "INFO"),
    ("INFO:     Started server process [7]", "INFO"), ("WARNING is not a level here", "INFO")])
def test_line_has_the_level_of_the_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str,
                                          level: str) -> None:
    with caplog.at_level(logging.DEBUG):
        EngineOutput(StateFile(tmp_path), None).read_line(line)
    assert [(record.levelname, record.message) for record in caplog.records] == [(level, line)]


STATISTICS = ("(APIServer pid=7) INFO 11-28 06:17:24 [loggers.py:1] Engine 000: Avg prompt throughput: 0.4 tokens/s, "
              "Avg generation throughput: 0.1 tokens/s, Running: {} reqs, Waiting: 0 reqs, GPU KV cache usage: 0.0%")


def test_closed_routes_and_statistics_of_an_idle_engine_are_not_logged(tmp_path: Path,
                                                                       caplog: pytest.LogCaptureFixture) -> None:
    output = EngineOutput(StateFile(tmp_path), None)
    lines = ["(APIServer pid=7) INFO 11-28 06:17:24 [launcher.py:46] Available routes are:",
             "(APIServer pid=7) INFO 11-28 06:17:24 [launcher.py:54] Route: /invocations, Methods: POST",
             STATISTICS.format(0)]
    with caplog.at_level(logging.DEBUG):
        for line in (*lines, STATISTICS.format(2)):
            output.read_line(line)
    assert [record.message for record in caplog.records] == [STATISTICS.format(2)]
    assert list(output.tail) == [*lines, STATISTICS.format(2)]  # a failure is still diagnosed from all of them
