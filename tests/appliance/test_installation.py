"""One installation: stopped while it pulls, served in NF4, hung, killed, served with a draft model, and stopped.

The tests share one volume with its generated key, and run in this order. Two starts serve with the real vLLM.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from fakes.hub import Hub
from shoehorn.engine.diagnosis import HUNG
from shoehorn.engine.timing import Timing
from shoehorn.model import checkpoint
from shoehorn.model.files import LocalFiles
from shoehorn.runtime.state import Phase
from support.clients import ERROR_ENDS, UNQUANTIZED, BackgroundRequest, admitted, answers, chat, samples, text_of
from support.running import DEMO_MODEL, Appliance, is_gone
from support.waiting import wait_until

pytestmark = pytest.mark.engine

LIVENESS_SECONDS = 90
"""Time limit of the promise that a hang is detected."""


class Installation:
    """Starts on one volume; `appliance` is the latest."""

    def __init__(self, home: Path, hub: Hub) -> None:
        self.hub, self.home, self.key = hub, home, ""
        self.started: list[Appliance] = []

    def start(self, **settings: str) -> Appliance:
        """Start the next appliance; the first one generates the key."""
        self.started.append(Appliance(
            self.home, MODEL_ID="shoehorn/demo", MODEL_SOURCE="modelscope", MODELSCOPE_ENDPOINT=self.hub.url,
            API_KEY="", **settings))
        self.key = self.key or self.appliance.key
        self.appliance.key = self.key
        return self.appliance

    @property
    def appliance(self) -> Appliance:
        """The latest start."""
        return self.started[-1]


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with Hub({"shoehorn/demo": DEMO_MODEL, "shoehorn/draft": DEMO_MODEL}) as hub:
        installation = Installation(tmp_path_factory.mktemp("installation"), hub)
        yield installation
        for appliance in installation.started:
            appliance.discard()
    for later in installation.started[1:]:
        assert installation.key not in later.output


@pytest.mark.fault("Stop while pulling, and a start after it", "Exit code 0; the pull is resumed, the model served.")
def test_stopped_pull_is_resumed_and_the_model_served_in_nf4(installation: Installation) -> None:
    installation.hub.hold_at_bytes = 4 << 20
    first = installation.start(QUANTIZATION="bitsandbytes")
    wait_until(lambda: first.state.bytes_done > 0, 60, "bytes of the model")
    wait_until(lambda: first.phase is Phase.PULLING and chat(first).status_code == 503, 20, "a refusal")
    assert "pulling" in chat(first).json()["error"]["message"]
    assert first.stop(signal.SIGTERM, seconds=20) == 0
    installation.hub.hold_at_bytes = 0
    second = installation.start(QUANTIZATION="bitsandbytes", SHOEHORN_TIMING=json.dumps(
        {"look": 1, "quiet": 3, "patience": 3, "backoff": 0.1}))
    second.wait_for(Phase.READY)
    assert [span[:6] for span in installation.hub.downloads("model.safetensors") if span != "bytes=0-131071"] == [
        "", "bytes="]
    assert "Shoehorn" in text_of(chat(second))
    assert "bitsandbytes" in (second.run_dir / "vllm.yaml").read_text()
    [size] = [report["quant_state_bytes"] for path in (second.run_dir / "engine-memory").glob("*.json")
              if "quant_state_bytes" in (report := json.loads(path.read_text()))]
    linears = checkpoint.read(LocalFiles(DEMO_MODEL)).tensor_bytes.linears
    assert size == linears.parameters // 64 * 4, "one absmax of 4 bytes for 64 weights"


@pytest.mark.fault("SIGSTOP of the engine core while the model is served, with its queue full and clients that come "
                   "and go", "Not live within 90 s, restarted; streams end with an error event.")
def test_hung_engine_is_detected_and_restarted(installation: Installation) -> None:
    def is_live() -> bool:
        return httpx.get(f"{appliance.url}/livez", timeout=30).status_code == 200

    def come_and_go() -> None:
        while not detected.is_set():
            with suppress(httpx.TransportError):
                httpx.post(f"{appliance.url}/v1/completions", json={"model": "shoehorn-demo", "prompt": "hello"},
                           headers=appliance.headers(), timeout=1)

    defaults = Timing()
    assert 2 * defaults.look + defaults.quiet + defaults.patience + defaults.tick < LIVENESS_SECONDS
    appliance, detected = installation.appliance, threading.Event()
    core = appliance.find("VLLM::EngineCor")
    core.suspend()
    waiting = [BackgroundRequest(appliance, path) for path in ERROR_ENDS]
    assert httpx.get(f"{appliance.url}/readyz", timeout=30).status_code == 200, "vLLM's own health detects nothing"
    assert is_live()
    queue = [BackgroundRequest(appliance) for _ in range(60)]
    wait_until(lambda: 429 in {each.status for each in queue}, 20, "a full queue")
    visitor = threading.Thread(target=come_and_go)
    visitor.start()
    try:
        wait_until(lambda: not is_live(), LIVENESS_SECONDS, "the detection")
    finally:
        detected.set()
        visitor.join()
    assert appliance.phase is not Phase.READY
    for each in (*waiting, *queue):
        each.result()
        assert each.status == 429 or each.last_event.startswith(ERROR_ENDS[each.path]), (each.path, each.text[-500:])
    wait_until(lambda: is_gone(core), 10, "the exit of the hung engine core")
    wait_until(is_live, 30, "the start of the next engine")
    appliance.wait_for(Phase.READY)
    assert "Shoehorn" in text_of(chat(appliance))
    assert appliance.state.failures == {HUNG.name: 1}


@pytest.mark.fault("`docker kill`, or the power cut, while serving",
                   "Nothing that remains hinders the next start; key and state are intact.")
def test_killed_installation_serves_again_with_a_draft_model(installation: Installation) -> None:
    hub = installation.hub
    stream = BackgroundRequest(installation.appliance, n=64)
    wait_until(lambda: stream.text, 30, "a stream")
    installation.appliance.kill()
    before = len(hub.requests)
    last = installation.start(SPECULATIVE="shoehorn/draft", DRAIN_TIMEOUT="8")
    wait_until(lambda: "ready after" in last.output, 150, "readiness, not by a mark of the killed one")
    last.wait_for(Phase.READY, 10)
    assert [each.path for each in hub.requests[before:] if "shoehorn/demo" in each.path] == [], "it is complete"
    options = yaml.safe_load((last.run_dir / "vllm.yaml").read_text())
    assert options["speculative-config"]["model"] == str(last.models_dir / "shoehorn" / "draft")
    assert answers(last) == UNQUANTIZED, "the draft model changes no answer"
    assert samples(last, "vllm:spec_decode_num_accepted_tokens_total") > 0, (
        "the draft model is the model itself, so its tokens are accepted")
    refusal = httpx.post(f"{last.url}/v1/completions", headers=last.headers(), timeout=60,
                         json={"model": "shoehorn-demo", "prompt": "a", "min_p": 0.5})
    assert (refusal.status_code, "min_p" in refusal.json()["error"]["message"]) == (400, True)


@pytest.mark.fault("Stop while streams cannot finish", "Each ends with an error event of its dialect.")
def test_stop_ends_unfinished_requests_with_an_error(installation: Installation) -> None:
    appliance = installation.appliance
    core = appliance.find("VLLM::EngineCor")
    running = BackgroundRequest(appliance, n=64)
    wait_until(lambda: running.text, 30, "a stream")
    core.suspend()  # nothing can finish now
    waiting = [*(BackgroundRequest(appliance, path) for path in ERROR_ENDS), BackgroundRequest(appliance, stream=False)]
    wait_until(lambda: admitted(appliance) == 6, 30, "six admitted requests")
    exit_codes: list[int] = []
    stop = threading.Thread(target=lambda: exit_codes.append(appliance.stop(signal.SIGINT, seconds=40)))  # Ctrl-C
    stop.start()
    wait_until(lambda: httpx.get(f"{appliance.url}/readyz").status_code == 503, 2, "the refusal of new requests")
    refusal = chat(appliance)
    assert refusal.status_code == 503
    assert "stopping" in refusal.json()["error"]["message"]
    assert refusal.headers["retry-after"]
    for each in (running, *waiting):
        text = each.result()
        if each.status == 503:  # nothing had been sent
            assert json.loads(text)["error"]["type"] in ("server_error", "overloaded_error")
            continue
        each.assert_ended_with_error()
        assert text.endswith("data: [DONE]\n\n") or each.path in ("/v1/messages", "/v1/responses")
    assert (running.status, waiting[-1].status) == (200, 503)
    assert 200 in [each.status for each in waiting], "an idle stream has its headers"
    with suppress(psutil.NoSuchProcess):  # the stop may have killed it by now
        core.resume()
    stop.join()
    assert exit_codes == [0]
    assert "drained: 0 requests finished, 6 aborted" in appliance.output
