"""Readiness check of models for embeddings and ranking: real requests, before the appliance reports `ready`.

Rules: an embedding must consist of finite numbers, not all zero; a ranking must score every document; an engine that
dies or fails is not ready. A route that the model lacks (404) proves nothing: its next route is tried.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from shoehorn.engine.readiness import TOKEN
from shoehorn.model.task import Task

log = logging.getLogger("engine")

_TIMEOUT_SECONDS = 1800.0
_TEXT, _OTHER = "A shoehorn helps a foot into a small shoe.", "Snow falls in winter."

_Check = Callable[[Any], bool]


def proofs(task: Task, options: Mapping[str, object], model: str) -> Iterator[tuple[str, dict[str, Any], _Check]]:
    """Yield path, body and check of each request: one that fills a batch, and one for several sequences."""
    length, sequences = int(str(options["max-model-len"])), int(str(options["max-num-seqs"]))
    longest = [TOKEN] * max(1, min(length, int(str(options["max-num-batched-tokens"]))) - 2)
    if task is Task.CLASSIFY:
        yield "/v1/rerank", {"model": model, "query": _TEXT, "documents": [_TEXT, _OTHER]}, _is_ranking
        yield "/classify", {"model": model, "input": [_TEXT] * min(sequences, 8)}, _has_data
    else:
        yield "/v1/embeddings", {"model": model, "input": _TEXT}, _is_embedding
        yield "/v1/embeddings", {"model": model, "input": longest}, _is_embedding
        yield "/v1/embeddings", {"model": model, "input": [_TEXT, _OTHER] * max(1, sequences // 2)}, _is_embedding


def prove(transport: httpx.BaseTransport, task: Task, options: Mapping[str, object], model: str) -> bool:
    """Send the requests; return False if the engine does not serve what the model is for."""
    with httpx.Client(transport=transport, timeout=_TIMEOUT_SECONDS) as client:
        for path, body, check in proofs(task, options, model):
            try:
                answer = client.post(f"http://engine{path}", json=body)
            except httpx.TransportError as error:
                log.warning("Engine died during its first request path=%s error=%s", path, type(error).__name__)
                return False
            if answer.status_code in (httpx.codes.NOT_FOUND, httpx.codes.BAD_REQUEST):
                log.warning("Engine declined a request path=%s body=%.300s", path, answer.text)
            elif answer.status_code != httpx.codes.OK or not check(answer.json()):
                log.warning("Engine failed its first request path=%s status=%d body=%.300s", path, answer.status_code,
                            answer.text)
                return False
    return True


def _is_embedding(document: Any) -> bool:
    vectors = [each["embedding"] for each in document["data"]]
    return bool(vectors) and all(any(vector) and all(map(math.isfinite, vector)) for vector in vectors)


def _is_ranking(document: Any) -> bool:
    scores = [each["relevance_score"] for each in document["results"]]
    return bool(scores) and all(map(math.isfinite, scores))


def _has_data(document: Any) -> bool:
    return bool(document["data"])
