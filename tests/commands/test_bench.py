"""`shoehorn bench`: what is measured, and every way in which it cannot be."""

from __future__ import annotations

import argparse
import json
import re
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
    found = StateFile(tmp_path)
    found.update(phase=Phase.READY, model="m", plan={
        "max_model_len": 64, "expected_tokens_per_second": {"batch_1": 2.5, "batch_8": None}})
    return found


def test_tokens_are_those_of_the_usage_and_not_the_number_of_events() -> None:
    seen: list[dict[str, object]] = []
    found = bench.measure(lambda: engine(seen=seen), "m", 4, 3)
    assert (found.requests, found.tokens) == (4, 12)
    assert found.tokens_per_second == pytest.approx(12 / found.seconds, rel=0.2)
    assert 0 < found.first_token_seconds <= found.seconds
    assert all(body["max_tokens"] == 3 and body["ignore_eos"] and body["stream"] for body in seen)
    assert len({str(body["prompt"]) for body in seen}) == 4, "no request finds another one's prompt in the cache"


@pytest.mark.parametrize(("status", "text", "said"), [
    (503, '{"error": {"message": "queue full"}}', "answered with 503.*queue full"),
    (200, "data: [DONE]\n\n", "has no tokens"),
    (200, "data: {broken\n\n", "did not finish its answer"),
])
def test_an_answer_that_is_none_is_told(status: int, text: str, said: str) -> None:
    with pytest.raises(EngineFailedError, match=said):
        bench.measure(lambda: engine(status, text), "m", 1, 3)


def test_an_engine_that_is_gone_is_told() -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no such file", request=request)

    with pytest.raises(EngineFailedError, match="ConnectError"):
        bench.measure(lambda: httpx.MockTransport(gone), "m", 1, 3)


def test_rounds_stand_beside_what_was_expected(states: StateFile, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(httpx, "HTTPTransport", lambda uds: engine())
    assert main(["bench", "--requests", "1,8", "--tokens", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "m"
    assert [(each["requests"], each["expected_tokens_per_second"]) for each in found["rounds"]] == [(1, 2.5), (8, None)]
    assert main(["bench", "--requests", "1", "--tokens", "3"]) == 0
    assert "2.50" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), [
    (("--requests", "1,many"), "--requests: 'many'"), (("--requests", "0"), "--requests: '0'"),
    (("--tokens", "-3"), "--tokens: '-3'"), (("--tokens", "4097"), "--tokens: '4097'"),
    (("--tokens", "49"), "a context of 64 tokens.*\n.*at most 48")])
def test_a_number_that_cannot_be_used_is_refused_with_what_to_type(states: StateFile, words: tuple[str, str],
                                                                   said: str) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(SettingsError) as caught:
        bench.run(parser.parse_args([f"{words[0]}={words[1]}"]), {"RUN_DIR": str(states.run_dir),
                                                                  "VRAM_PROFILE": "cpu"})
    assert re.search(said, str(caught.value))


def test_an_appliance_that_is_not_there_or_not_ready_is_told(states: StateFile, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(ShoehornError, match="No appliance runs"):
        bench.run(parser.parse_args([]), {"RUN_DIR": str(tmp_path / "other")})
    states.update(phase=Phase.LOADING)
    with pytest.raises(ShoehornError, match=r"not ready \(loading\)"):
        bench.run(parser.parse_args([]), {"RUN_DIR": str(tmp_path)})
