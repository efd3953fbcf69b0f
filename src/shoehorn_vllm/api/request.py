"""One request on its way through the engine's API server: what goes in, what comes out, and how it ends.

Rules:
- a chunk of a stream is passed on as it is; of each only a reference is kept until the next one comes;
- an answer that the application leaves unfinished is finished here: an error as JSON when nothing was sent, an error
  event at the end of a stream;
- a stream of /v1/messages or /v1/responses that is idle gets a sign of life, which vLLM gives the other routes only;
- an error of the engine's goes out in the form that the route's clients know (`answers.reformed`);
- an abort looks to the application as if its client had left, which is how vLLM ends a generation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from shoehorn_vllm.api import errors
from shoehorn_vllm.api.errors import Failure

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

KEEP_ALIVE_SECONDS = 15.0
_USAGE_END_BYTES = 4096
"""Usage stands at the end of a plain answer, behind its text."""


async def refuse(send: Send, failure: Failure, path: str) -> None:
    """Answer with a failure, as JSON."""
    content = errors.body(failure, path)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if failure.retry_seconds is not None:
        headers.append((b"retry-after", str(failure.retry_seconds).encode()))
    await send({"type": "http.response.start", "status": failure.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


class BodyTooLongError(Exception):
    """The body has more bytes than allowed."""


async def read_body(receive: Receive, most_bytes: int | None) -> bytes | None:
    """The whole body; None when the client left.

    Raises:
        BodyTooLongError: it is longer than `most_bytes`.
    """
    pieces: list[bytes] = []
    length = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        piece: bytes = message.get("body", b"")
        length += len(piece)
        if most_bytes is not None and length > most_bytes:
            raise BodyTooLongError
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


class Flight:
    """One admitted request.

    Args:
        body: the whole body, which was read already.
        answers: how many requests it is to the engine.
    """

    def __init__(self, path: str, receive: Receive, send: Send, body: bytes, answers: int) -> None:
        self.answers = answers
        self.task = asyncio.current_task()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._path = path
        self._receive = receive
        self._send = send
        self._body = body
        self._read = False
        self._abort: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._status = 0
        self._stream = False
        self._ended = False
        self._broken = False
        self._left = False
        self._last = self._before = b""
        self._sent = 0.0
        self._held: Message | None = None
        self._error = b""
        self._pulse: asyncio.Task[None] | None = None

    @property
    def aborted(self) -> bool:
        """Whether `abort` was called."""
        return self._abort.done()

    @property
    def outcome(self) -> str:
        """How it ended, for the counters."""
        if self.aborted:
            return "aborted"
        if self._left:
            return "left"
        return "error" if self._broken or not 0 < self._status < 400 else "ok"

    @property
    def end(self) -> bytes:
        """The last bytes of a good answer, where its usage stands."""
        return (self._before + self._last) if self._stream else self._last[-_USAGE_END_BYTES:]

    def abort(self) -> None:
        """End it from our side."""
        if not self._abort.done():
            self._abort.set_result(None)

    async def receive(self) -> Message:
        """For the application: the body, then nothing until the client leaves or `abort` is called."""
        if not self._read:
            self._read = True
            body, self._body = self._body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        waiting = asyncio.ensure_future(self._receive())
        either: set[asyncio.Future[Any]] = {waiting, self._abort}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                return {"type": "http.disconnect"}
            message = waiting.result()
            if message["type"] == "http.disconnect" and not self._ended:
                self._left = True
            return message
        finally:
            waiting.cancel()

    async def send(self, message: Message) -> None:
        """For the application: pass one message on."""
        if self.aborted:
            return  # the last word is ours
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._stream = any(name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                               for name, value in message["headers"])
            if self._status >= 400 and not self._stream:
                self._held = message
                return
            comment = errors.keep_alive(self._path) if self._stream else None
            if comment:
                self._pulse = asyncio.create_task(self._keep_alive(comment))
        elif self._held is not None:
            self._error += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_error(self._held)
            return
        elif message["type"] == "http.response.body":
            if body := message.get("body", b""):
                self._before, self._last = self._last, body
            if not message.get("more_body", False):
                self._ended = True
                if self._stream and not self._left and not errors.is_complete(self._path, self._before + self._last):
                    self._broken = True
                    message = {**message, "body": bytes(body) + errors.last_events(errors.BROKEN, self._path)}
        if self._pulse:
            self._sent = asyncio.get_running_loop().time()
        await self._send(message)

    async def _send_error(self, start: Message) -> None:
        content = errors.reformed(self._error, self._status, self._path)
        headers = [(name, value) for name, value in start["headers"]
                   if name.lower() not in (b"content-length", b"content-type")]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        self._ended = True
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": content})

    async def _keep_alive(self, comment: bytes) -> None:
        while not (self._ended or self.aborted or self._left):
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            idle = asyncio.get_running_loop().time() - self._sent
            if self._sent and idle >= KEEP_ALIVE_SECONDS and not (self._ended or self.aborted or self._left):
                await self._send({"type": "http.response.body", "body": comment, "more_body": True})

    async def finish(self) -> None:
        """Complete what the application left unfinished, unless its client is gone."""
        if self._pulse:
            self._pulse.cancel()
        if self._ended or self._left:
            return
        failure = errors.ABORTED if self.aborted else errors.BROKEN
        self._broken = True
        if not self._status or self._held is not None:
            await refuse(self._send, failure, self._path)
        elif self._stream:
            await self._send({"type": "http.response.body", "body": errors.last_events(failure, self._path)})
