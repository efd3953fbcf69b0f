"""Limits at the real engine, and the end of a request whose client leaves."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from shoehorn.config.models_dir import ModelsDir
from shoehorn.runtime.usage_file import Usage, UsageFiles, by_key_and_model
from support.clients import BODIES, HELLO, LONG, admitted, samples
from support.running import Appliance
from support.waiting import wait_until

pytestmark = pytest.mark.engine

SHORT = {"model": "shoehorn-demo", "messages": HELLO, "max_tokens": 4}
MUCH = {**SHORT, **LONG, "max_tokens": 900, "n": 64}
"""Too many tokens to be generated before the engine core is suspended."""


@pytest.fixture
def engine(appliance: Appliance) -> Iterator[httpx.Client]:
    """Open a client of the engine's own socket, in the place of the gateway, without persistent connections."""
    transport = httpx.HTTPTransport(uds=str(appliance.run_dir / "engine.sock"),
                                    limits=httpx.Limits(max_keepalive_connections=0))
    with httpx.Client(transport=transport, base_url="http://engine", timeout=60) as http:
        yield http


def headers_of(key: str, limits: str) -> dict[str, str]:
    """Return the headers that the gateway sets for a key."""
    return {"X-Shoehorn-Key": key, "X-Shoehorn-Limits": limits}


def generated(appliance: Appliance) -> float:
    """Return the number of generated tokens; a busy engine may give no metrics at first."""
    value = math.nan

    def is_known() -> bool:
        nonlocal value
        value = samples(appliance, "vllm:generation_tokens_total")
        return not math.isnan(value)

    wait_until(is_known, 20, "the engine's metrics")
    return value


def is_idle(appliance: Appliance) -> bool:
    """Return True if no request runs or waits in the engine."""
    return samples(appliance, "vllm:num_requests_running|vllm:num_requests_waiting") == 0


def test_limits_apply_at_the_real_engine(engine: httpx.Client, appliance: Appliance) -> None:
    two = headers_of("twice", "requests_per_minute=2;max_tokens=3")
    first = engine.post("/v1/chat/completions", json={**SHORT, **LONG, "max_tokens": None}, headers=two).json()
    assert first["usage"]["completion_tokens"] == 3, "the cap is the default of a request that sets nothing"
    refused = engine.post("/v1/chat/completions", json=SHORT, headers=two)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "max_tokens_exceeded")
    limited = engine.post("/v1/chat/completions", json=SHORT, headers=two)
    assert (limited.status_code, limited.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(limited.headers["retry-after"]) <= 60
    long_body = engine.post("/v1/messages", content=b" " * 2000, headers=headers_of("short", "body_bytes=1000"))
    assert (long_body.status_code, long_body.json()["error"]["type"]) == (413, "request_too_large")
    for prompts, status in ((64, 200), (65, 400)):  # the engine bounds each factor, but not their product
        many = engine.post("/v1/completions", json={"model": "shoehorn-demo", "prompt": ["a"] * prompts, "n": 2,
                                                    "max_tokens": 1}, headers=headers_of("many", ""))
        assert many.status_code == status
    assert many.json()["error"]["code"] == "too_many_answers"
    for outcome in ("ok", "max_tokens_exceeded", "rate_limit_exceeded"):
        name = rf'shoehorn_requests_total\{{key="twice",outcome="{outcome}"\}}'
        wait_until(lambda name=name: samples(appliance, name) == 1, 20, name)
    name = r'shoehorn_tokens_total\{key="twice",kind="completion"\}'
    wait_until(lambda: samples(appliance, name) == 3, 20, name)


def counted(appliance: Appliance, key: str) -> tuple[float, float]:
    """Return the tokens of prompts and of answers that the engine's API server counted for a key."""
    return (samples(appliance, rf'shoehorn_tokens_total\{{key="{key}",kind="prompt"\}}'),
            samples(appliance, rf'shoehorn_tokens_total\{{key="{key}",kind="completion"\}}'))


def test_tokens_of_every_request_are_counted_and_kept(engine: httpx.Client, appliance: Appliance) -> None:
    headers, prompt, completion = headers_of("counted", ""), 0, 0
    for path, body in BODIES.items():
        short = {**LONG, **body, **{name: 37 for name in body if name.startswith("max")}, "temperature": 0}
        usage = engine.post(path, json=short, headers=headers).json()["usage"]
        assert engine.post(path, json={**short, "stream": True}, headers=headers).status_code == 200
        prompt += 2 * usage.get("prompt_tokens", usage.get("input_tokens"))
        completion += 2 * usage.get("completion_tokens", usage.get("output_tokens"))
    two = engine.post("/v1/completions", json={**LONG, "prompt": ["a", "b"], "n": 2, "max_tokens": 5}, headers=headers)
    prompt, completion = prompt + two.json()["usage"]["prompt_tokens"], completion + 20
    assert counted(appliance, "counted") == (prompt, completion)
    with engine.stream("POST", "/v1/chat/completions", json={**MUCH, "n": 1, "stream": True}, headers=headers) as left:
        next(left.iter_bytes())
    wait_until(lambda: admitted(appliance) == 0, 20, "the abort")
    assert counted(appliance, "counted")[0] > prompt
    assert completion < counted(appliance, "counted")[1] < completion + 900
    spent = headers_of("counted", f"tokens_per_day={completion}")
    for path, body in BODIES.items():
        refused = engine.post(path, json={**LONG, **body}, headers=spent)
        assert (refused.status_code, refused.headers["x-should-retry"]) == (429, "false")
        assert "budget is renewed at" in refused.json()["error"]["message"]
    folder = UsageFiles(ModelsDir(appliance.models_dir).usage)

    def saved() -> Usage:
        rows = by_key_and_model(item for month in folder.months() for item in folder.read(month).items())
        return rows.get(("counted", "shoehorn-demo"), Usage())

    wait_until(lambda: (saved().prompt_tokens, saved().completion_tokens) == counted(appliance, "counted"), 30,
               "the figures in the volume")
    assert saved().requests == 2 * len(BODIES) + 2
    name = r'shoehorn_usage_tokens\{key="counted",.*,period="day"\}'
    wait_until(lambda: samples(appliance, name) == saved().tokens, 20, name)


def test_concurrency_limit_of_one_key_does_not_affect_others(engine: httpx.Client, appliance: Appliance) -> None:
    one = headers_of("one", "concurrent=1")
    core = appliance.find("VLLM::EngineCor")
    few = {**MUCH, "n": 8, "stream": True}  # the other key's request waits for these only
    with engine.stream("POST", "/v1/chat/completions", json=few, headers=one) as stream:
        lines = stream.iter_lines()  # a reference: httpx closes the connection of a deleted iterator
        next(lines)
        core.suspend()
        second = engine.post("/v1/chat/completions", json=SHORT, headers=one)
        assert (second.status_code, second.json()["error"]["code"]) == (429, "concurrency_limit_exceeded")
        core.resume()
        other = engine.post("/v1/chat/completions", json=SHORT, headers=headers_of("two", "concurrent=1"))
        assert other.status_code == 200
    wait_until(lambda: engine.post("/v1/chat/completions", json=SHORT, headers=one).status_code == 200, 15,
               "a free slot")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.fault("A client leaves", "Its generation is aborted; the engine is idle.")
def test_generation_is_aborted_when_its_client_leaves(appliance: Appliance, stream: bool) -> None:
    body = json.dumps({**MUCH, "stream": stream})
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {appliance.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")
    wait_until(lambda: is_idle(appliance), 20, "an idle engine")
    before = generated(appliance)
    core = appliance.find("VLLM::EngineCor")
    if not stream:
        core.suspend()  # nothing shows when it begins
    with socket.create_connection(("127.0.0.1", appliance.port), timeout=60) as connection:
        connection.sendall((head + body).encode())
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            core.suspend()
        wait_until(lambda: admitted(appliance) > 0, 20, "the request")
    begin = time.monotonic()
    wait_until(lambda: admitted(appliance) == 0, 10, "the abort")
    core.resume()
    wait_until(lambda: is_idle(appliance), 10, "an idle engine")
    print(f"aborted {time.monotonic() - begin:.2f} s after the client left")
    assert generated(appliance) - before < 64 * 900, "it was not finished"
