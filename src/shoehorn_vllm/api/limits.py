"""Limits of API keys: token caps, sequences per request, and the sliding window of requests.

Rules:
- no more than N requests of a key are admitted in any 60 s (a sliding window); refused requests do not count;
- one request may become several sequences in the engine, choices (`n`) times prompts: their number is bounded, and the
  cap on `max_tokens` holds for their sum;
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
"""Default of `max_tokens` in /v1/completions, in OpenAI's API and in vLLM."""

MAX_INPUTS = 2048
"""Texts to embed, rank or score in one request, as in OpenAI's API."""

_INPUT_PATHS = ("/v1/embeddings", "/v1/rerank", "/v1/score")
_TOKEN_FIELDS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}


class LimitExceededError(ValueError):
    """A request exceeds a limit. `param` names the field of the request, `code` the limit."""

    def __init__(self, message: str, param: str, code: str = "max_tokens_exceeded") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def parse_body(body: bytes) -> dict[str, Any] | None:
    """Parse a JSON object as the engine's framework does; None for anything else, which the engine refuses.

    Raises:
        LimitExceededError: the body is nested too deeply.
    """
    try:
        document = json.loads(body)
    except RecursionError:
        raise LimitExceededError("The body is nested too deeply.", "body", "invalid_request") from None
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def count_sequences(path: str, document: Mapping[str, Any], maximum: int) -> int:
    """Count the sequences that the engine makes of one request: choices times prompts, or texts.

    Args:
        maximum: the bound on choices times prompts; texts are bounded by `MAX_INPUTS`.

    Raises:
        LimitExceededError: the bound is exceeded, or a number is invalid.
    """
    if path in _INPUT_PATHS:
        sequences, maximum, param = max(map(_length, document.values()), default=1), MAX_INPUTS, "input"
    else:
        choices = max((_integer(name, document[name]) for name in ("n", "best_of") if document.get(name) is not None),
                      default=1)
        prompts = _length(document.get("prompt")) if path == "/v1/completions" else 1
        param = "n" if choices >= prompts else "prompt"
        sequences = max(1, choices) * prompts
    if sequences > maximum:
        raise LimitExceededError(f"{param}: one request may have at most {maximum} answers, not {sequences}. Split the "
                                 "request.", param, "too_many_answers")
    return sequences


def apply_token_cap(path: str, document: Mapping[str, Any], sequences: int, cap: int) -> dict[str, Any] | None:
    """Return the document with `cap` filled in where it sets no maximum; None where it stays as it is.

    Raises:
        LimitExceededError: it asks for more tokens, or its maximum is not an integer.
    """
    fields = _TOKEN_FIELDS.get(path)
    if not fields:
        return None
    maxima = {name: document[name] for name in fields if document.get(name) is not None}
    for name, value in maxima.items():
        tokens = _integer(name, value)
        if tokens * sequences > cap:
            times = f" for each of {sequences} answers" if sequences > 1 else ""
            raise LimitExceededError(f"{name}: {tokens} tokens{times} exceed this key's limit of {cap} tokens per "
                                     "request.", name)
    if maxima:
        return None
    share = cap // sequences
    if share < 1:
        raise LimitExceededError(f"n: {sequences} answers exceed this key's limit of {cap} tokens per request.", "n")
    if path == "/v1/completions":
        share = min(share, COMPLETIONS_DEFAULT_TOKENS)
    return {**document, fields[0]: share}


def _length(value: object) -> int:
    """The length of a list of texts or of lists of tokens; 1 for a text, and for one list of tokens."""
    return len(value) if isinstance(value, list) and value and not isinstance(value[0], int) else 1


def _integer(name: str, value: object) -> int:
    """An integer, and nothing that the engine's parser would convert to one, such as "100" or 1e3."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise LimitExceededError(f"{name} must be an integer.", name)
    return value


@dataclass
class KeyUsage:
    """Recent usage of one key: when its requests were admitted (seconds), and how many are running."""

    admitted: deque[float] = field(default_factory=deque)
    running: int = 0

    def wait_seconds(self, limit: int | None, now: float) -> int | None:
        """Return None when one more request is within `limit` per minute, else the seconds to wait, rounded up."""
        while self.admitted and self.admitted[0] <= now - WINDOW_SECONDS:
            self.admitted.popleft()
        if limit is None:
            self.admitted.clear()
            return None
        if len(self.admitted) < limit:
            return None
        if limit == 0:
            return int(WINDOW_SECONDS)
        return max(1, math.ceil(self.admitted[-limit] + WINDOW_SECONDS - now))
