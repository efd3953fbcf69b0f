"""Ends of the engine program: each one that was not requested counts in the restart budget, and has a cause."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shoehorn.common import disk
from shoehorn.common.errors import EXIT_ENGINE_FAILED, ModelUnavailableError
from shoehorn.common.paths import HOME
from shoehorn.config import settings as settings_module
from shoehorn.engine.program_run import EXIT_RESTART, ProgramRun, StopRequested
from shoehorn.engine.restart_budget import LIMIT
from shoehorn.engine.timing import Timing
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, State, StateFile

WAITS = Timing(backoff=0.001)


@pytest.fixture
def run(tmp_path: Path) -> Callable[[BaseException], tuple[int, State]]:
    """Run the program once until an exception ends it; returns (exit code, state)."""
    states = StateFile(tmp_path)

    def run(end: BaseException) -> tuple[int, State]:
        program = ProgramRun(settings_module.load({"RUN_DIR": str(tmp_path)}), states, WAITS)
        with program:
            program.take_over()
            raise end
        return program.exit_code, states.read()

    return run


Run = Callable[[BaseException], tuple[int, State]]


@pytest.mark.fault("An unexpected exception in the engine program, in any phase",
                   "Five within an hour, with pauses; then exit code 5, with cause and remedy.")
def test_unexpected_exceptions_exhaust_the_budget(run: Run, tmp_path: Path) -> None:
    for number in range(1, LIMIT):
        code, state = run(KeyError("layers"))
        assert code == EXIT_RESTART
        assert state.restarts == number
    code, state = run(KeyError("layers"))
    assert code == EXIT_ENGINE_FAILED
    assert state.phase is Phase.FAILED
    assert "KeyError: 'layers'" in state.cause
    assert state.remedy
    assert RunDir(tmp_path).exit_code.read_text() == "5\n"


@pytest.mark.fault("The engine program is killed again and again before vLLM starts", "After five kills: exit code 5.")
def test_kills_before_vllm_starts_exhaust_the_budget(run: Run, tmp_path: Path) -> None:
    for _ in range(LIMIT):
        RunDir(tmp_path).engine_alive.touch()
        code, state = run(StopRequested())
    assert code == EXIT_ENGINE_FAILED
    assert state.phase is Phase.FAILED
    assert state.remedy


def test_requested_stop_is_not_counted(run: Run, tmp_path: Path) -> None:
    assert run(StopRequested())[0] == 0
    assert not RunDir(tmp_path).restarts.exists()
    assert not RunDir(tmp_path).engine_alive.exists()


def test_known_error_has_its_exit_code_at_once(run: Run) -> None:
    code, state = run(ModelUnavailableError("The cause.", "The remedy."))
    assert (code, state.phase, state.cause, state.remedy) == (4, Phase.FAILED, "The cause.", "The remedy.")


def test_full_disk_is_waited_for_and_not_counted(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[Path, ...]] = []
    monkeypatch.setattr(disk, "wait_for_free_space", lambda *folders: waits.append(folders))
    assert run(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))[0] == EXIT_RESTART
    assert len(waits) == 1
    assert not RunDir(tmp_path).restarts.exists()


def test_other_system_error_is_counted(run: Run, tmp_path: Path) -> None:
    assert run(OSError(errno.EIO, os.strerror(errno.EIO)))[0] == EXIT_RESTART
    assert len(json.loads(RunDir(tmp_path).restarts.read_text())) == 1


def test_stop_during_the_pause_ends_the_program(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_seconds: float) -> None:
        raise StopRequested

    monkeypatch.setattr("time.sleep", stop)
    assert run(KeyError("layers"))[0] == 0


def test_program_with_a_defect_ends_with_the_documented_exit_code(tmp_path: Path) -> None:
    """The real program, with a machine that cannot be detected."""
    code = ("import sys; from shoehorn.hardware import detect; from shoehorn.engine import main\n"
            "def broken(**_): raise AttributeError('a defect')\n"
            "detect.detect = broken; sys.exit(main.main())")
    environment = {**os.environ, "PYTHONPATH": str(HOME / "src"), "RUN_DIR": str(tmp_path),
                   "MODELS_DIR": str(tmp_path), "SHOEHORN_TIMING": '{"backoff": 0.01}'}
    codes = [subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60).returncode
             for _ in range(LIMIT)]
    assert codes == [EXIT_RESTART] * (LIMIT - 1) + [EXIT_ENGINE_FAILED]
    assert "AttributeError: a defect" in StateFile(tmp_path).read().cause
