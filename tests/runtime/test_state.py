"""State document and marks as their readers see them."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from shoehorn.runtime.state import Phase, State, StateFile, unavailable_bodies


def test_state_survives_writing_and_reading(tmp_path: Path) -> None:
    state = State(Phase.PULLING, 0.25, "half a file", 12.5, "a/b", 1, 10, 40)
    StateFile(tmp_path).write(state)
    assert StateFile(tmp_path).read() == state


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 99}', '{"version": 1, "phase": "dancing"}'])
@pytest.mark.fault("State file corrupt or from a newer version", "Reads as starting; the next phase replaces it.")
def test_unreadable_state_is_read_as_starting(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    assert StateFile(tmp_path).read() == State()


def test_marks_follow_the_phase(tmp_path: Path) -> None:
    states = StateFile(tmp_path)
    for phase in Phase:
        states.update(phase=phase)
        assert (tmp_path / "ready").exists() == (phase is Phase.READY)
        assert (tmp_path / "not-live").exists() == (phase is Phase.FAILED)
    states.update(phase=Phase.LOADING, engine_down=True)
    assert (tmp_path / "not-live").exists()
    states.update(engine_down=False)
    assert not (tmp_path / "not-live").exists()


def test_since_changes_with_the_phase_only(tmp_path: Path) -> None:
    states = StateFile(tmp_path)
    first = states.update(phase=Phase.LOADING)
    assert states.update(detail="weights").since == first.since > 0
    assert states.update(phase=Phase.READY).since > first.since


def test_unknown_field_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        StateFile(tmp_path).update(colour="red")


def test_unavailable_answer_has_phase_and_progress(tmp_path: Path) -> None:
    StateFile(tmp_path).update(phase=Phase.PULLING, progress=0.42)
    error = json.loads((tmp_path / "unavailable.json").read_text())["error"]
    assert error["type"] == "server_error"
    assert error["code"] == "model_not_ready"
    assert "pulling (42%)" in error["message"]
    assert error["progress"] == 0.42
    theirs = json.loads((tmp_path / "unavailable.anthropic.json").read_text())
    assert theirs == {"type": "error", "error": {"type": "overloaded_error", "message": error["message"]}}


def test_unavailable_answer_of_a_failure_has_the_cause() -> None:
    body = unavailable_bodies(State(Phase.FAILED, cause="The disk is full."))["openai"]
    assert "disk is full" in json.loads(body)["error"]["message"]


@pytest.mark.fault("Two programs write the state concurrently", "Nothing is lost.")
def test_concurrent_updates_lose_nothing(tmp_path: Path) -> None:
    states = StateFile(tmp_path)
    states.update(phase=Phase.LOADING)

    def count() -> None:
        for _ in range(50):
            with states._lock:
                states.update(restarts=states.read().restarts + 1)

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(50):
        states.update(detail=str(number))
    for thread in threads:
        thread.join()
    assert states.read().restarts == 100
    assert states.read().phase is Phase.LOADING


@pytest.mark.fault("Disk full while the progress of a pull or a start is published",
                   "The update is skipped; the work continues.")
def test_failed_update_of_progress_does_not_stop_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    states = StateFile(tmp_path)
    states.update(phase=Phase.PULLING, progress=0.1)
    monkeypatch.setattr("os.fsync", full)
    states.update_progress(progress=0.2)
    assert states.read().progress == 0.1
    assert [record.getMessage() for record in caplog.records] == [
        "cannot update progress in state.json: error=No space left on device"]
    with pytest.raises(OSError, match="No space"):
        states.update(phase=Phase.FAILED)
