"""Starts that end with an exit code, a stop while the engine loads, and deaths under the shared appliance."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from fakes import certificates
from shoehorn.runtime import programs
from shoehorn.runtime.state import Phase
from support.clients import ERROR_ENDS, BackgroundRequest, chat, text_of
from support.running import DEMO_MODEL, Appliance, is_gone
from support.waiting import wait_until

pytestmark = pytest.mark.engine

Start = Callable[..., Appliance]
PARTS = ("VLLM::APIServer", "VLLM::EngineCor", "VLLM::Worker")


def is_refused_in(appliance: Appliance, phase: str) -> bool:
    """Return True if a request is refused with the phase; the gateway needs a moment to start."""
    try:
        answer = chat(appliance)
    except httpx.TransportError:
        return False
    return answer.status_code == 503 and phase in answer.json()["error"]["message"]


@pytest.mark.fault("Stop while the engine loads", "Exit code 0; no orphan.")
def test_requests_get_the_phase_and_a_stop_works_while_the_engine_loads(start: Start) -> None:
    appliance = start()
    appliance.wait_for(Phase.LOADING)
    wait_until(lambda: is_refused_in(appliance, "loading"), 20, "a refusal")
    assert chat(appliance).headers["retry-after"]
    wait_until(lambda: "Starting to load model" in appliance.output, 90, "the engine core loads")
    assert appliance.stop(signal.SIGTERM, seconds=30) == 0


@pytest.mark.fault("`kill -9` of the engine core while the model is served, and of a worker while the next engine "
                   "loads", "Streams end with an error event; 503 meanwhile, ready again, no orphan.")
def test_engine_restarts_after_its_core_and_then_a_worker_is_killed(appliance: Appliance) -> None:
    before = appliance.state.restarts
    core = appliance.find("VLLM::EngineCor")
    stream = BackgroundRequest(appliance, n=64)
    wait_until(lambda: stream.text, 30, "a stream")
    core.suspend()
    waiting = [BackgroundRequest(appliance, path) for path in ERROR_ENDS]
    wait_until(lambda: all(each.has_headers.is_set() for each in waiting), 20, "headers of idle streams")
    core.kill()
    wait_until(lambda: appliance.phase is Phase.LOADING, 20, "the next start")
    for each in (stream, *waiting):
        each.assert_ended_with_error()
    refusal = chat(appliance)
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "model_not_ready")
    wait_until(lambda: is_gone(core), 10, "the exit of the old engine core")

    wait_until(lambda: appliance.runs("VLLM::Worker"), 90, "the next worker")
    parts = [appliance.find(part) for part in PARTS]
    appliance.find("VLLM::Worker").kill()
    wait_until(lambda: appliance.state.restarts == before + 2, 60, "the second restart")
    assert psutil.wait_procs(parts, timeout=30)[1] == []
    appliance.wait_for(Phase.READY)
    assert "Shoehorn" in text_of(chat(appliance))
    assert appliance.state.restarts == before + 2


@pytest.mark.parametrize("victim", [programs.EXPORTER, "nginx: master",
                                    programs.EVENT_LISTENER, programs.KEYS])
@pytest.mark.fault("`kill -9` of exporter, gateway, key service or watcher while the model is served",
                   "It comes back; requests are served again.")
def test_killed_helper_comes_back_and_requests_are_served(appliance: Appliance, victim: str) -> None:
    old = appliance.find(victim)
    old.kill()
    wait_until(lambda: is_gone(old), 10, "its exit")
    wait_until(lambda: appliance.runs(victim), 20, f"a new {victim}")

    def answers() -> bool:
        try:
            return (chat(appliance).status_code == 200
                    and httpx.get(f"http://127.0.0.1:{appliance.metrics_port}/metrics").status_code == 200)
        except httpx.TransportError:
            return False

    wait_until(answers, 20, "chat and metrics")


@pytest.mark.fault("A model that the engine cannot read", "Exit code 4 with the cause, before the engine starts.")
def test_unsupported_model_ends_the_container_with_the_cause(start: Start, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(DEMO_MODEL, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyKnowsThisForCausalLM"],
                                                    "model_type": "nobody-knows-this"}))
    appliance = start(MODEL_ID=str(broken))
    assert appliance.wait(120) == 4
    assert "nobody-knows-this" in appliance.output


@pytest.mark.process
@pytest.mark.fault("The model's folder does not exist", "Exit code 4.")
def test_missing_model_ends_with_code_4(start: Start, tmp_path: Path) -> None:
    appliance = start(MODEL_ID=str(tmp_path / "nowhere"))
    assert appliance.wait(30) == 4
    assert str(tmp_path / "nowhere") in appliance.output


@pytest.mark.process
def test_invalid_settings_end_with_code_2_before_anything_starts(start: Start) -> None:
    appliance = start(PORT="high", DRAIN_TIMEOUT="soon")
    assert appliance.wait(20) == 2
    assert "PORT: 'high'" in appliance.output
    assert "DRAIN_TIMEOUT: 'soon'" in appliance.output


@pytest.mark.process
def test_certificate_with_another_key_ends_with_code_2_and_generates_no_key(start: Start, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    certificate, _ = certificates.write(tmp_path)
    _, key = certificates.write(tmp_path / "other")
    appliance = start(TLS_CERT_FILE=str(certificate), TLS_KEY_FILE=str(key), API_KEY="")
    assert appliance.wait(20) == 2
    assert "certificate" in appliance.output
    assert not (appliance.models_dir / ".shoehorn" / "keys.json").exists()


@pytest.mark.process
@pytest.mark.fault("Port taken at boot", "Exit code 2 and the port's name, at once.")
def test_occupied_port_is_reported_at_once(start: Start, appliance: Appliance) -> None:
    second = start(PORT=str(appliance.port))
    assert second.wait(20) == 2
    assert f"PORT={appliance.port}" in second.output


@pytest.mark.process
@pytest.mark.parametrize("profile", ["auto", "7gb"])
def test_missing_gpu_is_reported(start: Start, profile: str) -> None:
    appliance = start(VRAM_PROFILE=profile)
    assert appliance.wait(20) == 2
    assert "GPU" in appliance.output
