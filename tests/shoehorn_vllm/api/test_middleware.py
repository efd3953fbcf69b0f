"""The middleware as an ASGI application: admission, forwarding and draining."""

from __future__ import annotations

import asyncio
import json

import pytest
from prometheus_client import CollectorRegistry

from shoehorn_vllm.api import errors, middleware
from shoehorn_vllm.api import request as request_module
from shoehorn_vllm.api.metrics import RequestMetrics
from shoehorn_vllm.api.middleware import AdmissionMiddleware, Scope
from shoehorn_vllm.api.request import Receive, Send
from support.gate_calls import CHAT, MESSAGES, RESPONSES, USAGE, Call, Engine, error, run, settled


def test_requests_without_limits_pass_unchanged_and_are_counted() -> None:
    async def test(engine: Engine) -> None:
        engine.go.set()
        assert (await engine.call(body=b'{"max_tokens": 9}').answer())[2] == USAGE
        assert b"[DONE]" in (await engine.call(body=b'{"stream": true}').answer())[2]
        assert (await engine.call("/health", method="GET").answer())[0] == 200
        assert (await engine.call("/v1/models", method="GET").answer())[0] == 200
        assert engine.count("ok") == 2
        for kind, tokens in (("prompt", 6), ("completion", 10)):
            assert engine.registry.get_sample_value("shoehorn_tokens_total", {"key": "phone", "kind": kind}) == tokens

    run(test)


def test_requests_per_minute_apply_to_each_key() -> None:
    async def test(engine: Engine) -> None:
        engine.go.set()
        for _ in range(2):
            assert (await engine.call(limits="requests_per_minute=2").answer())[0] == 200
        status, headers, body = await engine.call(limits="requests_per_minute=2").answer()
        assert (status, error(body)["type"], error(body)["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
        assert 1 <= int(headers[b"retry-after"]) <= 60
        assert (await engine.call(limits="requests_per_minute=2", key="other").answer())[0] == 200
        assert engine.count("rate_limit_exceeded") == 1
        assert len(engine.bodies) == 3

    run(test)


def test_concurrent_requests_are_released_after_every_end() -> None:
    async def test(engine: Engine) -> None:
        limits = "concurrent=2"
        first, second = engine.call(limits=limits), engine.call(limits=limits, body=b'{"stream": true}')
        await second.until(b"data: 1")
        status, headers, body = await engine.call(limits=limits).answer()
        assert (status, error(body)["code"], headers[b"retry-after"]) == (429, "concurrency_limit_exceeded", b"1")
        third = engine.call(limits=limits, key="other")
        first.left.set()
        await first.task
        assert engine.count("left") == 1
        assert first.sent == []
        engine.go.set()
        assert (await engine.call(limits=limits).answer())[0] == 200
        assert (await second.answer())[0] == (await third.answer())[0] == 200
        engine.fail = True
        for _ in range(4):
            broken = engine.call(limits=limits)
            with pytest.raises(RuntimeError):
                await broken.task
        engine.fail = False
        assert (await engine.call(limits=limits).answer())[0] == 200
        assert engine.registry.get_sample_value("shoehorn_requests_running", {"key": "phone"}) == 0

    run(test)


def test_queue_is_bounded_over_all_keys() -> None:
    async def test(engine: Engine) -> None:
        calls = [engine.call(key=f"key{number}") for number in range(3)]
        await settled()
        status, headers, body = await engine.call(key="late").answer()
        assert (status, error(body)["code"], headers[b"retry-after"]) == (429, "queue_full", b"5")
        engine.go.set()
        assert [(await call.answer())[0] for call in calls] == [200] * 3
        assert (await engine.call(key="late").answer())[0] == 200

    run(test, max_requests=3)


def test_requests_with_many_answers_fill_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_SEQUENCES", 6)

    async def test(engine: Engine) -> None:
        calls = [engine.call(body=b'{"n": 5}'), engine.call("/v1/completions", body=b'{"prompt": ["a", "b"], "n": 2}')]
        await settled()  # the first is below the bound; the second exceeds it
        status, _, body = await engine.call(key="late").answer()
        assert (status, error(body)["code"]) == (429, "queue_full")
        engine.go.set()
        assert [(await call.answer())[0] for call in calls] == [200, 200]
        assert (await engine.call(key="late").answer())[0] == 200

    run(test)


def test_product_of_choices_and_prompts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"prompt": ["a"] * 100, "n": 2}).encode()

    async def refuse(engine: Engine) -> None:
        status, _, answer = await engine.call("/v1/completions", body=body).answer()
        assert (status, error(answer)["code"], error(answer)["param"]) == (400, "too_many_answers", "prompt")
        assert engine.bodies == []

    async def take(engine: Engine) -> None:
        engine.go.set()
        assert (await engine.call("/v1/completions", body=body).answer())[0] == 200

    run(refuse)
    monkeypatch.setenv("VLLM_MAX_N_SEQUENCES", "200")
    run(take)


def test_slow_bodies_do_not_bypass_the_bound() -> None:
    async def test(engine: Engine) -> None:
        late = engine.call(body=None)
        first = engine.call()
        await settled()
        late.arrive(b"{}")
        status, _, body = await late.answer()
        assert (status, error(body)["code"]) == (429, "queue_full")
        engine.go.set()
        assert (await first.answer())[0] == 200

    run(test, max_requests=1)


@pytest.mark.parametrize("declare", [True, False])
def test_long_body_is_rejected_declared_or_not(declare: bool) -> None:
    async def test(engine: Engine) -> None:
        engine.go.set()
        long = engine.call(limits="body_bytes=10", body=b"x" * 11, declare=declare)
        status, _, body = await long.answer()
        assert (status, error(body)["code"]) == (413, "request_too_large")
        assert engine.bodies == []
        assert (await engine.call(limits="body_bytes=10", body=b"x" * 10, declare=declare).answer())[0] == 200

    run(test)


def test_token_cap_is_applied_or_reported() -> None:
    async def test(engine: Engine) -> None:
        engine.go.set()
        assert (await engine.call(limits="max_tokens=50").answer())[0] == 200
        assert json.loads(engine.bodies[0]) == {"max_completion_tokens": 50}
        status, _, body = await engine.call(limits="max_tokens=50", body=b'{"max_tokens": 51}').answer()
        assert (status, error(body)["code"], error(body)["param"]) == (400, "max_tokens_exceeded", "max_tokens")
        assert "50" in error(body)["message"]
        assert len(engine.bodies) == 1

    run(test)


def test_anthropic_routes_have_anthropic_errors() -> None:
    async def test(engine: Engine) -> None:
        for limits, body, status, kind in (
                ("requests_per_minute=0", b"{}", 429, "rate_limit_error"),
                ("body_bytes=1", b"{}", 413, "request_too_large"),
                ("max_tokens=1", b'{"max_tokens": 2}', 400, "invalid_request_error")):
            answer = await engine.call(MESSAGES, limits=limits, body=body).answer()
            document = json.loads(answer[2])
            assert (answer[0], document["type"], document["error"]["type"]) == (status, "error", kind)

    run(test)


def test_unreadable_limits_reject_the_request() -> None:
    async def test(engine: Engine) -> None:
        assert (await engine.call(limits="concurrent=many").answer())[0] == 500
        assert engine.bodies == []

    run(test)


def test_drain_finishes_running_requests_and_rejects_new_ones() -> None:
    async def test(engine: Engine) -> None:
        calls = [engine.call(body=b'{"stream": true}'), engine.call()]
        await settled()
        drain = engine.call("/-/drain", query="seconds=30")
        await settled()
        for method in ("POST", "GET"):
            status, headers, body = await engine.call(method=method).answer()
            assert (status, error(body)["code"]) == (503, "server_stopping")
            assert headers[b"retry-after"]
        assert not drain.task.done()
        engine.go.set()
        assert b"[DONE]" in (await calls[0].answer())[2]
        assert (await calls[1].answer())[2] == USAGE
        assert json.loads((await drain.answer())[2]) == {"finished": 2, "aborted": 0}

    run(test)


@pytest.mark.parametrize("stubborn", [False, True])
def test_drain_ends_late_requests_with_an_error(stubborn: bool) -> None:
    async def test(engine: Engine) -> None:
        engine.stubborn = stubborn
        streams = {path: engine.call(path, body=b'{"stream": true}') for path in (CHAT, MESSAGES, RESPONSES)}
        plain = {path: engine.call(path) for path in (CHAT, MESSAGES)}
        await settled()
        assert json.loads((await engine.call("/-/drain", query="seconds=0.05").answer())[2]) == {
            "finished": 0, "aborted": 5}
        assert all(call.task.done() for call in (*streams.values(), *plain.values()))
        chat, messages, responses = [(await streams[path].answer())[2] for path in (CHAT, MESSAGES, RESPONSES)]
        first, last, done = chat.decode().strip().split("\n\n")
        assert (first, done) == ("data: 1", "data: [DONE]")
        assert error(last.removeprefix("data: ").encode())["code"] == "server_stopping"
        assert messages.startswith(b'data: 1\n\nevent: error\ndata: {"type": "error", "error": {"type": "overloaded')
        assert responses.startswith(b'data: 1\n\nevent: error\ndata: {"type": "error", "code": "server_stopping"')
        status, headers, body = await plain[CHAT].answer()
        assert (status, error(body)["code"], headers[b"retry-after"]) == (503, "server_stopping", b"5")
        assert json.loads((await plain[MESSAGES].answer())[2])["type"] == "error"
        assert (engine.count("aborted"), engine.running) == (5, 0)

    run(test)


def test_interrupted_stream_gets_an_error_event() -> None:
    async def test(engine: Engine) -> None:
        engine.fail = True
        call = engine.call(body=b'{"stream": true}')
        with pytest.raises(RuntimeError):
            await call.task
        assert b'"code": "engine_failed"' in call.data
        assert call.data.endswith(b"data: [DONE]\n\n")
        engine.fail, engine.half = False, True
        engine.go.set()
        body = (await engine.call(body=b'{"stream": true}').answer())[2]
        assert b'"code": "engine_failed"' in body
        assert engine.count("error") == 2

    run(test)


def test_idle_streams_get_keep_alive_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "KEEP_ALIVE_SECONDS", 0.02)

    async def test(engine: Engine) -> None:
        calls = {path: engine.call(path, body=b'{"stream": true}') for path in (CHAT, MESSAGES, RESPONSES)}
        await calls[MESSAGES].until(b'event: ping\ndata: {"type": "ping"}\n\n')
        await calls[RESPONSES].until(b": keep-alive\n\n")
        assert calls[CHAT].data == b"data: 1\n\n"
        engine.go.set()
        for call in calls.values():
            await call.answer()
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    run(test)


@pytest.mark.parametrize(("content", "status", "code", "message"), [
    (b'{"detail":"error parsing the body"}', 400, "invalid_request", "error parsing the body"),
    (b'{"error":{"message":"no","type":"Bad Request","param":"body.n","code":400}}', 400, "invalid_request", "no"),
    (b'{"error":{"message":"gone","type":"NotFoundError","param":"model","code":404}}', 404, "model_not_found", "gone"),
    (b'{"error":{"message":"The maximum context length is 9 tokens. However, your prompt contains 10 '
     b'tokens","code":400}}', 400, "context_length_exceeded",
     "The maximum context length is 9 tokens. However, your prompt contains 10 tokens"),
    (b'{"error":{"message":"m","type":"t","param":null,"code":"own_code"}}', 400, "own_code", "m"),
    (b'{"error":"Unauthorized"}', 401, "invalid_api_key", "Unauthorized"),
    (b'{"detail":[{"loc":["body"]}]}', 422, "invalid_request", '[{"loc": ["body"]}]'),
    (b"Internal Server Error", 500, "internal_error", "Internal Server Error"), (b"[]", 500, "internal_error", "[]"),
    (b"\xff", 500, "internal_error", "\ufffd"), (b"{}", 500, "internal_error", "{}")])
def test_engine_errors_are_converted(content: bytes, status: int, code: str,
                                                            message: str) -> None:
    openai = error(errors.convert(content, status, CHAT))
    assert (openai["code"], openai["message"]) == (code, message)
    anthropic = json.loads(errors.convert(content, status, MESSAGES))
    assert (anthropic["type"], anthropic["error"]["message"]) == ("error", message)


def test_error_is_sent_complete_with_its_length() -> None:
    async def main() -> None:
        async def engine(_scope: Scope, _receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 400, "headers": [
                (b"content-type", b"text/plain"), (b"content-length", b"9"), (b"x-kept", b"1")]})
            await send({"type": "http.response.body", "body": b'{"detail"', "more_body": True})
            await send({"type": "http.response.body", "body": b': "odd"}'})

        status, headers, body = await Call(AdmissionMiddleware(engine, RequestMetrics(CollectorRegistry()))).answer()
        assert (status, error(body)["message"]) == (400, "odd")
        assert headers == {b"x-kept": b"1", b"content-type": b"application/json",
                           b"content-length": str(len(body)).encode()}

    asyncio.run(main())


@pytest.mark.parametrize(("method", "query"), [
    ("GET", "seconds=1"), ("POST", ""), ("POST", "seconds=x"), ("POST", "seconds=-1"), ("POST", "seconds=inf"),
    ("POST", "seconds=nan")])
def test_invalid_drain_request_is_rejected(method: str, query: str) -> None:
    async def test(engine: Engine) -> None:
        engine.go.set()
        assert (await engine.call("/-/drain", method=method, query=query).answer())[0] == 400
        assert (await engine.call().answer())[0] == 200

    run(test)
