"""What a key may do, and what it has done: limits out of the gateway's header, and the books that hold keys to them.

Rules:
- the header comes from the gateway alone, which lets no client's header of that name through; one that cannot be read
  is an error, never "no limit";
- requests per minute are counted exactly: no more than N admitted in any 60 s (a sliding window); refused ones do not
  count;
- one request may become many inside the engine, choices (`n`) times prompts: that product is bounded, and the cap on
  `max_tokens` holds for all of them together;
- no clock, no I/O: the time is an argument.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WINDOW_SECONDS = 60.0
COMPLETIONS_DEFAULT_TOKENS = 16
"""What /v1/completions writes when asked for no number (OpenAI's API and vLLM alike)."""

MOST_INPUTS = 2048
"""Texts to embed, rank or score in one request, as many as OpenAI's API takes."""

_OF_MANY_INPUTS = ("/v1/embeddings", "/v1/rerank", "/v1/score")
_TOKEN_FIELDS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}


@dataclass(frozen=True)
class Limits:
    """The limits of one key; None where there is none. `max_tokens` counts the answer's tokens of one request."""

    requests_per_minute: int | None = None
    concurrent: int | None = None
    max_tokens: int | None = None
    body_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Limits:
        """Read `requests_per_minute=60;concurrent=4`; an empty text has no limits.

        Raises:
            ValueError: an unknown name, a name twice, or a value that is not a whole number from 0 on.
        """
        found: dict[str, int] = {}
        for part in filter(None, (piece.strip() for piece in text.split(";"))):
            name, _, value = part.partition("=")
            if name not in cls.__dataclass_fields__ or name in found or not (value.isascii() and value.isdigit()):
                raise ValueError(f"{part!r} is no limit")
            found[name] = int(value)
        return cls(**found)


class TooMuchError(ValueError):
    """A request asks for more than it may have. `culprit` names the field, `code` the limit."""

    def __init__(self, message: str, culprit: str, code: str = "max_tokens_exceeded") -> None:
        super().__init__(message)
        self.culprit = culprit
        self.code = code


def document_of(body: bytes) -> dict[str, Any] | None:
    """The JSON object of a body, read as the engine's framework does; None for anything else, which is its to refuse.

    Raises:
        TooMuchError: it is nested too deeply.
    """
    try:
        document = json.loads(body)
    except RecursionError:
        raise TooMuchError("The body is nested too deeply.", "body", "invalid_request") from None
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def answers_of(path: str, document: Mapping[str, Any], most: int) -> int:
    """How many requests one request is to the engine: its choices times its prompts, or its texts.

    Args:
        most: the bound on choices times prompts; texts are bounded by `MOST_INPUTS`.

    Raises:
        TooMuchError: more than that, or a number that is none.
    """
    if path in _OF_MANY_INPUTS:
        wanted, most, culprit = max(map(_length, document.values()), default=1), MOST_INPUTS, "input"
    else:
        wanted = max((_whole(name, document[name]) for name in ("n", "best_of") if document.get(name) is not None),
                     default=1)
        prompts = _length(document.get("prompt")) if path == "/v1/completions" else 1
        culprit = "n" if wanted >= prompts else "prompt"
        wanted = max(1, wanted) * prompts
    if wanted > most:
        raise TooMuchError(f"{wanted} answers in one request; there may be {most} at most.", culprit,
                           "too_many_answers")
    return wanted


def capped(path: str, document: Mapping[str, Any], answers: int, cap: int) -> dict[str, Any] | None:
    """The document with the cap set, when it names no number; None when it may stay as it is.

    Raises:
        TooMuchError: it asks for more, or for something that is not a whole number.
    """
    fields = _TOKEN_FIELDS.get(path)
    if not fields:
        return None
    named = {name: document[name] for name in fields if document.get(name) is not None}
    for name, value in named.items():
        tokens = _whole(name, value)
        if tokens * answers > cap:
            times = f" times {answers} answers" if answers > 1 else ""
            raise TooMuchError(f"{name} is {tokens}{times}, but this key may have {cap} tokens a request at most.",
                               name)
    if named:
        return None
    share = cap // answers
    if share < 1:
        raise TooMuchError(f"{answers} answers, but this key may have {cap} tokens a request at most.", "n")
    if path == "/v1/completions":
        share = min(share, COMPLETIONS_DEFAULT_TOKENS)
    return {**document, fields[0]: share}


def _length(value: object) -> int:
    """Of a list of texts or of lists of tokens; 1 for a text, and for one list of tokens."""
    return len(value) if isinstance(value, list) and value and not isinstance(value[0], int) else 1


def _whole(name: str, value: object) -> int:
    """A whole number and nothing that the engine's parser would turn into one, such as "100" or 1e3."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TooMuchError(f"{name} must be a whole number.", name)
    return value


@dataclass
class Book:
    """What one key did of late: when its requests were admitted (seconds), and how many run."""

    admitted: deque[float] = field(default_factory=deque)
    running: int = 0

    def wait_seconds(self, limit: int | None, now: float) -> int | None:
        """None when one more request is within `limit` a minute; else the whole seconds until there is room."""
        while self.admitted and self.admitted[0] <= now - WINDOW_SECONDS:
            self.admitted.popleft()
        if limit is None:
            self.admitted.clear()  # nothing to hold it to: keep no list
            return None
        if len(self.admitted) < limit:
            return None
        if limit == 0:
            return int(WINDOW_SECONDS)
        return max(1, math.ceil(self.admitted[-limit] + WINDOW_SECONDS - now))
