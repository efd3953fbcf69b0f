"""Limits at the real engine; what happens to requests when their client leaves, and when the appliance stops."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from shoehorn.runtime.state import Phase
from support.clients import ERROR_ENDS, HELLO, LONG, Asking
from support.running import Appliance
from support.waiting import wait_until

pytestmark = pytest.mark.engine

Start = Callable[..., Appliance]
SHORT = {"model": "shoehorn-demo", "messages": HELLO, "max_tokens": 4}
MUCH = {**SHORT, **LONG, "max_tokens": 900, "n": 64}
"""So much that it cannot be done before the engine core is suspended."""


@pytest.fixture
def engine(appliance: Appliance) -> Iterator[httpx.Client]:
    """A client of the engine's own socket, in the gateway's place; it keeps no connection."""
    transport = httpx.HTTPTransport(uds=str(appliance.run_dir / "engine.sock"),
                                    limits=httpx.Limits(max_keepalive_connections=0))
    with httpx.Client(transport=transport, base_url="http://engine", timeout=60) as made:
        yield made


def _as(key: str, limits: str) -> dict[str, str]:
    return {"X-Shoehorn-Key": key, "X-Shoehorn-Limits": limits}


def _sample(appliance: Appliance, name: str) -> float:
    text = httpx.get(f"http://127.0.0.1:{appliance.metrics_port}/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _of_engine(appliance: Appliance, names: str) -> float:
    """The sum of the engine's samples of these names; not a number when a busy engine gave none in time."""
    text = httpx.get(f"http://127.0.0.1:{appliance.metrics_port}/metrics", timeout=30).text
    found = re.findall(rf"^(?:{names})\{{.*\}} (\S+)$", text, re.MULTILINE)
    return sum(float(value) for value in found) if found else math.nan


def _generated(appliance: Appliance) -> float:
    """Tokens so far."""
    found = [math.nan]

    def told() -> bool:
        found[0] = _of_engine(appliance, "vllm:generation_tokens_total")
        return not math.isnan(found[0])

    wait_until(told, 20, "the engine's metrics")
    return found[0]


def _running(appliance: Appliance) -> float:
    return _of_engine(appliance, "vllm:num_requests_running|vllm:num_requests_waiting")


def _admitted(appliance: Appliance) -> float:
    return _of_engine(appliance, "shoehorn_requests_running")


def test_the_real_engine_is_held_to_the_limits(engine: httpx.Client, appliance: Appliance) -> None:
    two = _as("twice", "requests_per_minute=2;max_tokens=3")
    first = engine.post("/v1/chat/completions", json={**SHORT, **LONG, "max_tokens": None}, headers=two).json()
    assert first["usage"]["completion_tokens"] == 3, "the cap is what a request gets that names nothing"
    refused = engine.post("/v1/chat/completions", json=SHORT, headers=two)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "max_tokens_exceeded")
    limited = engine.post("/v1/chat/completions", json=SHORT, headers=two)
    assert (limited.status_code, limited.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(limited.headers["retry-after"]) <= 60
    long = engine.post("/v1/messages", content=b" " * 2000, headers=_as("short", "body_bytes=1000"))
    assert (long.status_code, long.json()["error"]["type"]) == (413, "request_too_large")
    for prompts, status in ((64, 200), (65, 400)):  # the engine itself bounds either, and not their product
        many = engine.post("/v1/completions", json={"model": "shoehorn-demo", "prompt": ["a"] * prompts, "n": 2,
                                                    "max_tokens": 1}, headers=_as("many", ""))
        assert many.status_code == status
    assert many.json()["error"]["code"] == "too_many_answers"
    for outcome in ("ok", "max_tokens_exceeded", "rate_limit_exceeded"):
        name = f'shoehorn_requests_total{{key="twice",outcome="{outcome}"}}'
        wait_until(lambda name=name: _sample(appliance, name) == 1, 20, name)
    wait_until(lambda: _sample(appliance, 'shoehorn_tokens_total{key="twice",kind="completion"}') == 3, 20, "3 tokens")


def test_concurrent_requests_of_one_key_leave_the_others_alone(engine: httpx.Client, appliance: Appliance) -> None:
    one = _as("one", "concurrent=1")
    core = appliance.find("VLLM::EngineCor")
    few = {**MUCH, "n": 8, "stream": True}  # the other key's request waits for these, and not for what waits as well
    with engine.stream("POST", "/v1/chat/completions", json=few, headers=one) as stream:
        lines = stream.iter_lines()  # kept: httpx closes the connection of an iterator that nobody holds
        next(lines)
        core.suspend()
        second = engine.post("/v1/chat/completions", json=SHORT, headers=one)
        assert (second.status_code, second.json()["error"]["code"]) == (429, "concurrency_limit_exceeded")
        core.resume()
        assert engine.post("/v1/chat/completions", json=SHORT, headers=_as("two", "concurrent=1")).status_code == 200
    wait_until(lambda: engine.post("/v1/chat/completions", json=SHORT, headers=one).status_code == 200, 15,
               "the place is free again")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.fault("A client leaves", "Its generation ends; the engine has nothing to do.")
def test_a_client_that_leaves_ends_its_generation(appliance: Appliance, stream: bool) -> None:
    body = json.dumps({**MUCH, "stream": stream})
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {appliance.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")
    wait_until(lambda: _running(appliance) == 0, 20, "nothing else runs")
    before = _generated(appliance)
    core = appliance.find("VLLM::EngineCor")
    if not stream:
        core.suspend()  # nothing tells when it begins
    with socket.create_connection(("127.0.0.1", appliance.port), timeout=60) as connection:
        connection.sendall((head + body).encode())
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            core.suspend()
        wait_until(lambda: _admitted(appliance) > 0, 20, "it has arrived")
    left = time.monotonic()
    wait_until(lambda: _admitted(appliance) == 0, 10, "the request is given up")
    core.resume()
    wait_until(lambda: _running(appliance) == 0, 10, "the engine has nothing to do")
    print(f"ended {time.monotonic() - left:.2f} s after the client left")
    assert _generated(appliance) - before < 64 * 900, "it was aborted, not finished"


@pytest.mark.fault("Stop while streams cannot finish", "Each ends with an error event of its dialect.")
def test_a_stop_ends_what_cannot_finish_with_an_error_of_its_own(start: Start) -> None:
    appliance = start(DRAIN_TIMEOUT="8")
    appliance.wait_for(Phase.READY)
    core = appliance.find("VLLM::EngineCor")
    begun = Asking(appliance, n=MUCH["n"])
    wait_until(lambda: begun.text, 30, "a stream has begun")
    core.suspend()  # nothing can finish now
    waiting = [*(Asking(appliance, path) for path in ERROR_ENDS), Asking(appliance, stream=False)]
    wait_until(lambda: _admitted(appliance) == 6, 30, "all are there")
    ends: list[int] = []
    stopping = threading.Thread(target=lambda: ends.append(appliance.end(signal.SIGINT, seconds=40)))  # Ctrl-C
    stopping.start()
    wait_until(lambda: httpx.get(f"{appliance.url}/readyz").status_code == 503, 2, "not ready at once")
    refused = httpx.post(f"{appliance.url}/v1/chat/completions", json=SHORT, headers=appliance.headers())
    assert refused.status_code == 503
    assert "stopping" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"]
    for asking in [begun, *waiting]:
        text = asking.finish()
        assert "stopped before the answer was complete" in text
        if asking.status == 503:  # nothing had been sent
            assert json.loads(text)["error"]["type"] in ("server_error", "overloaded_error")
            continue
        assert asking.last.startswith(ERROR_ENDS[asking.path]), (asking.path, text[-600:])
        assert text.endswith("data: [DONE]\n\n") or asking.path in ("/v1/messages", "/v1/responses")
    assert (begun.status, waiting[-1].status) == (200, 503)
    assert 200 in [asking.status for asking in waiting], "an idle stream has its headers"
    core.resume()
    stopping.join()
    assert ends == [0]
    assert "drained: 0 requests finished, 6 aborted" in appliance.output


def test_a_drain_lets_streams_end_and_leaves_the_appliance_to_be_stopped(start: Start) -> None:
    appliance = start(DRAIN_TIMEOUT="60", MAX_NUM_SEQS="4", MAX_QUEUED_REQUESTS="0")
    appliance.wait_for(Phase.READY)
    core = appliance.find("VLLM::EngineCor")
    core.suspend()
    streams = [Asking(appliance, path) for path in ERROR_ENDS]
    wait_until(lambda: _admitted(appliance) == 4, 20, "they are there")
    full = httpx.post(f"{appliance.url}/v1/chat/completions", json=SHORT, headers=appliance.headers(), timeout=30)
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert full.headers.get_list("retry-after") == ["5"]
    with subprocess.Popen([sys.executable, "-m", "shoehorn.cli", "drain"], stdout=subprocess.PIPE, text=True, env={
            **os.environ, "RUN_DIR": str(appliance.run_dir), "DRAIN_TIMEOUT": "60"}) as drain:
        wait_until(lambda: appliance.phase is Phase.STOPPING, 20, "it is noticed")
        assert httpx.get(f"{appliance.url}/readyz").status_code == 503
        core.resume()
        output, _ = drain.communicate(timeout=90)
    assert drain.returncode == 0
    assert output == "drained: 4 requests finished, 0 aborted; the appliance can be stopped\n"
    for asking in streams:
        text = asking.finish()
        assert '"error"' not in text
        assert "data: [DONE]" in text or "message_stop" in text or "response.completed" in text
    assert appliance.phase is Phase.STOPPING
    assert appliance.process.poll() is None
    assert appliance.end(signal.SIGTERM, seconds=30) == 0
