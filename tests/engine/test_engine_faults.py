"""Failures of the surroundings of the engine program."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fakes.ports import free_port
from shoehorn.common.paths import HOME
from shoehorn.engine.output import EngineOutput
from shoehorn.runtime import programs
from shoehorn.runtime.state import StateFile


@pytest.mark.fault("The disk is full where ENGINE_LOG=file writes",
                   "Logged once; the engine's lines continue on standard output.")
def test_full_disk_does_not_stop_the_reading_of_engine_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    output = EngineOutput(StateFile(tmp_path), Path("/dev/full"))
    for line in ("one", "two", "three"):
        output.read_line(line)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith("Cannot write engine log")
    assert messages[1:] == ["one", "two", "three"]


HELPERS = pytest.mark.parametrize("program", [programs.KEYS, programs.EXPORTER])


def surroundings(tmp_path: Path) -> dict[str, str]:
    """The environment of a helper."""
    return {**os.environ, "RUN_DIR": str(tmp_path), "MODELS_DIR": str(tmp_path), "API_KEY": "a" * 32,
            "METRICS_PORT": str(free_port()), "PYTHONPATH": str(HOME / "src")}


@pytest.mark.fault("`kill -9` of the parent of key service or exporter", "They exit: no orphan.")
@HELPERS
def test_helper_exits_after_its_parent_was_killed(tmp_path: Path, program: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", "import subprocess, sys, time\n"
                               f"print(subprocess.Popen([sys.executable, '-m', '{program}']).pid, flush=True)\n"
                               "time.sleep(100)"], stdout=subprocess.PIPE, text=True, env=surroundings(tmp_path))
    with parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(3)
        assert child.is_running(), "it runs as long as its parent does"
        assert child.status() != psutil.STATUS_ZOMBIE
        parent.kill()
    assert psutil.wait_procs([child], timeout=60)[1] == []


@pytest.mark.fault("`kill -9` of supervisord while key service or exporter are still being loaded",
                   "They exit as well.")
@HELPERS
def test_helper_exits_if_its_owner_died_during_its_start(tmp_path: Path, program: str) -> None:
    with subprocess.Popen(["true"]) as dead:
        pass
    done = subprocess.run([sys.executable, "-m", program], timeout=60, capture_output=True, text=True,
                          env={**surroundings(tmp_path), "SHOEHORN_OWNER": str(dead.pid)})
    assert done.returncode == 0, done.stderr
