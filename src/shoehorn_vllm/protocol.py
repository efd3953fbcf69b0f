"""Names and formats shared by the appliance and the code inside the engine.

Rules: this module imports neither vLLM nor torch, so that `shoehorn` may import it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

# Paths of the engine's API server that the gateway does not route.
DRAIN_PATH = "/-/drain"
PROBE_PATH = "/-/probe"
ACTIVITY_PATH = "/-/activity"
USAGE_PATH = "/-/usage"

# Environment of the engine's processes.
MAX_REQUESTS_VARIABLE = "SHOEHORN_MOST_REQUESTS"
ABILITIES_VARIABLE = "SHOEHORN_ABILITIES"
MEMORY_DIR_VARIABLE = "SHOEHORN_MEMORY_DIR"
EXPERTS_FILE = "experts.json"
USAGE_DIR_VARIABLE = "SHOEHORN_USAGE_DIR"
ADMISSIONS_VARIABLE = "SHOEHORN_ADMISSIONS"
MODEL_VARIABLE = "SHOEHORN_MODEL"

# Classes that vLLM loads by name.
MIDDLEWARE_CLASS = "shoehorn_vllm.api.middleware.AdmissionMiddleware"
MEMORY_HANDLER_CLASS = "shoehorn_vllm.telemetry.memory_log.MemoryLogHandler"

# Request headers that the gateway sets and no client can.
KEY_HEADER = "X-Shoehorn-Key"
LIMITS_HEADER = "X-Shoehorn-Limits"

# Header of a replica's answers to its front: the status of its engine; absent if the request did not reach the engine.
UPSTREAM_STATUS_HEADER = "X-Shoehorn-Upstream"

# Header of the key service's refusals.
REFUSAL_HEADER = "X-Shoehorn-Refusal"


@dataclass(frozen=True)
class KeyLimits:
    """The limits of one API key; None means no limit.

    Attributes:
        requests_per_minute: requests admitted in any 60 s.
        concurrent: requests at the same time.
        max_tokens: tokens of one request's answer.
        body_bytes: size of one request.
        tokens_per_day, tokens_per_month: tokens of prompts and answers in a day or a calendar month (UTC).
    """

    requests_per_minute: int | None = None
    concurrent: int | None = None
    max_tokens: int | None = None
    body_bytes: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None

    def as_dict(self) -> dict[str, int]:
        """The limits that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def to_header(self) -> str:
        """Format the limits for `LIMITS_HEADER`: `requests_per_minute=60;concurrent=4`."""
        return ";".join(f"{name}={value}" for name, value in self.as_dict().items())

    @classmethod
    def from_header(cls, text: str) -> KeyLimits:
        """Parse the value of `LIMITS_HEADER`; an empty value has no limits.

        Raises:
            ValueError: a name is unknown or repeated, or a value is not an integer from 0 on.
        """
        limits: dict[str, int] = {}
        for part in filter(None, (piece.strip() for piece in text.split(";"))):
            name, _, value = part.partition("=")
            if name not in cls.__dataclass_fields__ or name in limits or not (value.isascii() and value.isdigit()):
                raise ValueError(f"invalid limit {part!r}")
            limits[name] = int(value)
        return cls(**limits)


@dataclass(frozen=True)
class Abilities:
    """Tools and thoughts of the loaded model.

    Attributes:
        reasoning_parser: vLLM's parser of thoughts; "" without one.
        tool_call_parser: vLLM's parser of tool calls; "" without one.
        thinking_switch: variable of the chat template that switches thoughts; "" without one.
        without_thoughts: reason for the missing parser of thoughts, a phrase; without_tools: the same for tool calls.
        runs_tools: the engine has a tool server.
    """

    reasoning_parser: str = ""
    tool_call_parser: str = ""
    thinking_switch: str = ""
    without_thoughts: str = ""
    without_tools: str = ""
    runs_tools: bool = False

    def to_json(self) -> str:
        """Format the value of `ABILITIES_VARIABLE`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Abilities:
        """Parse the value of `ABILITIES_VARIABLE`."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class ErrorForm:
    """The machine-readable parts of an error: types of the OpenAI and the Anthropic API, and the default code."""

    code: str
    openai_type: str
    anthropic_type: str


_INVALID, _SERVER = "invalid_request_error", "server_error"
ERROR_FORMS: Mapping[int, ErrorForm] = MappingProxyType({
    400: ErrorForm("invalid_request", _INVALID, _INVALID),
    401: ErrorForm("invalid_api_key", _INVALID, "authentication_error"),
    403: ErrorForm("forbidden", _INVALID, "permission_error"),
    404: ErrorForm("not_found", _INVALID, "not_found_error"),
    405: ErrorForm("method_not_allowed", _INVALID, _INVALID),
    408: ErrorForm("request_timeout", _INVALID, _INVALID),
    411: ErrorForm("length_required", _INVALID, _INVALID),
    413: ErrorForm("request_too_large", _INVALID, "request_too_large"),
    414: ErrorForm("uri_too_long", _INVALID, _INVALID),
    415: ErrorForm("unsupported_media_type", _INVALID, _INVALID),
    422: ErrorForm("invalid_request", _INVALID, _INVALID),
    429: ErrorForm("rate_limit_exceeded", "rate_limit_error", "rate_limit_error"),
    431: ErrorForm("headers_too_large", _INVALID, _INVALID),
    500: ErrorForm("internal_error", _SERVER, "api_error"),
    501: ErrorForm("not_implemented", _SERVER, "api_error"),
    503: ErrorForm("server_unavailable", _SERVER, "overloaded_error"),
    505: ErrorForm("http_version", _SERVER, "api_error"),
})
"""The errors of the API by HTTP status: the only table, for nginx, the state and the middleware.

A message of its own may carry a code of its own (`unknown_url`, `model_not_ready`, `queue_full`); the types never vary.
"""


def error_form(status: int) -> ErrorForm:
    """The error form of any HTTP status; of 400 or 500 for a status without a form of its own."""
    return ERROR_FORMS.get(status, ERROR_FORMS[400 if status < 500 else 500])


def openai_error(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, object]:
    """The `error` object of an error body of the OpenAI API."""
    form = error_form(status)
    return {"message": message, "type": form.openai_type, "param": param, "code": code or form.code}


def anthropic_error(status: int, message: str) -> dict[str, object]:
    """The whole error body of the Anthropic API."""
    return {"type": "error", "error": {"type": error_form(status).anthropic_type, "message": message}}
