"""ASGI middleware of vLLM's API server (`--middleware`): admission by key limits, a bounded queue, and draining.

Rules:
- the headers with the key's name and limits are trusted: the gateway sets them and no client can, and the engine
  listens on a Unix socket that only the appliance's user can open;
- every POST below /v1/ counts; without the headers only the bound on the queue applies;
- the engine serves keys that used fewer tokens first (`fairness`), and a full queue admits a key with less than
  its share of it: one key cannot keep others waiting;
- a refused request costs the engine nothing: the application does not see it;
- the engine never has too many sequences either, however few requests they belong to;
- `POST /-/drain?seconds=N` refuses new requests, waits up to N s for running ones, ends the rest with an error, and
  answers {"finished": N, "aborted": N}; `GET /-/activity` answers {"running": N, "idle_seconds": S} of clients'
  requests. `GET /-/usage` answers {"run": ID, "usage": [...]}: in a replica the tokens since this process started, by
  day, key and model. The gateway has no route to the first two, and one to the last for a front only.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qs

from shoehorn.runtime.usage_file import Usage
from shoehorn_vllm.api import abilities, budgets, errors
from shoehorn_vllm.api.abilities import UnsupportedError
from shoehorn_vllm.api.admissions import AdmissionLog
from shoehorn_vllm.api.errors import Failure
from shoehorn_vllm.api.fairness import FairShare, Turn, expected_tokens
from shoehorn_vllm.api.ledger import UsageLedger
from shoehorn_vllm.api.limits import KeyUsage, LimitExceededError, apply_token_cap, count_sequences, parse_body
from shoehorn_vllm.api.meter import CURRENT, Meter
from shoehorn_vllm.api.metrics import NO_KEY, RequestMetrics
from shoehorn_vllm.api.request import BodyTooLongError, InFlightRequest, Receive, Send, read_body, refuse
from shoehorn_vllm.protocol import (
    ABILITIES_VARIABLE,
    ACTIVITY_PATH,
    DRAIN_PATH,
    KEY_HEADER,
    LIMITS_HEADER,
    MAX_REQUESTS_VARIABLE,
    MODEL_VARIABLE,
    PROBE_PATH,
    USAGE_PATH,
    Abilities,
    KeyLimits,
)

SEQUENCE_VARIABLES = ("VLLM_MAX_N_SEQUENCES", "VLLM_MAX_COMPLETION_PROMPTS")
"""vLLM's own bounds on choices and on prompts; the greater one bounds their product, which vLLM does not."""
_DEFAULT_MAX_SEQUENCES = 128

MAX_SEQUENCES = 4096
"""Sequences in the engine, running and queued, above which requests are refused; the last one may exceed it."""

ABORT_SECONDS = 2.0
"""Time that the application gets to obey an abort before its task is cancelled, and again after that."""

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_COMPLETIONS = "/v1/completions"
_KEY, _LIMITS, _LENGTH = KEY_HEADER.lower().encode(), LIMITS_HEADER.lower().encode(), b"content-length"
_QUEUE_FULL = Failure(429, "queue_full", "The request queue is full. Retry in a few seconds.", 5)


class AdmissionMiddleware:
    """Admits or refuses requests to `app`; an ASGI application itself.

    Args:
        metrics: vLLM's own registry when not given.
        max_requests: the bound on requests running and queued; from `MAX_REQUESTS_VARIABLE` when not given, and no
            bound when that is not set.
        ledger, admissions: where usage is kept; where the engine program says when not given.
    """

    def __init__(self, app: Application, metrics: RequestMetrics | None = None, max_requests: int | None = None,
                 ledger: UsageLedger | None = None, admissions: AdmissionLog | None = None) -> None:
        self._app = app
        self._metrics = metrics or RequestMetrics()
        text = os.environ.get(MAX_REQUESTS_VARIABLE, "")
        self._max_requests = max_requests if max_requests is not None else int(text) if text else None
        facts = os.environ.get(ABILITIES_VARIABLE)
        self._abilities = Abilities.from_json(facts) if facts else None
        self._max_answers = max(int(os.environ.get(name) or _DEFAULT_MAX_SEQUENCES) for name in SEQUENCE_VARIABLES)
        self._ledger = ledger or UsageLedger.from_environment()
        self._model = os.environ.get(MODEL_VARIABLE, "")
        self._order = FairShare()
        self._admissions = admissions or AdmissionLog.from_environment()
        self._usage: defaultdict[str, KeyUsage] = defaultdict(KeyUsage)
        for key, times in self._admissions.read(time.monotonic()).items():
            self._usage[key].admitted.extend(times)
        self._requests: set[InFlightRequest] = set()
        self._is_stopping = False
        self._run = uuid.uuid4().hex
        self._used_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's request, as ASGI defines it."""
        path: str = scope.get("path", "")
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif path == DRAIN_PATH:
            await self._answer_drain(scope, send)
        elif path == ACTIVITY_PATH:
            await _answer_json(send, {"running": len(self._requests), "idle_seconds": time.monotonic() - self._used_at})
        elif path == USAGE_PATH:
            await _answer_json(send, {"run": self._run, "usage": [
                {**account._asdict(), **asdict(usage)} for account, usage in self._ledger.unsaved().items()]})
        elif path == PROBE_PATH:
            # The watchdog's text completion passes a full queue too: an engine may hang behind one.
            await self._app({**scope, "path": _COMPLETIONS, "raw_path": _COMPLETIONS.encode()}, receive, send)
        elif not path.startswith("/v1/"):
            await self._app(scope, receive, send)
        elif self._is_stopping:
            await refuse(send, errors.STOPPING, path)
        elif scope["method"] != "POST":
            await self._app(scope, receive, send)
        else:
            await self._admit(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        headers = {name: value for name, value in scope["headers"] if name in (_KEY, _LIMITS, _LENGTH)}
        key = headers.get(_KEY, b"").decode("latin-1") or NO_KEY
        try:
            limits = KeyLimits.from_header(headers.get(_LIMITS, b"").decode("latin-1"))
        except ValueError:
            await self._refuse(send, path, key, Failure(500, "internal_error", "The key's limits are unreadable."))
            return
        usage = self._usage[key]
        now = time.monotonic()
        self._metrics.set_budgets(key, limits)
        if failure := (budgets.check(self._ledger, key, limits, time.time())
                       or self._check(key, usage, limits, now, headers.get(_LENGTH, b""))):
            await self._refuse(send, path, key, failure)
            return
        if limits.requests_per_minute is not None:
            usage.admitted.append(now)
            self._admissions.append(key, now)
        usage.running += 1
        self._metrics.set_running(key, usage.running)
        try:
            await self._forward(scope, receive, send, key, limits)
        finally:
            usage.running -= 1
            self._metrics.set_running(key, usage.running)

    def _check(self, key: str, usage: KeyUsage, limits: KeyLimits, now: float, length: bytes) -> Failure | None:
        """Return why a request is refused before its body is read; None when it is admitted."""
        concurrent = limits.concurrent
        if concurrent is not None and usage.running >= concurrent:
            return Failure(429, "concurrency_limit_exceeded",
                           f"This key may run {concurrent} requests at the same time. Retry in 1 s.", 1)
        wait = usage.wait_seconds(limits.requests_per_minute, now)
        if wait is not None:
            return Failure(429, "rate_limit_exceeded", f"This key may send {limits.requests_per_minute} requests per "
                           f"minute. Retry in {wait} s.", wait)
        if self._is_full(key):
            return _QUEUE_FULL
        if limits.body_bytes is not None and length.isdigit() and int(length) > limits.body_bytes:
            return _too_long(limits.body_bytes)
        return None

    def _is_full(self, key: str) -> bool:
        """No more requests of a key may wait: the queue is full, and the key has its share of it."""
        own = sum(request.key == key for request in self._requests)
        keys = len({key, *(request.key for request in self._requests)})
        is_queue_full = (self._max_requests is not None and len(self._requests) >= self._max_requests
                         and own >= self._max_requests // keys)
        return is_queue_full or sum(request.sequences for request in self._requests) >= MAX_SEQUENCES

    async def _forward(self, scope: Scope, receive: Receive, send: Send, key: str, limits: KeyLimits) -> None:
        path = scope["path"]
        sequences, document = 1, None
        try:
            body = await read_body(receive, limits.body_bytes)
            if body is None:
                self._metrics.count_request(key, "left")
                return
            if (document := parse_body(body)) is not None:
                sequences = count_sequences(path, document, self._max_answers)
                changed = None if limits.max_tokens is None else \
                    apply_token_cap(path, document, sequences, limits.max_tokens)
                if self._abilities:
                    changed = abilities.adapt(path, changed or document, self._abilities) or changed
                if changed is not None:
                    body = json.dumps(changed).encode()
                    scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
        except BodyTooLongError:
            await self._refuse(send, path, key, _too_long(limits.body_bytes or 0))
            return
        except (LimitExceededError, UnsupportedError) as error:
            await self._refuse(send, path, key, Failure(400, error.code, str(error), param=error.param))
            return
        if self._is_stopping or self._is_full(key):  # while the body was being read
            await self._refuse(send, path, key, errors.STOPPING if self._is_stopping else _QUEUE_FULL)
            return
        request = InFlightRequest(path, receive, send, body, sequences, key)
        self._requests.add(request)
        turn = self._order.begin(key, expected_tokens(body, document, sequences), time.monotonic())
        meter = Meter(functools.partial(self._count, key, _is_from_gateway(scope), turn), turn.priority)
        CURRENT.set(meter)
        request.before_end = meter.finish
        try:
            await self._app(scope, request.receive, request.send)
        except asyncio.CancelledError:
            if not request.is_aborted or request.task is None:
                raise
            request.task.uncancel()  # cancelled by `drain`
        finally:
            try:
                await request.finish()
            finally:
                self._requests.discard(request)
                meter.finish()
                self._order.end(key, turn, time.monotonic())
                if _is_from_gateway(scope):
                    self._used_at = time.monotonic()
                request.done.set_result(None)
                self._metrics.count_request(key, request.outcome)

    def _count(self, key: str, is_known: bool, turn: Turn, adapter: str, usage: Usage) -> None:
        """Count usage of a key; that of the appliance's own requests is in the metrics only."""
        turn.add(usage.tokens)
        self._metrics.count_tokens(key, usage)
        if is_known:
            self._ledger.add(key, adapter or self._model, usage)

    async def _refuse(self, send: Send, path: str, key: str, failure: Failure) -> None:
        self._metrics.count_request(key, failure.code)
        await refuse(send, failure, path)

    async def _answer_drain(self, scope: Scope, send: Send) -> None:
        try:
            seconds = float(parse_qs(scope["query_string"].decode("latin-1"))["seconds"][0])
            if scope["method"] != "POST" or not 0 <= seconds < float("inf"):
                raise ValueError
        except (KeyError, ValueError):
            await refuse(send, Failure(400, "invalid_request", "Send POST /-/drain?seconds=N."), DRAIN_PATH)
            return
        finished, aborted = await self.drain(seconds)
        await _answer_json(send, {"finished": finished, "aborted": aborted})

    async def drain(self, seconds: float) -> tuple[int, int]:
        """Refuse new requests, wait for running ones, abort the rest; returns how many finished and were aborted."""
        self._is_stopping = True
        running = list(self._requests)
        await _wait(running, seconds)
        late = [request for request in running if not request.done.done()]
        for request in late:
            request.abort()
        await _wait(late, ABORT_SECONDS)
        for request in late:
            if not request.done.done() and request.task is not None:
                request.task.cancel()
        await _wait(late, ABORT_SECONDS)
        await asyncio.to_thread(self._ledger.save)
        return len(running) - len(late), len(late)


async def _answer_json(send: Send, document: object) -> None:
    content = json.dumps(document).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [
        (b"content-type", b"application/json"), (_LENGTH, str(len(content)).encode())]})
    await send({"type": "http.response.body", "body": content})


async def _wait(requests: list[InFlightRequest], seconds: float) -> None:
    if futures := [request.done for request in requests if not request.done.done()]:
        await asyncio.wait(futures, timeout=seconds)


def _is_from_gateway(scope: Scope) -> bool:
    """Check whether the request has a key's name, which the appliance's own requests lack."""
    return any(name == _KEY for name, _ in scope["headers"])


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    """Return the headers for a body of `length` bytes."""
    others = [(name, value) for name, value in headers if name not in (_LENGTH, b"transfer-encoding")]
    return [*others, (_LENGTH, str(length).encode())]


def _too_long(max_bytes: int) -> Failure:
    return Failure(413, "request_too_large", f"The request body exceeds this key's limit of {max_bytes} bytes. Send a "
                   "smaller request, or raise the limit body_bytes of the key.")
