"""Before the appliance says that it is ready: one full batch and one answer for every sequence, through the engine.

A server that listens has not shown that it can serve: the memory that a full batch takes is touched for the first time
by the first long prompt. What would fail then fails here, while the plan can still be made smaller.
Rules: an engine that dies over it, or answers that it failed, has failed to start; models without text completion, and
requests that the engine declines, prove nothing and stop nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

log = logging.getLogger("engine")

_TIMEOUT_SECONDS = 1800.0
"""A pass over offloaded weights takes seconds; a full batch on a slow link takes a few of them."""

MOST_PROMPTS = 128
"""Of one request: what the engine is told to accept (`withheld`)."""

TOKEN = 10
"""Any token: every vocabulary has it."""

_SHORT = 4
_GUESSED = 4


def rounds(options: Mapping[str, object], model: str) -> list[list[dict[str, Any]]]:
    """The bodies of the proving completions, those of a round to be sent together.

    A prompt that fills a batch, then one token for every sequence, in requests of as many prompts as one may have.
    Where tokens are guessed it is a few tokens, so that guesses are made, of which a prompt of equal tokens has many.
    """
    answer = _GUESSED if options.get("speculative-config") else 1
    length, tokens = int(str(options["max-model-len"])), int(str(options["max-num-batched-tokens"]))
    sequences = int(str(options["max-num-seqs"]))
    common = {"model": model, "max_tokens": answer, "temperature": 0}
    found = [[{**common, "prompt": [TOKEN] * max(1, min(length - answer, tokens))}]]
    if sequences > 1 and length >= _SHORT + answer:
        found.append([{**common, "prompt": [[TOKEN] * _SHORT] * min(MOST_PROMPTS, sequences - begun)}
                      for begun in range(0, sequences, MOST_PROMPTS)])
    return found


def prove(transport: httpx.BaseTransport, options: Mapping[str, object], model: str) -> bool:
    """False when the engine failed over what the plan promises."""
    with httpx.Client(transport=transport, timeout=_TIMEOUT_SECONDS) as client, ThreadPoolExecutor() as threads:
        return all(all(list(threads.map(lambda body: _served(client, body), bodies)))
                   for bodies in rounds(options, model))


def _served(client: httpx.Client, body: Mapping[str, Any]) -> bool:
    try:
        answer = client.post("http://engine/v1/completions", json=body)
    except httpx.TransportError as error:
        log.warning("the engine did not survive its first full batch (%s)", type(error).__name__)
        return False
    if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        log.warning("the engine answered its first full batch with %d: %.300s", answer.status_code, answer.text)
        return False
    return True
