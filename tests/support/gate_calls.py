"""Calls to the engine's middleware as an ASGI application, and an application like vLLM's behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import CollectorRegistry

from shoehorn_vllm.api.admissions import AdmissionLog
from shoehorn_vllm.api.ledger import UsageLedger
from shoehorn_vllm.api.meter import CURRENT
from shoehorn_vllm.api.metrics import RequestMetrics
from shoehorn_vllm.api.middleware import AdmissionMiddleware, Scope
from shoehorn_vllm.api.request import Message, Receive, Send

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
USAGE = b'{"usage": {"prompt_tokens": 3, "total_tokens": 8, "completion_tokens": 5}}'


class Call:
    """One request to the middleware, and its answer."""

    def __init__(self, gate: AdmissionMiddleware, path: str = CHAT, body: bytes | None = b"{}", limits: str = "",
                 key: str = "phone", method: str = "POST", query: str = "", declare: bool = True) -> None:
        headers = [(b"x-shoehorn-key", key.encode()), (b"x-shoehorn-limits", limits.encode())]
        if declare and body is not None:
            headers.append((b"content-length", str(len(body)).encode()))
        self.scope: Scope = {"type": "http", "path": path, "method": method, "query_string": query.encode(),
                             "headers": headers}
        self.body, self.left, self.sent = body or b"", asyncio.Event(), list[Message]()
        self._read, self._arrived = False, asyncio.Event()
        if body is not None:
            self._arrived.set()
        self.task = asyncio.create_task(gate(self.scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if not self._read:
            await self._arrived.wait()
            self._read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    def arrive(self, body: bytes) -> None:
        """Send the body of a request that was sent without one (`body=None`)."""
        self.body = body
        self._arrived.set()

    async def answer(self) -> tuple[int, dict[bytes, bytes], bytes]:
        """Return status, headers and body; check that the answer is complete."""
        await asyncio.wait_for(self.task, 60)
        start, *pieces = self.sent
        assert [piece.get("more_body", False) for piece in pieces] == [True] * (len(pieces) - 1) + [False]
        return start["status"], dict(start["headers"]), self.data

    @property
    def data(self) -> bytes:
        """The received part of the body."""
        return b"".join(piece["body"] for piece in self.sent[1:])

    async def until(self, text: bytes) -> None:
        """Wait until the body contains a text."""
        async with asyncio.timeout(60):
            while text not in self.data:
                await asyncio.sleep(0.001)


async def settled() -> None:
    """Run all tasks until they are blocked: none waits for anything outside the loop."""
    for _ in range(100):
        await asyncio.sleep(0)


class Engine:
    """Application like vLLM's: streams on request, stops when its client leaves, and can be made to fail."""

    def __init__(self, **settings: Any) -> None:
        self.registry = CollectorRegistry()
        options = {"ledger": UsageLedger(), "admissions": AdmissionLog(None), **settings}
        self.gate = AdmissionMiddleware(self, RequestMetrics(self.registry), **options)
        self.go, self.fail, self.stubborn, self.half = asyncio.Event(), False, False, False
        self.bodies: list[bytes] = []
        self.running = 0

    def call(self, *arguments: Any, **more: Any) -> Call:
        """Send a request."""
        return Call(self.gate, *arguments, **more)

    def count(self, outcome: str, key: str = "phone") -> float:
        """Return the number of requests with an outcome."""
        return self.registry.get_sample_value("shoehorn_requests_total", {"key": key, "outcome": outcome}) or 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        self.bodies.append(body)
        meter = CURRENT.get()  # absent for the appliance's own probe
        if meter:
            meter.count_prompt("", 3)
        self.running += 1
        try:
            if meter:
                meter.count_completion(2)
            if b'"stream"' in body:
                await send({"type": "http.response.start", "status": 200,
                            "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})
                await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            await self._work(receive)
            if meter:
                meter.count_completion(3)
            if b'"stream"' in body:
                await send({"type": "http.response.body", "body": b"data: " + USAGE + b"\n\n", "more_body": True})
                if not self.half:
                    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": USAGE})
        except EOFError:
            return
        finally:
            self.running -= 1

    async def _work(self, receive: Receive) -> None:
        if self.fail:
            raise RuntimeError("the engine core died")
        if self.stubborn:
            await self.go.wait()
            return
        leaving = asyncio.ensure_future(receive())
        going = asyncio.ensure_future(self.go.wait())
        await asyncio.wait({leaving, going}, return_when=asyncio.FIRST_COMPLETED)
        going.cancel()
        if leaving.done():
            raise EOFError
        leaving.cancel()


def run(test: Callable[[Engine], Awaitable[None]], **settings: Any) -> None:
    """Run a test with an engine in a new event loop."""
    async def main() -> None:
        await test(Engine(**settings))

    asyncio.run(main())


def error(body: bytes) -> dict[str, Any]:
    """Return the error of an answer in OpenAI's form."""
    document: dict[str, Any] = json.loads(body)["error"]
    assert set(document) == {"message", "type", "param", "code"}
    return document
