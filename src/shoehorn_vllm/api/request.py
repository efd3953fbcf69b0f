"""One request in the engine's API server: its body, its answer, and its end.

Rules:
- chunks of a stream pass unchanged; only the last two are kept, by reference;
- an answer that the application leaves incomplete is completed here: by an error as JSON when nothing was sent, by an
  error event at the end of a stream;
- idle streams of /v1/messages and /v1/responses get keep-alive events; vLLM sends them for the other routes;
- errors of the engine are converted to the form of the route's API (`errors.convert`);
- an abort looks to the application like a client that disconnected, which is how vLLM stops a generation.
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


async def refuse(send: Send, failure: Failure, path: str) -> None:
    """Answer with a failure as JSON."""
    content = errors.body(failure, path)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if failure.retry_seconds is not None:
        headers.append((b"retry-after", str(failure.retry_seconds).encode()))
    if failure.is_final:
        headers.append((b"x-should-retry", b"false"))
    await send({"type": "http.response.start", "status": failure.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _do_nothing() -> None:
    return


class BodyTooLongError(Exception):
    """The body exceeds the limit on its size."""


async def read_body(receive: Receive, max_bytes: int | None) -> bytes | None:
    """Read the whole body; None when the client disconnected.

    Raises:
        BodyTooLongError: the body is longer than `max_bytes`.
    """
    pieces: list[bytes] = []
    length = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        piece: bytes = message.get("body", b"")
        length += len(piece)
        if max_bytes is not None and length > max_bytes:
            raise BodyTooLongError
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


class InFlightRequest:
    """One admitted request.

    Args:
        body: the whole body, already read.
        sequences: number of sequences that the engine makes of it.
        key: name of its key.

    Attributes:
        before_end: called before the end of the answer is sent: a client that has read it finds all tokens counted.
    """

    def __init__(self, path: str, receive: Receive, send: Send, body: bytes, sequences: int, key: str) -> None:
        self.sequences = sequences
        self.key = key
        self.before_end: Callable[[], None] = _do_nothing
        self.task = asyncio.current_task()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._path = path
        self._receive = receive
        self._send = send
        self._body = body
        self._is_body_read = False
        self._abort: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._status = 0
        self._is_stream = False
        self._is_complete = False
        self._is_broken = False
        self._has_client_left = False
        self._last_chunk = self._previous_chunk = b""
        self._sent_at = 0.0
        self._error_start: Message | None = None
        self._error_body = b""
        self._keep_alive_task: asyncio.Task[None] | None = None

    @property
    def is_aborted(self) -> bool:
        """`abort` was called."""
        return self._abort.done()

    @property
    def outcome(self) -> str:
        """The label of the metrics: `ok`, `error`, `left` or `aborted`."""
        if self.is_aborted:
            return "aborted"
        if self._has_client_left:
            return "left"
        return "error" if self._is_broken or not 0 < self._status < 400 else "ok"

    def abort(self) -> None:
        """Stop the request from the server's side."""
        if not self._abort.done():
            self._abort.set_result(None)

    async def receive(self) -> Message:
        """Give the application the body, then nothing until the client disconnects or `abort` is called."""
        if not self._is_body_read:
            self._is_body_read = True
            body, self._body = self._body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        waiting = asyncio.ensure_future(self._receive())
        either: set[asyncio.Future[Any]] = {waiting, self._abort}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                return {"type": "http.disconnect"}
            message = waiting.result()
            if message["type"] == "http.disconnect" and not self._is_complete:
                self._has_client_left = True
            return message
        finally:
            waiting.cancel()

    async def send(self, message: Message) -> None:
        """Pass on one message of the application."""
        if self.is_aborted:
            return  # `finish` sends the end
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._is_stream = any(name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                                  for name, value in message["headers"])
            if self._status >= 400 and not self._is_stream:
                self._error_start = message
                return
            event = errors.keep_alive(self._path) if self._is_stream else None
            if event:
                self._keep_alive_task = asyncio.create_task(self._keep_alive(event))
        elif self._error_start is not None:
            self._error_body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_error(self._error_start)
            return
        elif message["type"] == "http.response.body":
            if not message.get("more_body", False) or (
                    self._is_stream and errors.is_complete(self._path, message.get("body", b""))):
                self.before_end()
            if body := message.get("body", b""):
                self._previous_chunk, self._last_chunk = self._last_chunk, body
            if not message.get("more_body", False):
                self._is_complete = True
                if self._is_stream and not self._has_client_left and not errors.is_complete(
                        self._path, self._previous_chunk + self._last_chunk):
                    self._is_broken = True
                    message = {**message, "body": bytes(body) + errors.last_events(errors.BROKEN, self._path)}
        if self._keep_alive_task:
            self._sent_at = asyncio.get_running_loop().time()
        await self._send(message)

    async def _send_error(self, start: Message) -> None:
        content = errors.convert(self._error_body, self._status, self._path)
        headers = [(name, value) for name, value in start["headers"]
                   if name.lower() not in (b"content-length", b"content-type")]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        self._is_complete = True
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": content})

    async def _keep_alive(self, event: bytes) -> None:
        while not self._is_over:
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            idle = asyncio.get_running_loop().time() - self._sent_at
            if self._sent_at and idle >= KEEP_ALIVE_SECONDS and not self._is_over:
                await self._send({"type": "http.response.body", "body": event, "more_body": True})

    @property
    def _is_over(self) -> bool:
        return self._is_complete or self.is_aborted or self._has_client_left

    async def finish(self) -> None:
        """Complete an answer that the application left incomplete, unless the client disconnected."""
        if self._keep_alive_task:
            self._keep_alive_task.cancel()
        if self._is_complete or self._has_client_left:
            return
        failure = errors.ABORTED if self.is_aborted else errors.BROKEN
        self._is_broken = True
        if not self._status or self._error_start is not None:
            await refuse(self._send, failure, self._path)
        elif self._is_stream:
            await self._send({"type": "http.response.body", "body": errors.last_events(failure, self._path)})
