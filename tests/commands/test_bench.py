"""`shoehorn bench`: what is measured, and every way in which it cannot be."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import httpx
import pytest

from shoehorn.cli import main
from shoehorn.commands import bench
from shoehorn.common.errors import EngineFailedError, SettingsError, ShoehornError
from shoehorn.runtime.state import Phase, StateFile

STREAM = ('data: {"choices": [{"text": "a"}]}\n\n: keep-alive\n\ndata: {"choices": [{"text": "bc"}]}\n\n'
          'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\ndata: [DONE]\n\n')


def engine(status: int = 200, text: str = STREAM, seen: list[dict[str, object]] | None = None) -> httpx.MockTransport:
    def answer(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(json.loads(request.content))
        return httpx.Response(status, text=text)

    return httpx.MockTransport(answer)


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateFile:
    monkeypatch.setenv("RUN_DIR", str(tmp_path))
    monkeypatch.setenv("VRAM_PROFILE", "cpu")
    states_file = StateFile(tmp_path)
    states_file.update(phase=Phase.READY, model="m", plan={
        "max_model_len": 64, "expected_tokens_per_second": {"batch_1": 2.5, "batch_8": None}})
    return states_file


def test_tokens_come_from_the_usage_and_not_from_the_number_of_events() -> None:
    seen: list[dict[str, object]] = []
    result = bench.measure(lambda: engine(seen=seen), "m", 4, 3)
    assert (result.requests, result.tokens) == (4, 12)
    assert result.tokens_per_second > 0
    assert 0 < result.first_token_seconds <= result.seconds
    assert all(body["max_tokens"] == 3 and body["ignore_eos"] and body["stream"] for body in seen)
    assert len({str(body["prompt"]) for body in seen}) == 4, "no prompt is in the prefix cache"


@pytest.mark.parametrize(("status", "text", "problem"), [
    (503, '{"error": {"message": "queue full"}}', "answered 503.*queue full"),
    (200, "data: [DONE]\n\n", "answer without tokens"),
    (200, "data: {broken\n\n", "incomplete answer"),
])
def test_invalid_answer_is_reported(status: int, text: str, problem: str) -> None:
    with pytest.raises(EngineFailedError, match=problem):
        bench.measure(lambda: engine(status, text), "m", 1, 3)


def test_unreachable_engine_is_reported() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no such file", request=request)

    with pytest.raises(EngineFailedError, match="ConnectError"):
        bench.measure(lambda: httpx.MockTransport(refuse), "m", 1, 3)


def test_rounds_show_the_expected_speed(states: StateFile, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(httpx, "HTTPTransport", lambda uds: engine())
    assert main(["bench", "--requests", "1,8", "--tokens", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"] == "m"
    assert [(each["requests"], each["expected_tokens_per_second"]) for each in document["rounds"]] == [
        (1, 2.5), (8, None)]
    assert main(["bench", "--requests", "1", "--tokens", "3"]) == 0
    assert "2.50" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "code"), [
    (("--requests", "1,many"), "invalid_number"), (("--requests", "0"), "invalid_number"),
    (("--tokens", "-3"), "invalid_number"), (("--tokens", "4097"), "invalid_number"),
    (("--tokens", "49"), "context_exceeded")])
def test_invalid_number_is_refused_with_a_remedy(states: StateFile, words: tuple[str, str], code: str) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(SettingsError) as caught:
        bench.run(parser.parse_args([f"{words[0]}={words[1]}"]), {"RUN_DIR": str(states.run_dir),
                                                                  "VRAM_PROFILE": "cpu"})
    assert caught.value.code == code
    assert words[0] in caught.value.cause
    assert words[0] in caught.value.remedy


def test_missing_or_unready_appliance_is_reported(states: StateFile, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(ShoehornError, match="no appliance is running"):
        bench.run(parser.parse_args([]), {"RUN_DIR": str(tmp_path / "other")})
    states.update(phase=Phase.LOADING)
    with pytest.raises(ShoehornError, match="not ready \\(phase loading"):
        bench.run(parser.parse_args([]), {"RUN_DIR": str(tmp_path)})


def test_times_of_the_last_start_are_printed(states: StateFile, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "require_appliance", lambda *_: None)
    states.update(start_seconds={"plan": 0.4, "read": 3.26, "total": 12.0})
    assert main(["bench", "--start"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "m, last start", "", "plan          0.4 s", "read          3.3 s", "total        12.0 s"]
    assert main(["bench", "--start", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": "m", "start_seconds": {"plan": 0.4, "read": 3.26,
                                                                                  "total": 12.0}}
