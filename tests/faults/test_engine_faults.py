"""What the engine program does when its surroundings fail."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from shoehorn.restarts import Restarts
from shoehorn.serving import Server
from shoehorn.state import StateFile


@pytest.mark.fault("The disk is full where ENGINE_LOG=file writes", "Said once; the engine's lines go on in the log.")
def test_a_full_disk_does_not_stop_the_reading_of_the_engines_lines(tmp_path: Path,
                                                                    caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = Server(tmp_path / "vllm.yaml", {}, tmp_path / "engine.sock", StateFile(tmp_path),
                    Restarts(tmp_path / "restarts.json"), lambda seconds: None, Path("/dev/full"), 1,
                    lambda transport: True, "demo")
    for line in ("one", "two", "three"):
        server._line(line)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["cannot write /dev/full: No space left on device; the engine's lines come here instead",
                    "one", "two", "three"]
