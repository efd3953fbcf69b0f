"""What a key may do, and what it has done: limits out of the gateway's header, and the books that hold keys to them.

Rules:
- the header comes from the gateway alone, which lets no client's header of that name through; one that cannot be read
  is an error, never "no limit";
- requests per minute are counted exactly: no more than N admitted in any 60 s (a sliding window); refused ones do not
  count;
- the cap on `max_tokens` holds for a whole request: choices (`n`) times prompts times tokens, so that asking for many
  answers does not get around it;
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
    """A request asks for more than its key may have. `field` names the culprit."""

    def __init__(self, message: str, culprit: str) -> None:
        super().__init__(message)
        self.culprit = culprit


def capped(path: str, body: bytes, cap: int) -> bytes:
    """The body with the cap in force: unchanged when within it, with the cap set when it names no number.

    A body that is no JSON object is left for the engine to refuse.

    Raises:
        TooMuchError: it asks for more, or for something that is not a whole number.
    """
    fields = _TOKEN_FIELDS.get(path)
    if not fields:
        return body
    try:
        document = json.loads(body)
    except RecursionError:
        raise TooMuchError("The body is nested too deeply.", "body") from None
    except ValueError:
        return body
    if not isinstance(document, dict):
        return body
    answers = _answers(path, document)
    named = {name: document[name] for name in fields if document.get(name) is not None}
    for name, value in named.items():
        tokens = _whole(name, value)
        if tokens * answers > cap:
            times = f" times {answers} answers" if answers > 1 else ""
            raise TooMuchError(f"{name} is {tokens}{times}, but this key may have {cap} tokens a request at most.",
                               name)
    if named:
        return body
    share = cap // answers
    if share < 1:
        raise TooMuchError(f"{answers} answers, but this key may have {cap} tokens a request at most.", "n")
    if path == "/v1/completions":
        share = min(share, COMPLETIONS_DEFAULT_TOKENS)
    return json.dumps({**document, fields[0]: share}).encode()


def _answers(path: str, document: Mapping[str, Any]) -> int:
    """How many answers the engine will compute for one request."""
    wanted = max((_whole(name, document[name]) for name in ("n", "best_of") if document.get(name) is not None),
                 default=1)
    prompt = document.get("prompt")
    prompts = len(prompt) if path == "/v1/completions" and isinstance(prompt, list) and prompt and not isinstance(
        prompt[0], int) else 1
    return max(1, wanted) * prompts


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
