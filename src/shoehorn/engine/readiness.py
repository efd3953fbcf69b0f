"""Readiness check: one full batch and one request for every sequence slot, before the appliance reports `ready`.

A listening server has not shown that it can serve: the first long prompt is the first to use the memory of a full
batch. A failure here still allows a smaller plan.
Rules: an engine that dies or answers with a server error has failed to start; models without text completion, and
requests that the engine declines, prove nothing and prevent nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

log = logging.getLogger("engine")

_TIMEOUT_SECONDS = 1800.0
"""A forward pass over offloaded weights takes seconds; a full batch over slow PCIe takes several of them."""

PROMPT_LIMIT = 128
"""Prompts of one request: the bound that `environment.BOUNDS` gives the engine."""

TOKEN = 10
"""Any token: every vocabulary has it."""

_SHORT_PROMPT_TOKENS = 4
_SPECULATIVE_ANSWER_TOKENS = 4


def rounds(options: Mapping[str, object], model: str) -> list[list[dict[str, Any]]]:
    """Return the bodies of the completions; those of one round are sent concurrently.

    First a prompt that fills a batch, then one token for every sequence, with as many prompts in a request as allowed.
    With speculative decoding an answer has a few tokens, so that draft tokens are verified: a prompt of equal tokens
    yields many.
    """
    answer = _SPECULATIVE_ANSWER_TOKENS if options.get("speculative-config") else 1
    length, tokens = int(str(options["max-model-len"])), int(str(options["max-num-batched-tokens"]))
    sequences = int(str(options["max-num-seqs"]))
    common = {"model": model, "max_tokens": answer, "temperature": 0}
    bodies = [[{**common, "prompt": [TOKEN] * max(1, min(length - answer, tokens))}]]
    if sequences > 1 and length >= _SHORT_PROMPT_TOKENS + answer:
        bodies.append([
            {**common, "prompt": [[TOKEN] * _SHORT_PROMPT_TOKENS] * min(PROMPT_LIMIT, sequences - first)}
            for first in range(0, sequences, PROMPT_LIMIT)])
    return bodies


def warm_up(transport: httpx.BaseTransport, options: Mapping[str, object], model: str) -> bool:
    """Run the readiness check; return False if the engine failed to serve what the plan promises."""
    with httpx.Client(transport=transport, timeout=_TIMEOUT_SECONDS) as client, ThreadPoolExecutor() as threads:
        return all(all(list(threads.map(lambda body: _complete(client, body), bodies)))
                   for bodies in rounds(options, model))


def _complete(client: httpx.Client, body: Mapping[str, Any]) -> bool:
    try:
        answer = client.post("http://engine/v1/completions", json=body)
    except httpx.TransportError as error:
        log.warning("Engine died during its first full batch error=%s", type(error).__name__)
        return False
    if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        log.warning("Engine failed its first full batch status=%d body=%.300s", answer.status_code, answer.text)
        return False
    return True
