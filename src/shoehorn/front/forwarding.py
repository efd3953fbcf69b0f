"""ASGI application that sends admitted requests to HAProxy and returns the replicas' answers.

Rules:
- nothing is sent to the client before the first byte of a stream, or the whole of another answer, has arrived: until
  then a request can be repeated;
- a replica that refused a request (not ready, stopping, full queue) did no work for it: another one is tried until
  `REFUSAL_SECONDS` have passed, at a full queue at most once for each replica;
- a request that broke while a replica worked on it is repeated once only: it may be the cause of the failure, and must
  not stop one replica after the other;
- the end of an answer is sent after its tokens are counted if the key has a budget, so that the next request of the
  client meets the exact budget.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp

from shoehorn.front.affinity import digest
from shoehorn.front.names import AFFINITY_HEADER, REPLICA_HEADER
from shoehorn_vllm.api import errors
from shoehorn_vllm.api.errors import Failure
from shoehorn_vllm.api.middleware import Scope
from shoehorn_vllm.api.request import Message, Receive, Send, refuse
from shoehorn_vllm.protocol import KEY_HEADER, LIMITS_HEADER, UPSTREAM_STATUS_HEADER, KeyLimits

log = logging.getLogger("front")

REFUSAL_SECONDS = 10.0
"""Longer than the two checks by which HAProxy notices a lost replica."""
NOTICE_SECONDS = 2.0
"""Time in which HAProxy notices a lost replica: a request that broke must not return to it."""
_PAUSES = (0.0, 0.05, 0.2, 0.5, 1.0)
_FORWARDED = frozenset({b"accept", b"content-type", b"x-request-id", KEY_HEADER.lower().encode()})
_OWN = frozenset(name.lower() for name in (REPLICA_HEADER, UPSTREAM_STATUS_HEADER, "Connection", "Transfer-Encoding",
                                           "Content-Length", "Keep-Alive", "Date", "Server"))
"""Headers of an answer that are not passed on."""
NO_REPLICA = Failure(503, "model_not_ready", "No replica is ready. Retry in a few seconds.", 5)
_BROKEN = (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT)


@dataclass
class Answer:
    """The beginning of a replica's answer.

    Attributes:
        response: None if HAProxy gave no answer.
        first: the first chunk of a stream, or the whole body of another answer.
        is_stream: server-sent events.
        is_refusal: the replica did no work for the request.
        is_broken: the answer broke off, or never came.
        problem: of an answer without a response, for the log.
    """

    response: aiohttp.ClientResponse | None
    first: bytes = b""
    is_stream: bool = False
    is_refusal: bool = False
    is_broken: bool = False
    problem: str = ""


class Forwarding:
    """The application.

    Args:
        session: connects to HAProxy as `http://balancer`.
        replicas: number of configured replicas.
        count_usage: counts the tokens of an answer by this replica; called before the end of an answer.
    """

    def __init__(self, session: aiohttp.ClientSession, replicas: int,
                 count_usage: Callable[[str], Awaitable[None]]) -> None:
        self._session, self._replicas, self._count_usage = session, replicas, count_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one request until its answer is complete or its client disconnects."""
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        work = asyncio.create_task(self._forward(scope, body, send))
        leaving = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, leaving):
                task.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)

    async def _forward(self, scope: Scope, body: bytes, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
                   if name in _FORWARDED}
        answer = await self._obtain(scope, headers, body)
        if answer.response is None:
            if answer.is_refusal:
                await refuse(send, NO_REPLICA, scope["path"])
            return  # the middleware completes the answer of a request that broke, by an error
        try:
            replica = answer.response.headers.get(REPLICA_HEADER, "")
            count = self._count_usage if _has_budget(scope) else _count_nothing
            await send({"type": "http.response.start", "status": answer.response.status, "headers": [
                (name.lower().encode("latin-1"), value.encode("latin-1"))
                for name, value in answer.response.headers.items() if name.lower() not in _OWN]})
            if answer.is_stream:
                await self._stream(scope["path"], answer, lambda: count(replica), send)
            else:
                await count(replica)
                await send(_chunk(answer.first, more=False))
        finally:
            answer.response.close()

    async def _stream(self, path: str, answer: Answer, count: Callable[[], Awaitable[None]], send: Send) -> None:
        assert answer.response is not None  # noqa: S101  # checked by the caller
        chunk = answer.first
        pieces = answer.response.content.iter_any()
        while chunk:
            if errors.is_complete(path, chunk):
                await count()
            await send(_chunk(chunk))
            try:
                chunk = await anext(pieces, b"")
            except (aiohttp.ClientError, OSError) as error:
                log.warning("a replica's stream broke off error=%s", str(error) or type(error).__name__)
                chunk = b""
        await count()
        await send(_chunk(b"", more=False))

    async def _obtain(self, scope: Scope, headers: dict[str, str], body: bytes) -> Answer:
        """Send the request until a replica answers it."""
        document = _parse(body)
        deadline = asyncio.get_running_loop().time() + REFUSAL_SECONDS
        attempt = broken = full = 0
        while True:
            headers[AFFINITY_HEADER] = digest(headers.get(KEY_HEADER.lower(), ""), document, attempt)
            answer = await self._send(scope, headers, body)
            broken += answer.is_broken
            full += answer.is_refusal and answer.response is not None \
                and answer.response.status == HTTPStatus.TOO_MANY_REQUESTS
            may_repeat = (answer.is_broken and broken <= 1) or (answer.is_refusal and full < self._replicas)
            if not may_repeat or asyncio.get_running_loop().time() > deadline:
                return answer
            if answer.response is not None:
                answer.response.close()
            log.info("repeating a request attempt=%d reason=%s status=%s error=%s", attempt + 1,
                     "broken" if answer.is_broken else "refused",
                     answer.response.status if answer.response is not None else "none", answer.problem)
            await asyncio.sleep(NOTICE_SECONDS if answer.is_broken else
                                0.0 if full else _PAUSES[min(attempt, len(_PAUSES) - 1)])
            attempt += 1

    async def _send(self, scope: Scope, headers: dict[str, str], body: bytes) -> Answer:
        try:
            response = await self._session.request(scope["method"], f"http://balancer{scope['path']}", data=body,
                                                   headers=headers, allow_redirects=False)
        except aiohttp.ClientConnectorError as error:
            return Answer(None, is_refusal=True, problem=str(error))  # HAProxy is being restarted
        except (aiohttp.ClientError, OSError) as error:
            return Answer(None, is_broken=True, problem=str(error) or type(error).__name__)
        is_stream = response.headers.get("Content-Type", "").startswith("text/event-stream")
        first, problem = b"", "stream without a beginning"
        try:
            first = await response.content.readany() if is_stream else await response.read()
        except (aiohttp.ClientError, OSError) as error:
            is_stream, problem = True, str(error) or type(error).__name__
        except asyncio.CancelledError:
            response.close()
            raise
        if is_stream and not first:
            response.close()
            return Answer(None, is_broken=True, problem=problem)
        refusal = _is_refusal(response)
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        if response.status >= HTTPStatus.BAD_REQUEST and not is_json:  # HAProxy's own error
            response.close()
            return Answer(None, is_refusal=refusal, is_broken=not refusal, problem=f"status {response.status}")
        return Answer(response, first, is_stream, refusal, not refusal and _is_broken(response))


def _is_refusal(response: aiohttp.ClientResponse) -> bool:
    """Check whether no engine worked for the request: HAProxy, nginx or the middleware of the replica refused it."""
    reached = response.headers.get(UPSTREAM_STATUS_HEADER, "")
    return (response.status == HTTPStatus.TOO_MANY_REQUESTS
            or (response.status == HTTPStatus.SERVICE_UNAVAILABLE and reached in ("", "503")))


def _is_broken(response: aiohttp.ClientResponse) -> bool:
    return response.status in _BROKEN or response.status == HTTPStatus.SERVICE_UNAVAILABLE


def _has_budget(scope: Scope) -> bool:
    text = dict(scope["headers"]).get(LIMITS_HEADER.lower().encode(), b"")
    limits = KeyLimits.from_header(text.decode("latin-1"))
    return limits.tokens_per_day is not None or limits.tokens_per_month is not None


def _parse(body: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(body) if body else None
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


async def _count_nothing(_replica: str) -> None:
    return


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _chunk(body: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}
