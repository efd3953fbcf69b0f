"""Affinity of a request: requests with the same beginning go to the same replica, whose prefix cache has it.

Rules:
- the digest covers the key's name, the path's kind of prompt, and the prompt up to its first user message, at most
  `PREFIX_BYTES`: all requests of a conversation have the same digest, and so have all requests after a long common
  system prompt;
- a repeated request takes the digest of its attempt, which usually leads to another replica;
- a request without a readable prompt has the digest of its key alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

PREFIX_BYTES = 1024
"""About 16 blocks of vLLM's prefix cache, of 16 tokens each."""


def digest(key: str, document: Mapping[str, Any] | None, attempt: int = 0) -> str:
    """Return the affinity of a request, 32 hexadecimal digits.

    Args:
        document: the parsed body; None for an unreadable one.
        attempt: number of earlier attempts to send the request.
    """
    text = hashlib.sha256(f"{key}\n{attempt}\n".encode())
    left = PREFIX_BYTES
    for part in _prompt(document or {}):
        piece = part.encode("utf-8", "surrogatepass")[:left]
        text.update(piece)
        left -= len(piece)
        if left <= 0:
            break
    return text.hexdigest()[:32]


def _prompt(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of the prompt in their order, up to the first user message."""
    for name in ("system", "instructions"):  # Anthropic's and OpenAI's Responses API
        if document.get(name):
            yield _text(document[name])
    messages = document.get("messages", document.get("input"))
    if isinstance(messages, list):
        for message in messages:
            yield _text(message)
            if isinstance(message, dict) and message.get("role") == "user":
                return
    for name in ("input", "prompt", "query"):
        if isinstance(document.get(name), str):
            yield document[name]
            return
    if isinstance(document.get("prompt"), list):
        yield _text(document["prompt"])


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
