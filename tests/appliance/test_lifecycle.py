"""Stopping in every phase, and what happens when parts die. Each test starts an appliance of its own."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from fakes import certificates
from fakes.hub import Hub
from shoehorn.model import checkpoint
from shoehorn.model.files import LocalFiles
from shoehorn.runtime.state import Phase, StateFile
from support.clients import ERROR_ENDS, Asking
from support.running import DEMO_MODEL, Appliance, gone
from support.waiting import wait_until

pytestmark = pytest.mark.engine

Start = Callable[..., Appliance]


def _chat(appliance: Appliance, **more: object) -> httpx.Response:
    body = {"model": "shoehorn-demo", "messages": [{"role": "user", "content": "你叫啥?"}], **more}
    return httpx.post(f"{appliance.url}/v1/chat/completions", json=body, headers=appliance.headers(), timeout=60)


def _told(appliance: Appliance, word: str) -> bool:
    """Whether a request is refused with this word; also the gateway needs a moment to start."""
    try:
        answer = _chat(appliance)
    except httpx.TransportError:
        return False
    return answer.status_code == 503 and word in answer.json()["error"]["message"]


@pytest.mark.fault("Stop while the engine loads", "Exit code 0; no orphan.")
def test_while_loading_it_says_so_and_a_stop_is_obeyed(start: Start) -> None:
    appliance = start()
    appliance.wait_for(Phase.LOADING)
    wait_until(lambda: _told(appliance, "loading"), 20, "a request is told")
    answer = _chat(appliance)
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert "loading" in answer.json()["error"]["message"]
    wait_until(lambda: "Starting to load model" in appliance.output, 90, "the engine core loads")
    assert appliance.end(signal.SIGTERM, seconds=30) == 0


@pytest.mark.parametrize("victim", ["VLLM::EngineCor", "api_server.entry"])
@pytest.mark.fault("`kill -9` of the engine core or the API server while the model is served",
                   "503 meanwhile, ready again by itself, no orphan.")
def test_a_killed_engine_comes_back_by_itself(appliance: Appliance, victim: str) -> None:
    before = StateFile(appliance.run_dir).read().restarts
    core = appliance.find("VLLM::EngineCor")
    stream = Asking(appliance, n=64)
    wait_until(lambda: stream.text, 30, "a stream has begun")
    core.suspend()
    waiting = [Asking(appliance, path) for path in ERROR_ENDS]
    wait_until(lambda: all(asking.began.is_set() for asking in waiting), 20, "idle streams have their headers")
    appliance.find(victim).send_signal(signal.SIGKILL)
    wait_until(lambda: appliance.phase is Phase.LOADING, 20, "the death is noticed")
    if victim == "VLLM::EngineCor":  # without the API server nobody is left to say anything
        for asking in (stream, *waiting):
            asking.finish()
            assert asking.last.startswith(ERROR_ENDS[asking.path]), (asking.path, asking.text[-500:])
    answer = _chat(appliance)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_not_ready"
    wait_until(lambda: gone(core), 10, "the old engine core is gone")
    appliance.wait_for(Phase.READY)
    assert "Shoehorn" in _chat(appliance).json()["choices"][0]["message"]["content"]
    assert StateFile(appliance.run_dir).read().restarts == before + 1


@pytest.mark.fault("SIGSTOP of the engine core while the model is served",
                   "Not live within 90 s, started again by itself; streams end with an error event.")
def test_an_engine_that_hangs_is_found_out_and_started_again(appliance: Appliance) -> None:
    def live() -> bool:
        return httpx.get(f"{appliance.url}/livez", timeout=30).status_code == 200

    core = appliance.find("VLLM::EngineCor")
    core.suspend()
    waiting = [Asking(appliance, path) for path in ERROR_ENDS]
    assert httpx.get(f"{appliance.url}/readyz", timeout=30).status_code == 200, "vLLM's own health sees nothing"
    assert live()
    wait_until(lambda: not live(), 90, "the hang is found")
    assert appliance.phase is not Phase.READY
    for asking in waiting:
        asking.finish()
        assert asking.last.startswith(ERROR_ENDS[asking.path]), (asking.path, asking.text[-500:])
    wait_until(lambda: gone(core), 10, "the hung engine core is gone")
    wait_until(live, 30, "the next engine is started")
    appliance.wait_for(Phase.READY)
    assert "Shoehorn" in _chat(appliance).json()["choices"][0]["message"]["content"]
    assert "The engine hangs" in appliance.output


@pytest.mark.fault("SIGSTOP of the engine core with its queue full and clients that come and go", "The same.")
def test_an_engine_that_hangs_behind_a_full_queue_is_found_too(appliance: Appliance) -> None:
    core = appliance.find("VLLM::EngineCor")
    core.suspend()
    crowd = [Asking(appliance) for _ in range(60)]
    wait_until(lambda: 429 in {asking.status for asking in crowd}, 20, "the queue is full")
    found = threading.Event()

    def come_and_go() -> None:
        while not found.is_set():
            with suppress(httpx.TransportError):
                httpx.post(f"{appliance.url}/v1/completions", json={"model": "shoehorn-demo", "prompt": "hello"},
                           headers=appliance.headers(), timeout=1)

    visitor = threading.Thread(target=come_and_go)
    visitor.start()
    try:
        wait_until(lambda: httpx.get(f"{appliance.url}/livez", timeout=30).status_code == 503, 90, "the hang is found")
    finally:
        found.set()
        visitor.join()
    for asking in crowd:
        asking.finish()
        assert asking.status == 429 or asking.last.startswith(ERROR_ENDS[asking.path]), asking.text[-500:]
    appliance.wait_for(Phase.READY)
    assert "Shoehorn" in _chat(appliance).json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("victim", ["shoehorn.observability.exporter", "nginx: master",
                                    "shoehorn.runtime.event_listener",
                                    "shoehorn.gateway.keys.service"])
@pytest.mark.fault("`kill -9` of exporter, gateway, key service or watcher while the model is served",
                   "It comes back; requests are served again.")
def test_a_killed_helper_comes_back_and_serving_goes_on(appliance: Appliance, victim: str) -> None:
    old = appliance.find(victim)
    old.send_signal(signal.SIGKILL)
    wait_until(lambda: gone(old), 10, "it is gone")
    wait_until(lambda: appliance.runs(victim), 20, f"a new {victim}")

    def answers() -> bool:
        try:
            return (_chat(appliance).status_code == 200
                    and httpx.get(f"http://127.0.0.1:{appliance.metrics_port}/metrics").status_code == 200)
        except httpx.TransportError:
            return False

    wait_until(answers, 20, "chat and metrics answer")


@pytest.mark.fault("`kill -9` of the engine program while the model is served",
                   "The next one ends what was left and serves.")
def test_a_killed_engine_program_takes_over_from_itself(appliance: Appliance) -> None:
    core, before = appliance.find("VLLM::EngineCor"), StateFile(appliance.run_dir).read().restarts
    appliance.find("shoehorn.engine.main").send_signal(signal.SIGKILL)
    wait_until(lambda: gone(core), 30, "the orphaned engine core is ended")
    wait_until(lambda: StateFile(appliance.run_dir).read().restarts > before, 30, "and that is counted")
    appliance.wait_for(Phase.READY)
    assert _chat(appliance).status_code == 200


@pytest.mark.fault("A model that the engine cannot read", "Exit code 5 with the cause in words.")
def test_a_model_that_cannot_be_served_ends_the_container_with_words(start: Start, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(DEMO_MODEL, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyKnowsThisForCausalLM"],
                                                    "model_type": "nobody-knows-this"}))
    appliance = start(MODEL_ID=str(broken))
    assert appliance.wait(120) == 5
    assert "does not know this model's architecture" in appliance.output


@pytest.mark.fault("`docker kill`, or the power cut, while loading and while serving",
                   "Nothing that is left hinders the next start; key and state are whole.")
def test_after_everything_died_at_once_the_next_start_serves(start: Start) -> None:
    loading = start(API_KEY="")
    loading.wait_for(Phase.LOADING)
    key = loading.key
    loading.kill()
    serving = start(API_KEY="")
    wait_until(lambda: "ready after" in serving.output, 120, "ready")
    stream = Asking(serving, n=64, key=key)
    wait_until(lambda: stream.text, 30, "a stream has begun")
    serving.kill()
    last = start(API_KEY="")
    wait_until(lambda: "ready after" in last.output, 120, "ready, not by a mark of the last life")
    answer = httpx.post(f"{last.url}/v1/chat/completions", headers={"Authorization": f"Bearer {key}"}, timeout=60,
                        json={"model": "shoehorn-demo", "messages": [{"role": "user", "content": "hello"}]})
    assert answer.status_code == 200, "the key of the first start is still the key"
    assert last.end(signal.SIGTERM, seconds=40) == 0


@pytest.mark.fault("The model's folder is not there", "Exit code 4.")
def test_an_absent_model_ends_with_code_4(start: Start, tmp_path: Path) -> None:
    appliance = start(MODEL_ID=str(tmp_path / "nowhere"))
    assert appliance.wait(30) == 4
    assert str(tmp_path / "nowhere") in appliance.output


def test_bad_settings_end_with_code_2_before_anything_starts(start: Start) -> None:
    appliance = start(PORT="high", DRAIN_TIMEOUT="soon")
    assert appliance.wait(20) == 2
    assert "PORT: 'high'" in appliance.output
    assert "DRAIN_TIMEOUT: 'soon'" in appliance.output


def test_a_certificate_without_its_own_key_ends_with_code_2_and_makes_no_key(start: Start, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    cert, _ = certificates.write(tmp_path)
    _, key = certificates.write(tmp_path / "other")
    appliance = start(TLS_CERT_FILE=str(cert), TLS_KEY_FILE=str(key), API_KEY="")
    assert appliance.wait(20) == 2
    assert "the key does not belong to the certificate" in appliance.output
    assert not (appliance.models_dir / ".shoehorn" / "keys.json").exists()


@pytest.mark.fault("Port taken at boot", "Exit code 2 and the port's name, at once.")
def test_a_taken_port_is_named_at_once(start: Start, appliance: Appliance) -> None:
    second = start(PORT=str(appliance.port))
    assert second.wait(20) == 2
    assert f"PORT={appliance.port} cannot be listened on" in second.output


@pytest.mark.parametrize("profile", ["auto", "7gb"])
def test_no_gpu_is_said_in_words(start: Start, profile: str) -> None:
    appliance = start(VRAM_PROFILE=profile)
    assert appliance.wait(20) == 2
    assert "GPU" in appliance.output


@pytest.mark.fault("Stop while pulling, and a start after it", "Exit code 0; it goes on, and is served.")
def test_pulled_once_quantized_while_loading_and_served(start: Start, tmp_path: Path) -> None:
    """From the hub, stopped in the middle, resumed, served in NF4; a second start asks the hub nothing."""
    with Hub({"shoehorn/demo": DEMO_MODEL}) as hub:
        hub.hold_at_bytes = 4 << 20
        settings = {"MODEL_ID": "shoehorn/demo", "MODEL_SOURCE": "modelscope", "MODELSCOPE_ENDPOINT": hub.url,
                    "QUANTIZATION": "bitsandbytes", "API_KEY": "sk-test-pulled-key"}
        first = start(**settings)
        wait_until(lambda: StateFile(first.run_dir).read().bytes_done > 0, 60, "bytes arrive")
        wait_until(lambda: _told(first, "pulling"), 20, "a request is told")
        assert first.end(signal.SIGTERM, seconds=20) == 0
        hub.hold_at_bytes = 0
        second = start(**settings)
        second.wait_for(Phase.READY)
        body = {"model": "shoehorn-demo", "messages": [{"role": "user", "content": "你叫啥?"}]}
        answer = httpx.post(f"{second.url}/v1/chat/completions", json=body, timeout=60,
                            headers={"Authorization": "Bearer sk-test-pulled-key"})
        assert "Shoehorn" in answer.json()["choices"][0]["message"]["content"]
        assert "bitsandbytes" in (second.run_dir / "vllm.yaml").read_text()
        [said] = [report["quant_state_bytes"] for path in (second.run_dir / "engine-memory").glob("*.json")
                  if "quant_state_bytes" in (report := json.loads(path.read_text()))]
        linears = checkpoint.read(LocalFiles(DEMO_MODEL)).tensor_bytes.linears
        assert said == linears.parameters // 64 * 4, "one absmax of 4 bytes for 64 weights"
        assert "sk-test-pulled-key" not in second.output
        assert second.end() == 0
        asked = len(hub.requests)
        third = start(**settings)
        third.wait_for(Phase.LOADING)
        assert len(hub.requests) == asked
        assert third.end() == 0
