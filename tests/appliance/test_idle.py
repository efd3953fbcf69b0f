"""IDLE_STOP: the engine stops while idle, and the next request starts it. The stand-in takes the place of vLLM."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import httpx
import psutil
import pytest

from shoehorn.common.paths import HOME
from shoehorn.runtime.state import Phase
from support.clients import BackgroundRequest, chat, samples
from support.running import Appliance, standin

pytestmark = pytest.mark.process

Start = Callable[..., Appliance]
PARTS = ("VLLM::APIServer", "VLLM::EngineCor", "VLLM::Worker")


@pytest.mark.fault("No request for IDLE_STOP", "The engine ends and frees its memory; the next request gets 503 with "
                   "the phase and starts it; it counts as no failure.")
def test_idle_engine_stops_and_the_next_request_starts_it(start: Start) -> None:
    appliance = start(IDLE_STOP="1s", **standin(look=0.2))
    appliance.wait_for(Phase.READY)
    parts = [appliance.find(part) for part in PARTS]
    stream = BackgroundRequest(appliance, max_tokens=200)  # three times as long as IDLE_STOP
    appliance.wait_for(Phase.IDLE)
    assert stream.result().endswith("data: [DONE]\n\n"), "a running request is finished first"
    assert psutil.wait_procs(parts, timeout=30)[1] == []

    ready = httpx.get(f"{appliance.url}/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "idle"})
    assert httpx.get(f"{appliance.url}/livez").status_code == 200
    check = subprocess.run([sys.executable, HOME / "healthcheck" / "healthcheck.py", "--port", str(appliance.port)],
                           capture_output=True, text=True)
    assert (check.returncode, check.stdout) == (0, "ready: idle, the next request starts the engine\n")
    assert samples(appliance, r'shoehorn_phase\{phase="idle"\}') == 1
    models = httpx.get(f"{appliance.url}/v1/models", headers=appliance.headers())
    assert [model["id"] for model in models.json()["data"]] == ["shoehorn-demo"]
    one = httpx.get(f"{appliance.url}/v1/models/shoehorn-demo", headers=appliance.headers())
    assert one.json()["id"] == "shoehorn-demo"
    assert httpx.get(f"{appliance.url}/v1/models").status_code == 401
    assert chat(appliance, key="sk-of-somebody-else").status_code == 401
    assert httpx.get(f"{appliance.url}/").status_code == 200
    assert not (appliance.run_dir / "wake").exists()
    assert appliance.phase is Phase.IDLE

    refusal = chat(appliance)
    assert (refusal.status_code, refusal.json()["error"]["phase"]) == (503, "idle")
    assert int(refusal.headers["retry-after"]) > 0
    message = httpx.post(f"{appliance.url}/v1/messages", json={}, headers=appliance.headers())
    assert (message.status_code, message.json()["error"]["type"]) == (503, "overloaded_error")
    appliance.wait_for(Phase.READY, 30)
    assert chat(appliance).status_code == 200
    assert (appliance.state.restarts, appliance.state.failures) == (0, {})
    assert not (appliance.run_dir / "restarts.json").exists()
    appliance.wait_for(Phase.IDLE, 30)
    assert appliance.stop() == 0
