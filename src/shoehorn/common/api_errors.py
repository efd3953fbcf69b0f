"""Error bodies of the OpenAI and the Anthropic API."""

from __future__ import annotations

import json

_ANTHROPIC_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}


def error_bodies(code: str, message: str, status: int) -> dict[str, str]:
    """The body of an error that nginx makes itself, in the forms `openai` and `anthropic`."""
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    their_kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"openai": json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}) + "\n",
            "anthropic": json.dumps({"type": "error", "error": {"type": their_kind, "message": message}}) + "\n"}


def anthropic_body(openai_body: str) -> str:
    """The same 503 in Anthropic's error form."""
    message = json.loads(openai_body)["error"]["message"]
    return json.dumps({"type": "error", "error": {"type": "overloaded_error", "message": message}}) + "\n"
