"""Watchdog: a hung engine is distinguished from a busy, a queueing, an exited and an idle one."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from shoehorn.engine import readiness, watchdog
from shoehorn.engine.timing import Timing
from shoehorn.engine.watchdog import Watchdog
from shoehorn_vllm import protocol
from shoehorn_vllm.api import middleware
from shoehorn_vllm.api.metrics import RequestMetrics

TIMING = Timing()


class Engine:
    """An engine with a clock of its own: counters, and what happens to a token that is asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.tokens = 100
        self.metrics = True
        self.probe: object = 200
        self.moves_while_probed = False
        self.probes = 0
        self.client = httpx.Client(transport=httpx.MockTransport(self.answer))
        self.watchdog = Watchdog(self.client, "model", 0.0, TIMING, lambda: self.now)

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            if not self.metrics:
                raise httpx.ReadTimeout("no answer")
            return httpx.Response(200, text=f'vllm:generation_tokens_total{{engine="0"}} {self.tokens}\n'
                                            'vllm:num_requests_running{engine="0"} 3.0\n')
        self.probes += 1
        self.tokens += self.moves_while_probed
        if isinstance(self.probe, Exception):
            raise self.probe
        self.tokens += 1
        return httpx.Response(int(str(self.probe)))

    def after(self, seconds: float, *, moving: bool = False) -> bool:
        """Return True if the watchdog reports a hang within these seconds."""
        end, hung = self.now + seconds, False
        while self.now < end:
            self.now += TIMING.look
            self.tokens += moving
            hung = hung or self.watchdog.is_hung()
        return hung


def test_engine_with_changing_counters_is_not_probed() -> None:
    engine = Engine()
    assert not engine.after(600, moving=True)
    assert engine.probes == 0


def test_idle_engine_is_probed_sometimes() -> None:
    engine = Engine()
    assert not engine.after(300)
    assert 3 <= engine.probes <= 300 / TIMING.quiet


def test_hang_is_detected_after_the_quiet_time() -> None:
    engine = Engine()
    engine.probe = httpx.ReadTimeout("nothing came")
    assert not engine.after(TIMING.quiet - TIMING.look)
    assert engine.after(2 * TIMING.quiet)
    assert engine.probes >= 1


def test_hang_is_detected_without_counters() -> None:
    engine = Engine()
    engine.metrics, engine.probe = False, httpx.ReadTimeout("nothing came")
    assert engine.after(3 * TIMING.quiet)


def test_probe_that_waits_in_a_moving_queue_is_not_a_hang() -> None:
    engine = Engine()
    engine.probe, engine.moves_while_probed = httpx.ReadTimeout("still waiting"), True
    assert not engine.after(300)


@pytest.mark.parametrize("status", [200, 404, 429, 503])
def test_any_answer_is_a_sign_of_life(status: int) -> None:
    engine = Engine()
    engine.probe = status
    assert not engine.after(120)


def test_exited_engine_is_not_a_hang() -> None:
    engine = Engine()
    engine.probe = httpx.ConnectError("refused")
    assert not engine.after(120)


def test_disconnected_clients_do_not_hide_a_hang() -> None:
    engine = Engine()
    engine.probe, left = httpx.ReadTimeout("nothing came"), 0
    usual = engine.answer

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal left
        left += 1
        more = f'vllm:request_success_total{{finished_reason="abort"}} {left}\n'
        return httpx.Response(200, text=usual(request).text + more)

    engine.client._transport = httpx.MockTransport(answer)
    assert engine.after(3 * TIMING.quiet)


def test_probe_bypasses_a_full_queue() -> None:
    reached = []

    async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        if len(reached) == 1:
            await asyncio.Event().wait()  # the engine hangs
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask() -> list[int]:
        gate = middleware.AdmissionMiddleware(application, RequestMetrics(CollectorRegistry()), max_requests=1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://engine") as client:
            first = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x"}))
            while not reached:
                await asyncio.sleep(0)
            answers = [await client.post(path, json={"prompt": "x"}) for path in (
                "/v1/completions", httpx.URL(watchdog._PROBE).path)]
            first.cancel()
            return [answer.status_code for answer in answers]

    assert asyncio.run(ask()) == [429, 200]
    assert reached == ["/v1/completions"] * 2
    assert httpx.URL(watchdog._PROBE).path == protocol.PROBE_PATH


def warm_up(*statuses: int, options: dict[str, object] | None = None) -> tuple[bool, list[dict[str, object]]]:
    seen: list[dict[str, object]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        import json

        seen.append(json.loads(request.content))
        return httpx.Response(statuses[len(seen) - 1])

    is_ready = readiness.warm_up(httpx.MockTransport(answer), options or {
        "max-model-len": 4096, "max-num-batched-tokens": 2048, "max-num-seqs": 8}, "model")
    return is_ready, seen


def test_warm_up_fills_a_batch_and_every_sequence() -> None:
    is_ready, bodies = warm_up(200, 200)
    assert is_ready
    assert [len(body["prompt"]) for body in bodies] == [2048, 8]  # type: ignore[arg-type]  # lists
    speculative = readiness.rounds({"max-model-len": 2048, "max-num-batched-tokens": 4096, "max-num-seqs": 2,
                             "speculative-config": {"method": "ngram"}}, "model")
    assert [(body["max_tokens"], len(body["prompt"])) for bodies in speculative for body in bodies] == [
        (4, 2044), (4, 2)]
    many = readiness.rounds({"max-model-len": 4096, "max-num-batched-tokens": 2048, "max-num-seqs": 300}, "model")
    assert [[len(body["prompt"]) for body in bodies] for bodies in many] == [[2048], [128, 128, 44]]
    short = warm_up(200, options={"max-model-len": 512, "max-num-batched-tokens": 2048, "max-num-seqs": 1})
    assert [len(body["prompt"]) for body in short[1]] == [511]  # type: ignore[arg-type]  # lists


def test_failed_warm_up_is_not_ready_and_a_declined_one_is() -> None:
    assert not warm_up(500)[0]
    assert not warm_up(200, 503)[0]
    assert warm_up(404, 404)[0]
    assert warm_up(400, 200)[0]


def test_engine_that_dies_in_the_warm_up_is_not_ready() -> None:
    def die(_: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError("gone")

    options = {"max-model-len": 64, "max-num-batched-tokens": 64, "max-num-seqs": 1}
    assert not readiness.warm_up(httpx.MockTransport(die), options, "model")
