"""supervisord as the appliance runs it: immediate stop, and the exit code of the engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoehorn.config.settings import load
from shoehorn.runtime import programs
from shoehorn.runtime.child_process import kill_group
from shoehorn.runtime.supervisord_config import write_supervisord_config
from support.waiting import wait_until

pytestmark = pytest.mark.process

_PROGRAM = """
import os, pathlib, signal, sys, time
def stop(*_):
    pathlib.Path(sys.argv[1], "stopped").write_text(str(time.time()))
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1], "runs").write_text(os.environ["SHOEHORN_OWNER"])
time.sleep(60)
"""


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The appliance's own supervisord, with one program."""
    with supervised(tmp_path) as process:
        yield process


@contextmanager
def supervised(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The appliance's own configuration, with one program in the place of all."""
    file = write_supervisord_config(load({"RUN_DIR": str(tmp_path)}), "root")
    head = file.read_text().split("\n\n", 1)[0]
    (tmp_path / "program.py").write_text(_PROGRAM)
    file.write_text(f"{head}\n\n[program:one]\ncommand={sys.executable} {tmp_path}/program.py {tmp_path}\n")
    process = subprocess.Popen([sys.executable, "-m", programs.SUPERVISORD, str(tmp_path)],
                               stderr=subprocess.DEVNULL,
                               start_new_session=True)
    try:
        wait_until((tmp_path / "runs").exists, 10, "the program runs")
        yield process
    finally:
        kill_group(process.pid)
        process.wait()


def test_stop_reaches_the_programs_immediately(tmp_path: Path) -> None:
    """Wherever supervisord is in its second of waiting; half of the stops may have been held up by a busy machine."""
    took = []
    for wait_seconds in (0.0, 0.25, 0.5, 0.75):
        home = tmp_path / str(wait_seconds)
        home.mkdir()
        with supervised(home) as running:
            time.sleep(1 + wait_seconds)
            sent = time.time()
            running.terminate()
            assert running.wait(30) == 0
        took.append(float((home / "stopped").read_text()) - sent)
    assert sorted(took)[1] < 0.2, took


def test_exit_code_is_that_of_the_engine(running: subprocess.Popen[bytes], tmp_path: Path) -> None:
    (tmp_path / "exit_code").write_text("5")
    running.terminate()
    assert running.wait(30) == 5


def test_programs_know_the_id_of_supervisord(running: subprocess.Popen[bytes], tmp_path: Path) -> None:
    wait_until(lambda: (tmp_path / "runs").read_text(), 10, "the program says so")
    assert (tmp_path / "runs").read_text() == str(running.pid)


def test_it_uses_no_cpu_while_idle(running: subprocess.Popen[bytes]) -> None:
    """The pipe that a signal writes to is emptied, or the polling would spin."""
    running.send_signal(signal.SIGUSR2)  # supervisord opens its log again
    time.sleep(1)
    before = _cpu_seconds(running.pid)
    time.sleep(2)
    assert _cpu_seconds(running.pid) - before < 0.5


def _cpu_seconds(pid: int) -> float:
    ticks = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
