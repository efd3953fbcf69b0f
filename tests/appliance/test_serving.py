"""The running appliance from outside: welcome text, real clients, closed routes, keys, metrics, health, bench."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import httpx
import psutil
import pytest
from langchain_openai import ChatOpenAI
from openai import AuthenticationError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from shoehorn.common.paths import HOME
from shoehorn.runtime import programs
from support.clients import UNQUANTIZED, answers
from support.running import Appliance

pytestmark = pytest.mark.engine

ENGLISH, CHINESE = "What is your name?", "你叫啥?"


def _ask(question: str) -> dict[str, object]:
    return {"model": "shoehorn-demo", "messages": [{"role": "user", "content": question}]}


def test_start_reports_its_phases_and_prints_a_curl_with_the_key(appliance: Appliance) -> None:
    assert re.search(r"engine INFO plan: profile=cpu", appliance.output)
    assert re.search(r"engine INFO ready after \d+ s", appliance.output)
    assert appliance.output.count(appliance.key) == 2, "in its own line and in the curl"
    assert f'curl -N {appliance.url}/v1/chat/completions -H "Authorization: Bearer {appliance.key}"' in appliance.output


def test_printed_curl_works(appliance: Appliance) -> None:
    command = next(line for line in appliance.lines if line.startswith("curl "))
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True).stdout
    assert answer.count("data: {") > 2
    assert answer.rstrip().endswith("data: [DONE]")


def test_openai_client_streams_both_languages(appliance: Appliance) -> None:
    with OpenAI(base_url=f"{appliance.url}/v1", api_key=appliance.key) as openai:
        for question in (ENGLISH, CHINESE):
            pieces = [chunk.choices[0].delta.content or "" for chunk in openai.chat.completions.create(
                model="shoehorn-demo", messages=[{"role": "user", "content": question}], stream=True) if chunk.choices]
            assert len(pieces) > 3
            assert "Shoehorn" in "".join(pieces), question
        assert [model.id for model in openai.models.list()] == ["shoehorn-demo"]


def test_langchain_client_streams(appliance: Appliance) -> None:
    chat = ChatOpenAI(base_url=f"{appliance.url}/v1", api_key=appliance.key, model="shoehorn-demo")
    pieces = [str(chunk.content) for chunk in chat.stream(CHINESE)]
    assert len(pieces) > 3
    assert "Shoehorn" in "".join(pieces)


@pytest.mark.parametrize("key", ["", "wrong", "sk-" + "x" * 43])
def test_wrong_key_is_refused_with_openais_error(appliance: Appliance, key: str) -> None:
    with OpenAI(base_url=f"{appliance.url}/v1", api_key=key or "none") as openai, pytest.raises(
            AuthenticationError) as caught:
        openai.models.list()
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["code"]


def test_key_is_case_sensitive(appliance: Appliance) -> None:
    answer = httpx.get(f"{appliance.url}/v1/models", headers={"Authorization": f"Bearer {appliance.key.swapcase()}"})
    assert answer.status_code == httpx.codes.UNAUTHORIZED


@pytest.mark.parametrize("route", [
    "/invocations", "/tokenize", "/detokenize", "/generative_scoring", "/scale_elastic_ep", "/pooling", "/classify",
    "/score", "/rerank", "/load", "/version", "/ping", "/docs", "/openapi.json", "/metrics", "/health",
    "/v1/../invocations", "//invocations", "/v1/chat/completions/../../../tokenize", "/inference/v1/generate"])
@pytest.mark.parametrize("with_key", [False, True])
def test_closed_routes_cannot_be_reached(appliance: Appliance, route: str, with_key: bool) -> None:
    headers = appliance.headers() if with_key else {}
    for method in ("GET", "POST"):
        answer = httpx.request(method, httpx.URL(appliance.url).copy_with(raw_path=route.encode()), headers=headers,
                               json=_ask(ENGLISH) if method == "POST" else None)
        assert answer.status_code in (401, 404), (method, route)
        assert answer.json()["error"]["message"]


def test_engine_listens_on_no_port(appliance: Appliance) -> None:
    listening = {(process.name(), connection.laddr.port) for process in appliance.descendants()
                 for connection in process.net_connections("inet")
                 if connection.status == "LISTEN" and connection.laddr.ip not in ("127.0.0.1", "::1")}
    assert {port for _, port in listening} == {appliance.port, appliance.metrics_port}


def test_limits_of_a_key_apply_until_it_is_revoked(appliance: Appliance) -> None:
    def keys(*words: str) -> str:
        environment = {**os.environ, "MODELS_DIR": str(appliance.models_dir), "RUN_DIR": str(appliance.run_dir)}
        return subprocess.run([sys.executable, "-m", programs.CLI, "keys", *words], capture_output=True, text=True,
                              timeout=60, check=True, env=environment).stdout.strip()

    headers = {"X-Api-Key": keys("add", "limited", "--requests-per-minute", "1", "--max-tokens", "3")}
    body = {**_ask("hello"), "ignore_eos": True}
    first = httpx.post(f"{appliance.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert first.json()["usage"]["completion_tokens"] == 3
    second = httpx.post(f"{appliance.url}/v1/messages", json={**body, "max_tokens": 3}, headers=headers, timeout=60)
    assert (second.status_code, second.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(second.headers["retry-after"]) >= 1
    keys("revoke", "limited")
    revoked = httpx.post(f"{appliance.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert revoked.status_code == 401


def test_key_is_in_no_arguments_or_environment(appliance: Appliance) -> None:
    for process in appliance.descendants():
        assert appliance.key not in " ".join(process.cmdline()), process
        assert appliance.key not in str(process.environ()), process


def test_core_dumps_are_disabled_in_every_process(appliance: Appliance) -> None:
    assert {process.rlimit(psutil.RLIMIT_CORE) for process in appliance.descendants()} == {(1, 1)}


def test_one_scrape_has_metrics_of_appliance_and_engine(appliance: Appliance, client: httpx.Client) -> None:
    client.post("/v1/chat/completions", json=_ask(ENGLISH)).raise_for_status()
    text = httpx.get(f"http://127.0.0.1:{appliance.metrics_port}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    phases = {sample.labels["phase"]: sample.value for sample in families["shoehorn_phase"].samples}
    assert phases["ready"] == 1
    assert sum(phases.values()) == 1
    tokens = [sample.value for sample in families["vllm:generation_tokens"].samples if sample.name.endswith("_total")]
    assert sum(tokens) > 0


@pytest.mark.parametrize("question", ["live", "ready"])
def test_health_check_succeeds(appliance: Appliance, question: str) -> None:
    check = [sys.executable, str(HOME / "healthcheck" / "healthcheck.py"), question]
    done = subprocess.run(check, env={**os.environ, "PORT": str(appliance.port)}, capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_status_has_the_phase_and_no_secret(appliance: Appliance) -> None:
    status = httpx.get(f"{appliance.url}/status")
    assert status.json()["phase"] == "ready"
    assert appliance.key not in status.text


def test_bench_measures_the_running_appliance(appliance: Appliance) -> None:
    done = subprocess.run([sys.executable, "-m", programs.CLI, "bench", "--requests", "1,4", "--tokens", "16",
                           "--json"],
                          env={**os.environ, "RUN_DIR": str(appliance.run_dir), "VRAM_PROFILE": "cpu"}, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rounds = json.loads(done.stdout)["rounds"]
    assert [(each["requests"], each["tokens"]) for each in rounds] == [(1, 16), (4, 64)]
    assert all(each["tokens_per_second"] > 0 for each in rounds)


def test_answers_are_those_of_the_unquantized_model(appliance: Appliance) -> None:
    """The reference for the tests of quantized models and draft models."""
    assert answers(appliance) == UNQUANTIZED
