"""Routes and keys at the gateway: a real nginx before a stand-in engine that answers every request."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.engine import FakeEngine
from shoehorn.gateway.nginx_config import ROUTES, Route
from support.gateway_process import BEARER, KEY, MODEL, Gateway, authorization, error_of, openai_error, request
from support.waiting import wait_until

pytestmark = pytest.mark.process

# What vLLM 0.32 can list beyond what is served here, with every switch on.
_ENGINE_ROUTES = """
/invocations /ping /tokenize /detokenize /generative_scoring /scale_elastic_ep /is_scaling_elastic_ep /health /load
/version /kv_event_sources /metrics /metrics/ /pooling /classify /score /rerank /docs /docs/oauth2-redirect /redoc
/openapi.json /tokenizer_info /start_profile /stop_profile /fault_tolerance/status /fault_tolerance/apply /adapters
/collective_rpc /sleep /wake_up /is_sleeping /server_info /reset_prefix_cache /reset_mm_cache /reset_encoder_cache
/pause /resume /is_paused /abort_requests /update_weights /start_weight_update /finish_weight_update
/start_draft_weight_update /update_weight_version /weight_info /weight_checker /release_kv_cache_memory
/init_weight_transfer_engine /shutdown_weight_transfer_engine /get_world_size /cohere/v2/chat /cohere/v2/chat/render
/inference/v1/generate /inference/v1/abort_requests /v2/rerank /v2/embed /query /clear /register /ready
/v1/chat/completions/batch /v1/chat/completions/render /v1/completions/render /v1/messages/render /v1/responses/render
/v1/chat/completions/derender /v1/completions/derender /v1/responses/resp_1 /v1/responses/resp_1/cancel /v1/systemone
/v1/audio/transcriptions /v1/audio/translations /v1/audio/speech /v1/realtime /v1/load_lora_adapter
/v1/unload_lora_adapter /v1/images/generations /v1/files
"""

_TRICKS = r"""
//invocations ///v1/chat/completions //v1/models /v1//models /v1/../invocations /./invocations
/v1/chat/completions/../../../tokenize /v1/chat/completions/..%2f..%2f..%2finvocations /v1/%2e%2e/invocations
/%69nvocations /v1%2f..%2finvocations /v1/models/..%2f..%2ftokenize /v1/models/%2e%2e/%2e%2e/tokenize
/v1/models/..;/x /v1/models;x /v1/models;/../../tokenize /V1/models /v1/Models /v1/models/ /v1/models%00
/v1/models%0d%0aX:%20y /v1/models%20 /v1/models%3f /v1\models /invocations?/v1/models /invocations#/v1/models
/status/../invocations /livez/../invocations /readyz/invocations /page.css/../invocations /.shoehorn/error
/.shoehorn/unavailable /keys.map /../keys.map /state.json /nginx.conf /unavailable.json /index.html
/page.js/../nginx.conf.j2 /..%2fnginx.conf.j2 http://x/invocations http://evil/tokenize http://x/v1/../invocations
https://x/health * invocations /v1/chat/completions%23 /v1/chat/completions/ /v1/completions%2f /v1/embeddings/x
/%2fv1/models /%5c/invocations /v1/models/ÿ /v1/models/%ff /v1/models/other /v1/models/a%3fb /v1/models//x
"""


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, FakeEngine]]:
    """A ready gateway for the tests that only ask."""
    with Gateway(tmp_path_factory.mktemp("gateway")) as gate, gate.engine() as engine:
        yield gate, engine


@pytest.fixture
def gate(ready: tuple[Gateway, FakeEngine]) -> Gateway:
    """The shared gateway, with an engine without recorded requests."""
    ready[1].requests.clear()
    return ready[0]


@pytest.fixture
def engine(ready: tuple[Gateway, FakeEngine]) -> FakeEngine:
    """The engine behind that gateway."""
    return ready[1]


# --- what passes, and what does not

@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_route_requires_its_method_and_a_key(gate: Gateway, engine: FakeEngine, route: Route) -> None:
    refused = gate.client.request(route.method, route.path, content=b"{}")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    messages = route.path.startswith("/v1/messages")
    assert error_of(refused)["type"] == ("authentication_error" if messages else "invalid_request_error")
    assert messages or openai_error(refused)["code"] == "invalid_api_key"
    for method in {"GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"} - {route.method}:
        wrong = gate.client.request(method, route.path, headers=BEARER)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, route.method), method
        assert "method" in str(error_of(wrong)["message"])
    assert not engine.requests
    passed = gate.client.request(route.method, route.path + "?beta=true", content=b"{}", headers=BEARER)
    assert passed.json() == {"engine": route.path}
    assert [(seen.method, seen.target) for seen in engine.requests] == [(route.method, route.path)]


@pytest.mark.parametrize("route", _ENGINE_ROUTES.split())
@pytest.mark.parametrize("headers", [{}, BEARER], ids=["no key", "key"])
def test_other_routes_of_the_engine_are_unreachable(gate: Gateway, engine: FakeEngine, route: str,
                                                     headers: dict[str, str]) -> None:
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
        answer = gate.client.request(method, route, headers=headers, content=b"{}" if method == "POST" else None)
        expected = 401 if route.startswith("/v1/") and not headers else 404
        assert answer.status_code == expected, method
        if method != "HEAD":
            error_of(answer)
    assert not engine.requests


@pytest.mark.parametrize("trick", _TRICKS.split())
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0", "HTTP/0.9"])
def test_alternative_spellings_of_paths_are_rejected(gate: Gateway, engine: FakeEngine, trick: str,
                                                     version: str) -> None:
    target = trick.replace("\\xff", "\xff").encode("latin-1")
    for key in ("", authorization(KEY)):
        headers = ("Host: x\r\nConnection: close\r\nX-Original-URL: /invocations\r\nX-Rewrite-URL: /invocations\r\n"
                   f"X-HTTP-Method-Override: POST\r\n{key}Content-Length: 0\r\n\r\n").encode()
        for method in (b"GET ", b"POST "):
            if version == "HTTP/0.9":  # a request of one line without a version
                answer = gate.send(method + target + b"\r\n")
            else:
                answer = gate.send(method + target + f" {version}\r\n".encode() + headers)
                assert re.match(rb"HTTP/1.1 (400|401|404|405) ", answer), answer
            assert b'{"error"' in answer
            assert b'"engine"' not in answer
    assert not engine.requests


def test_absolute_form_and_other_hosts_require_a_key(gate: Gateway, engine: FakeEngine) -> None:
    for host in ("x/?", "x#", "evil", "127.0.0.1:1"):
        for target in ("/v1/models", f"http://{host}/v1/models"):
            assert re.match(rb"HTTP/1.1 (400|401) ", gate.send(request(target, host=host)))
    assert not engine.requests
    assert b'"engine"' in gate.send(request("http://evil/v1/models", authorization(KEY), "evil"))
    assert engine.requests[0].headers["Host"] == "localhost"


@pytest.mark.parametrize("framing", [
    "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", "Content-Length: 3\r\nContent-Length: 4\r\n",
    "Transfer-Encoding: identity\r\n", "Transfer-Encoding: chunked, chunked\r\n", "Content-Length: -1\r\n"])
def test_ambiguous_framing_is_rejected(gate: Gateway, engine: FakeEngine, framing: str) -> None:
    answer = gate.send(request("/v1/completions", authorization(KEY) + framing, method="POST")
                       + b"0\r\n\r\n" + request("/invocations"))
    assert re.match(rb"HTTP/1.1 (400|501) ", answer), answer
    assert b'{"error"' in answer
    assert not engine.requests


def test_body_of_a_get_is_not_parsed_as_a_request(gate: Gateway, engine: FakeEngine) -> None:
    smuggled = request("/invocations")
    for target in ("/v1/models", "/readyz"):
        answer = gate.send(request(target, f"{authorization(KEY)}Content-Length: {len(smuggled)}\r\n") + smuggled)
        assert answer.startswith(b"HTTP/1.1 200 ")
    assert {seen.target for seen in engine.requests} == {"/v1/models"}


# --- the key

@pytest.mark.parametrize("value", [
    "", "Bearer", "Bearer ", f"Bearer {KEY.swapcase()}", f"Bearer {KEY.lower()}", f"Bearer {KEY}x", f"Bearer x{KEY}",
    f"Bearer {KEY[:-1]}", f"Bearer {KEY} {KEY}", f"Bearer Bearer {KEY}", f"Basic {KEY}", KEY, f"Bearer,{KEY}",
    f"Bearer {KEY.replace('.', 'x')}", f"Bearer {KEY.replace('+', 'yy')}", f"Bearer {KEY}, Bearer {KEY}", "Bearer .*",
    f"Bearer {'x' * 7000}", f"Bearer\t{KEY}"])
def test_partial_and_extended_keys_are_rejected(gate: Gateway, engine: FakeEngine, value: str) -> None:
    answer = gate.send(request("/v1/models", f"Authorization: {value}\r\n"))
    assert answer.startswith(b"HTTP/1.1 401")
    assert b'"invalid_api_key"' in answer
    assert not engine.requests


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_authorization_scheme_is_case_insensitive(gate: Gateway, scheme: str) -> None:
    assert gate.client.get("/v1/models", headers={"Authorization": f"{scheme} {KEY}"}).status_code == 200


def test_repeated_authorization_header_is_rejected(gate: Gateway, engine: FakeEngine) -> None:
    for first, second in ((KEY, "wrong"), ("wrong", KEY), (KEY, KEY)):
        answer = gate.send(request("/v1/models", authorization(first) + authorization(second)))
        assert re.match(rb"HTTP/1.1 40[01] ", answer), answer
        assert b'{"error"' in answer
    assert not engine.requests


def test_key_of_512_characters_is_accepted(tmp_path: Path) -> None:
    long = "sk-" + ".+/=~_-A9" * 56 + "xxxxx"
    with Gateway(tmp_path, API_KEY=long) as gate, gate.engine():
        assert len(long) == 512
        assert gate.client.get("/v1/models", headers={"Authorization": f"Bearer {long}"}).status_code == 200
        assert gate.client.get("/v1/models", headers={"Authorization": f"Bearer {long[:-1]}"}).status_code == 401


def test_engine_receives_two_headers_of_the_client(gate: Gateway, engine: FakeEngine) -> None:
    sent = {**BEARER, "X-Request-Id": "client", "Forwarded": "for=1.2.3.4", "X-Forwarded-For": "1.2.3.4",
            "X-Api-Key": KEY, "X-Shoehorn-Key": "forged", "X-Shoehorn-Limits": "concurrent=9",
            "Cookie": "a=b", "X-data-parallel-rank": "3", "Accept-Encoding": "gzip",
            "Accept": "text/event-stream", "Content-Type": "application/json", "Expect": "100-continue"}
    answer = gate.client.post("/v1/completions", headers=sent, content=b"{}")
    seen = {name.lower(): value for name, value in engine.requests[0].headers.items()}
    assert set(seen) == {"host", "x-request-id", "accept", "content-type", "content-length", "x-shoehorn-key"}
    assert seen["x-shoehorn-key"] == "default"
    assert seen["x-request-id"] == answer.headers["x-request-id"] != "client"
    assert KEY not in str(engine.requests)


def test_single_model_is_returned(gate: Gateway, engine: FakeEngine) -> None:
    for spelling in (MODEL, MODEL.replace("/", "%2F")):
        assert gate.client.get(f"/v1/models/{spelling}").status_code == 401
        answer = gate.client.get(f"/v1/models/{spelling}", headers=BEARER).json()
        assert (answer["id"], answer["object"]) == (MODEL, "model")
    assert gate.client.get("/v1/models/other", headers=BEARER).status_code == 404
    assert gate.client.post(f"/v1/models/{MODEL}", headers=BEARER).status_code == 405
    assert not engine.requests


# --- errors

def test_errors_of_nginx_have_the_openai_form(gate: Gateway, engine: FakeEngine) -> None:
    big = b"x" * (11 << 20)
    cases = {
        413: lambda: gate.client.post("/v1/completions", headers=BEARER, content=big),
        431: lambda: gate.client.get("/v1/models", headers={"X": "x" * 9000}),
        414: lambda: gate.client.get("/" + "x" * 9000),
        405: lambda: gate.client.request("TRACE", "/"),
        404: lambda: gate.client.get("/nothing"),
        401: lambda: gate.client.post("/v1/completions", content=big[:5 << 20]),
    }
    for status, ask in cases.items():
        answer = ask()
        assert answer.status_code == status
        assert str(openai_error(answer)["type"]) == "invalid_request_error"
    assert not engine.requests


def test_too_many_headers_are_rejected(gate: Gateway, engine: FakeEngine) -> None:
    many = "".join(f"X-{number}: y\r\n" for number in range(20_000))
    answer = gate.send(request("/v1/models", authorization(KEY) + many))
    assert not answer or re.match(rb"HTTP/1.1 (431|400)", answer)
    assert not engine.requests


def test_engine_errors_pass_except_for_missing_endpoints(gate: Gateway, engine: FakeEngine) -> None:
    for status in (400, 404, 500, 503):
        answer = gate.client.post("/v1/completions", headers=BEARER, json={"status": status})
        assert (answer.status_code, answer.json()) == (status, {"engine": "/v1/completions"})
    engine.absent.add("/v1/rerank")
    lacking = gate.client.post("/v1/rerank", headers=BEARER, json={})
    assert lacking.status_code == 404
    assert openai_error(lacking)["code"] == "unknown_url"


@pytest.mark.parametrize(("headers", "words"), [
    ({}, "You didn't provide an API key"), ({"X-Api-Key": "sk-of-nobody"}, "Incorrect API key provided"),
    ({"Authorization": f"Basic {KEY}"}, "invalid form"), ({**BEARER, "X-Api-Key": "sk-of-nobody"}, "different keys")])
def test_refusal_of_a_key_has_its_reason(gate: Gateway, headers: dict[str, str], words: str) -> None:
    for path in ("/v1/models", "/v1/models/other", "/v1/messages"):
        answer = gate.client.get(path, headers=headers)
        assert answer.status_code == 401
        assert words in str(error_of(answer)["message"]), path


@pytest.mark.parametrize(("path", "code", "words"), [
    ("/chat/completions", "unknown_url", "the path has no /v1"), ("/models?x=1", "unknown_url", "the path has no /v1"),
    ("/v1/v1/models", "unknown_url", "/v1 twice"), ("/v1/models/gpt-4o", "model_not_found", MODEL),
    ("/v1/models/openai/gpt-4o?x", "model_not_found", MODEL), ("/v1/audio", "unknown_url", "Unknown endpoint."),
    ("/chat", "unknown_url", "Unknown endpoint.")])
def test_unknown_path_reports_what_is_wrong(gate: Gateway, path: str, code: str, words: str) -> None:
    answer = gate.client.get(path, headers=BEARER)
    assert answer.status_code == 404
    assert openai_error(answer)["code"] == code
    assert words in str(openai_error(answer)["message"])


@pytest.mark.parametrize(("headers", "body", "status", "setting"), [
    (BEARER, b"x" * (11 << 20), 413, "MAX_BODY_SIZE"), ({**BEARER, "Cookie": "x" * 9000}, b"", 431, "MAX_HEADER_SIZE")])
def test_limit_of_the_gateway_is_named_with_its_setting(gate: Gateway, headers: dict[str, str], body: bytes,
                                                        status: int, setting: str) -> None:
    answer = gate.client.post("/v1/completions", headers=headers, content=body)
    assert answer.status_code == status
    assert setting in str(openai_error(answer)["message"])


def test_limits_and_names_follow_their_settings(tmp_path: Path) -> None:
    with Gateway(tmp_path, MAX_BODY_SIZE="12MiB", MAX_HEADER_SIZE="32KiB", SERVED_MODEL_NAME="gpt-4o, mine") as gate, \
            gate.engine():
        headers = {**BEARER, "Cookie": "x" * 30_000}
        assert gate.client.post("/v1/completions", headers=headers, content=b"x" * (11 << 20)).status_code == 200
        assert [gate.client.get(f"/v1/models/{name}", headers=BEARER).json()["id"] for name in ("gpt-4o", "mine")] == [
            "gpt-4o", "mine"]


def test_log_has_the_method_of_the_request_and_not_the_page(gate: Gateway) -> None:
    for path in ("/", "/page.css", "/status"):
        assert gate.client.get(path).status_code == 200
    gate.client.post("/v1/chat/completions", headers={"X-Api-Key": "sk-of-nobody"}, content=b"{}")
    marker = gate.client.get("/v1/marker", headers=BEARER).headers["x-request-id"]
    wait_until(lambda: marker in gate.log.read_text(), 5, "the last request is logged")
    lines = gate.log.read_text().splitlines()
    assert any("INFO POST /v1/chat/completions 401" in line for line in lines)
    assert not any(f"GET {path} 200" in line for line in lines for path in ("/", "/page.css", "/status"))


def test_engine_headers_do_not_control_nginx(gate: Gateway) -> None:
    steer = {"headers": {"X-Accel-Redirect": "/.shoehorn/error", "X-Accel-Limit-Rate": "1", "Cache-Control": "public",
                         "X-Request-Id": "forged", "Server": "uvicorn"}}
    answer = gate.client.post("/v1/completions", headers=BEARER, json=steer)
    assert answer.json() == {"engine": "/v1/completions"}
    assert answer.headers.get_list("cache-control") == ["no-store"]
    assert "forged" not in str(answer.headers)
    assert answer.headers["server"] == "nginx"
