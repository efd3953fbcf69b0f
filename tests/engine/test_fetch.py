"""Messages of a `shoehorn pull` or `convert` in a child process, and what its end means."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from shoehorn.common.errors import DoesNotFitError, ModelUnavailableError, SettingsError, ShoehornError
from shoehorn.engine.fetch import _Fetch
from shoehorn.model.reference import ModelRef
from shoehorn.runtime.state import Phase, StateFile

REF = ModelRef("a/b", "modelscope", "master")


@pytest.fixture
def child(tmp_path: Path) -> _Fetch:
    return _Fetch("pull", REF, StateFile(tmp_path))


def failure(kind: type[ShoehornError], **more: object) -> str:
    return json.dumps({"phase": "failed", "exit_code": kind.exit_code, "code": "some_code", "cause": "The cause.",
                       "remedy": "The remedy.", **more})


@pytest.mark.parametrize("kind", [SettingsError, DoesNotFitError, ModelUnavailableError])
def test_reported_error_keeps_kind_code_cause_and_remedy(child: _Fetch, kind: type[ShoehornError]) -> None:
    child.read_line(failure(kind))
    error = child.error(kind.exit_code)
    assert (type(error), error.code, error.cause, error.remedy) == (kind, "some_code", "The cause.", "The remedy.")


@pytest.mark.parametrize(("status", "kind"), [(1, ModelUnavailableError), (2, SettingsError), (3, DoesNotFitError)])
def test_end_without_a_message_has_cause_and_remedy(child: _Fetch, status: int, kind: type[ShoehornError]) -> None:
    child.read_line("Traceback (most recent call last):")
    error = child.error(status)
    assert type(error) is kind
    assert str(status) in error.cause
    assert error.remedy


@pytest.mark.parametrize(("status", "says_memory"), [(-9, True), (-11, False)])
def test_killed_child_is_resumed_by_a_restart(child: _Fetch, status: int, says_memory: bool) -> None:
    error = child.error(status)
    assert error.code == "fetch_killed"
    assert ("out of memory" in error.cause) == says_memory


def test_progress_becomes_state_and_log_lines_keep_their_logger(child: _Fetch, tmp_path: Path,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for message in ({"phase": "verifying", "bytes_done": 5, "bytes_total": 10, "rate_bytes_per_second": 2.0},
                    {"phase": "log", "program": "store", "level": "WARNING", "message": "a warning"}):
        child.read_line(json.dumps(message))
    child.read_line("a line of a library")
    child.read_line("[1, 2]")
    state = StateFile(tmp_path).read()
    assert (state.phase, state.progress, state.bytes_total) == (Phase.VERIFYING, 0.5, 10)
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("store", "WARNING", "a warning"), ("engine", "INFO", "pull: a line of a library"),
        ("engine", "INFO", "pull: [1, 2]")]
