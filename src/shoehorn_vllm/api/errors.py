"""Errors of the API: JSON bodies and final stream events of the OpenAI and the Anthropic API.

Rules: every error has a type and a message, and, in OpenAI's form, a code; the last event of a broken stream is one
that the official clients raise as an error, so that no client mistakes a partial answer for a complete one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from shoehorn_vllm.protocol import anthropic_error, error_form, openai_error

NOT_SERVED = b'{"detail":"Not Found"}'
_TOO_LONG = re.compile(r"maximum (context|model|encoder)\s+length")
"""vLLM 0.32.0: vllm/renderers/params.py and vllm/v1/engine/input_processor.py."""
_STREAM_ENDS = {"openai": (b"[DONE]",), "anthropic": (b"event: message_stop", b"event: error"),
                "responses": (b"event: response.completed", b"event: response.failed", b"event: response.incomplete",
                              b"event: error")}


@dataclass(frozen=True)
class Failure:
    """A refused or failed request.

    Attributes:
        retry_seconds: goes into Retry-After.
        param: names the invalid field.
        is_final: the official clients must not retry the request automatically (header X-Should-Retry).
    """

    status: int
    code: str
    message: str
    retry_seconds: int | None = None
    param: str | None = None
    is_final: bool = False


STOPPING = Failure(503, "server_stopping", "The server is shutting down. Retry in a few seconds.", 5)
ABORTED = Failure(503, "server_stopping", "The server shut down before the answer was complete. Retry.", 5)
BROKEN = Failure(500, "engine_failed", "The engine failed before the answer was complete. Retry.", 5)


def dialect(path: str) -> str:
    """The API of a path: `anthropic`, `responses` (OpenAI's with its own stream events) or `openai`."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    return "responses" if path == "/v1/responses" else "openai"


def body(failure: Failure, path: str) -> bytes:
    """The JSON body of a failure."""
    if dialect(path) == "anthropic":
        return _dump(anthropic_error(failure.status, failure.message))
    return _dump({"error": openai_error(failure.status, failure.message, failure.code, failure.param)})


def convert(content: bytes, status: int, path: str) -> bytes:
    """Convert an error body of the engine, which has several forms, to the form of the path's API.

    An unreadable body becomes the message. `NOT_SERVED`, the answer of an endpoint that the loaded model lacks, stays
    as it is: the gateway replaces it.
    """
    if content == NOT_SERVED:
        return content
    try:
        document = json.loads(content)
    except ValueError:
        document = content.decode("utf-8", "replace")
    inner = document.get("error", document) if isinstance(document, dict) else document
    fields = inner if isinstance(inner, dict) else {"message": inner}
    message = fields.get("message", fields.get("detail"))
    text = message if isinstance(message, str) else json.dumps(message if message is not None else document)
    param = fields.get("param") if isinstance(fields.get("param"), str) else None
    code = fields.get("code")
    if not isinstance(code, str) or not code:
        code = _code(status, param, text)
    return body(Failure(status, code, text, param=param), path)


def _code(status: int, param: str | None, message: str) -> str:
    """Return the code that OpenAI's clients know for an error of the engine, which has none."""
    if status == 404 and param == "model":
        return "model_not_found"
    if status == 400 and _TOO_LONG.search(message):
        return "context_length_exceeded"
    return error_form(status).code


def last_events(failure: Failure, path: str) -> bytes:
    """The server-sent events that end an interrupted stream."""
    form = dialect(path)
    if form == "anthropic":
        return b"event: error\ndata: " + body(failure, path) + b"\n\n"
    if form == "responses":
        event = {"type": "error", "code": failure.code, "message": failure.message, "param": None}
        return b"event: error\ndata: " + _dump(event) + b"\n\n"
    return b"data: " + body(failure, path) + b"\n\ndata: [DONE]\n\n"


def keep_alive(path: str) -> bytes | None:
    """The keep-alive event of an idle stream; None where vLLM sends one (`--sse-keep-alive-interval`)."""
    ping = b'event: ping\ndata: {"type": "ping"}\n\n'
    return {"anthropic": ping, "responses": b": keep-alive\n\n"}.get(dialect(path))


def is_complete(path: str, last: bytes) -> bool:
    """Check whether the last chunk of a stream is the end that a client expects."""
    return any(end in last for end in _STREAM_ENDS[dialect(path)])


def _dump(document: object) -> bytes:
    return json.dumps(document).encode()
