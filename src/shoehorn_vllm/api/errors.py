"""Errors as clients expect them: OpenAI's JSON, or Anthropic's on /v1/messages; as a body or as a stream's end.

Rules: every error has a type, a message for a person, and, in OpenAI's form, a code for a program; the last event of a
broken stream is one that the official clients raise as an error, so that nobody takes half an answer for a whole one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

_OPENAI_TYPES = {429: "rate_limit_error"}
_ANTHROPIC_TYPES = {400: "invalid_request_error", 413: "request_too_large", 429: "rate_limit_error",
                    404: "not_found_error", 422: "invalid_request_error",
                    503: "overloaded_error"}
_CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large",
          415: "unsupported_media_type", 422: "invalid_request", 429: "rate_limit_exceeded", 501: "not_implemented",
          503: "server_unavailable"}
NOT_SERVED = b'{"detail":"Not Found"}'
_ENDS = {"openai": (b"[DONE]",), "anthropic": (b"event: message_stop", b"event: error"),
         "responses": (b"event: response.completed", b"event: response.failed", b"event: response.incomplete",
                       b"event: error")}


@dataclass(frozen=True)
class Failure:
    """One refusal or breakdown. `retry_seconds` goes into Retry-After; `param` names the culprit in the request."""

    status: int
    code: str
    message: str
    retry_seconds: int | None = None
    param: str | None = None


STOPPING = Failure(503, "server_stopping", "The server is stopping. Try again in a moment.", 5)
ABORTED = Failure(503, "server_stopping", "The server stopped before the answer was complete.", 5)
BROKEN = Failure(500, "engine_failed", "The engine failed before the answer was complete.", 5)


def dialect(path: str) -> str:
    """Whose form a path speaks: `anthropic`, `responses` (OpenAI's with its own stream events) or `openai`."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    return "responses" if path == "/v1/responses" else "openai"


def body(failure: Failure, path: str) -> bytes:
    """The JSON body of a failure."""
    if dialect(path) == "anthropic":
        kind = _ANTHROPIC_TYPES.get(failure.status, "api_error")
        return _dump({"type": "error", "error": {"type": kind, "message": failure.message}})
    return _dump({"error": _openai(failure)})


def reformed(content: bytes, status: int, path: str) -> bytes:
    """The engine's error body in the right form: it knows several, among them its web framework's own.

    What cannot be read keeps its text as the message. `NOT_SERVED`, the answer of an endpoint that the loaded model
    lacks, is left to the gateway, which says so in words.
    """
    if content == NOT_SERVED:
        return content
    try:
        document = json.loads(content)
    except ValueError:
        document = content.decode("utf-8", "replace")
    inner = document.get("error", document) if isinstance(document, dict) else document
    given = inner if isinstance(inner, dict) else {"message": inner}
    message = given.get("message", given.get("detail"))
    text = message if isinstance(message, str) else json.dumps(message if message is not None else document)
    param = given.get("param") if isinstance(given.get("param"), str) else None
    code = given.get("code")
    if not isinstance(code, str) or not code:
        code = "model_not_found" if status == 404 and param == "model" else _CODES.get(status, "internal_error")
    return body(Failure(status, code, text, param=param), path)


def last_events(failure: Failure, path: str) -> bytes:
    """What ends a stream that cannot go on, as server-sent events."""
    form = dialect(path)
    if form == "anthropic":
        return b"event: error\ndata: " + body(failure, path) + b"\n\n"
    if form == "responses":
        event = {"type": "error", "code": failure.code, "message": failure.message, "param": None}
        return b"event: error\ndata: " + _dump(event) + b"\n\n"
    return b"data: " + body(failure, path) + b"\n\ndata: [DONE]\n\n"


def keep_alive(path: str) -> bytes | None:
    """What to send on an idle stream; None where vLLM does so itself (`--sse-keep-alive-interval`)."""
    ping = b'event: ping\ndata: {"type": "ping"}\n\n'
    return {"anthropic": ping, "responses": b": keep-alive\n\n"}.get(dialect(path))


def is_complete(path: str, last: bytes) -> bool:
    """Whether the last chunk of a stream is the end that a client waits for."""
    return any(end in last for end in _ENDS[dialect(path)])


def _openai(failure: Failure) -> dict[str, object]:
    fallback = "invalid_request_error" if failure.status < 500 else "server_error"
    return {"message": failure.message, "type": _OPENAI_TYPES.get(failure.status, fallback), "param": failure.param,
            "code": failure.code}


def _dump(document: object) -> bytes:
    return json.dumps(document).encode()
