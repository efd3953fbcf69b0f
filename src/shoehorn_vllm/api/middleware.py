"""The ASGI middleware that vLLM is started with (`--middleware`): limits for each key, a bounded queue, and the drain.

Rules:
- it trusts `X-Shoehorn-Key` (a name, never a key) and `X-Shoehorn-Limits`, which the gateway sets and no client can:
  the engine listens on a Unix socket that only the appliance's own user reaches;
- every POST under /v1/ counts; without the header there are no limits but the bound on the queue;
- a refusal costs the engine nothing: it is made before the application sees the request;
- the engine never holds too many answers (choices times prompts) either, however few requests they come in;
- `POST /-/drain?seconds=N` refuses what is new, waits up to N s for what runs, ends the rest with an error of its own,
  and answers {"finished": N, "aborted": N}. The gateway has no route to it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import defaultdict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from shoehorn_vllm.api import errors
from shoehorn_vllm.api.errors import Failure
from shoehorn_vllm.api.limits import Book, Limits, TooMuchError, answers_of, capped, document_of
from shoehorn_vllm.api.metrics import NO_KEY, Counts
from shoehorn_vllm.api.request import BodyTooLongError, Flight, Receive, Send, read_body, refuse

MOST_REQUESTS = "SHOEHORN_MOST_REQUESTS"
"""The variable that bounds how many requests the engine holds, running and queued; not set means no bound."""

MOST_ANSWERS = ("VLLM_MAX_N_SEQUENCES", "VLLM_MAX_COMPLETION_PROMPTS")
"""The engine's own bounds on choices and on prompts; the greater one bounds their product, which it does not."""
_DEFAULT_MOST_ANSWERS = 128

MOST_HELD = 4096
"""Answers that the engine holds, running and queued, before more requests are refused; the last one may go over."""

DRAIN_PATH = "/-/drain"
ABORT_SECONDS = 2.0
"""How long the application gets to obey an abort before its task is cancelled, and again after that."""

PROBE_PATH = "/-/probe"
"""`POST`, a text completion for the watchdog: it reaches the engine also when the queue is full, because an engine that
hangs behind one would never be found otherwise. Like the drain, the gateway has no route to it."""

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_COMPLETIONS = "/v1/completions"
_BUSY = Failure(429, "queue_full", "The server's queue is full. Try again in a moment.", 5)


class Gate:
    """The middleware: `Gate(application)` is an ASGI application in its turn.

    Args:
        counts: where requests are counted; vLLM's own registry when not given.
        most_requests: the bound on requests running and queued; from `MOST_REQUESTS` when not given.
    """

    def __init__(self, app: Application, counts: Counts | None = None, most_requests: int | None = None) -> None:
        self._app = app
        self._counts = counts or Counts()
        text = os.environ.get(MOST_REQUESTS, "")
        self._most_requests = most_requests if most_requests is not None else int(text) if text else None
        self._most_answers = max(int(os.environ.get(name) or _DEFAULT_MOST_ANSWERS) for name in MOST_ANSWERS)
        self._books: defaultdict[str, Book] = defaultdict(Book)
        self._flights: set[Flight] = set()
        self._stopping = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request, as ASGI defines it."""
        path: str = scope.get("path", "")
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif path == DRAIN_PATH:
            await self._answer_drain(scope, send)
        elif path == PROBE_PATH:
            await self._app({**scope, "path": _COMPLETIONS, "raw_path": _COMPLETIONS.encode()}, receive, send)
        elif not path.startswith("/v1/"):
            await self._app(scope, receive, send)
        elif self._stopping:
            await refuse(send, errors.STOPPING, path)
        elif scope["method"] != "POST":
            await self._app(scope, receive, send)
        else:
            await self._admit(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        headers = {name: value for name, value in scope["headers"]
                   if name in (b"x-shoehorn-key", b"x-shoehorn-limits", b"content-length")}
        key = headers.get(b"x-shoehorn-key", b"").decode("latin-1") or NO_KEY
        try:
            limits = Limits.parse(headers.get(b"x-shoehorn-limits", b"").decode("latin-1"))
        except ValueError:
            await self._refuse(send, path, key, Failure(500, "internal_error", "The key's limits cannot be read."))
            return
        book = self._books[key]
        now = asyncio.get_running_loop().time()
        if failure := self._check(book, limits, now, headers.get(b"content-length", b"")):
            await self._refuse(send, path, key, failure)
            return
        if limits.requests_per_minute is not None:
            book.admitted.append(now)
        book.running += 1
        self._counts.running(key, book.running)
        try:
            await self._fly(scope, receive, send, key, limits)
        finally:
            book.running -= 1
            self._counts.running(key, book.running)

    def _check(self, book: Book, limits: Limits, now: float, length: bytes) -> Failure | None:
        """Why a request is refused at the door; None when it is admitted."""
        most = limits.concurrent
        if most is not None and book.running >= most:
            return Failure(429, "concurrency_limit_exceeded", f"This key may have {most} requests at the same time.", 1)
        wait = book.wait_seconds(limits.requests_per_minute, now)
        if wait is not None:
            return Failure(429, "rate_limit_exceeded", f"This key may send {limits.requests_per_minute} requests a "
                           f"minute. Try again in {wait} s.", wait)
        if self._full():
            return _BUSY
        if limits.body_bytes is not None and length.isdigit() and int(length) > limits.body_bytes:
            return _too_long(limits.body_bytes)
        return None

    def _full(self) -> bool:
        """Whether nothing more may wait."""
        queued = self._most_requests is not None and len(self._flights) >= self._most_requests
        return queued or sum(flight.answers for flight in self._flights) >= MOST_HELD

    async def _fly(self, scope: Scope, receive: Receive, send: Send, key: str, limits: Limits) -> None:
        path = scope["path"]
        weight = 1
        try:
            body = await read_body(receive, limits.body_bytes)
            if body is None:
                self._counts.request(key, "left")
                return
            if (document := document_of(body)) is not None:
                weight = answers_of(path, document, self._most_answers)
                if limits.max_tokens is not None and (
                        changed := capped(path, document, weight, limits.max_tokens)) is not None:
                    body = json.dumps(changed).encode()
                    scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
        except BodyTooLongError:
            await self._refuse(send, path, key, _too_long(limits.body_bytes or 0))
            return
        except TooMuchError as error:
            await self._refuse(send, path, key, Failure(400, error.code, str(error), param=error.culprit))
            return
        if self._stopping or self._full():  # since then: the body took its time
            await self._refuse(send, path, key, errors.STOPPING if self._stopping else _BUSY)
            return
        flight = Flight(path, receive, send, body, weight)
        self._flights.add(flight)
        try:
            await self._app(scope, flight.receive, flight.send)
        except asyncio.CancelledError:
            if not flight.aborted or flight.task is None:
                raise
            flight.task.uncancel()  # it was our own abort
        finally:
            try:
                await flight.finish()
            finally:
                self._flights.discard(flight)
                flight.done.set_result(None)
                self._counts.request(key, flight.outcome)
                self._counts.usage(key, flight.end)

    async def _refuse(self, send: Send, path: str, key: str, failure: Failure) -> None:
        self._counts.request(key, failure.code)
        await refuse(send, failure, path)

    async def _answer_drain(self, scope: Scope, send: Send) -> None:
        try:
            seconds = float(parse_qs(scope["query_string"].decode("latin-1"))["seconds"][0])
            if scope["method"] != "POST" or not 0 <= seconds < float("inf"):
                raise ValueError
        except (KeyError, ValueError):
            await refuse(send, Failure(400, "bad_request", "Write POST /-/drain?seconds=N."), DRAIN_PATH)
            return
        finished, aborted = await self.drain(seconds)
        content = json.dumps({"finished": finished, "aborted": aborted}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]})
        await send({"type": "http.response.body", "body": content})

    async def drain(self, seconds: float) -> tuple[int, int]:
        """Refuse what is new, wait for what runs, abort the rest; returns how many finished and were aborted."""
        self._stopping = True
        running = list(self._flights)
        await _wait(running, seconds)
        late = [flight for flight in running if not flight.done.done()]
        for flight in late:
            flight.abort()
        await _wait(late, ABORT_SECONDS)
        for flight in late:
            if not flight.done.done() and flight.task is not None:
                flight.task.cancel()
        await _wait(late, ABORT_SECONDS)
        return len(running) - len(late), len(late)


async def _wait(flights: list[Flight], seconds: float) -> None:
    if futures := [flight.done for flight in flights if not flight.done.done()]:
        await asyncio.wait(futures, timeout=seconds)


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    """The headers for a body of `length` bytes, which may be another than came in."""
    kept = [(name, value) for name, value in headers if name not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode())]


def _too_long(most_bytes: int) -> Failure:
    return Failure(413, "request_too_large", f"The request body is longer than this key's {most_bytes} bytes.")
