"""Readiness check of models for embeddings and ranking: a real vector or ranking, or the engine is not ready."""

from __future__ import annotations

import json

import httpx
import pytest

from shoehorn.engine.pooling_proof import prove
from shoehorn.model.task import Task

OPTIONS = {"max-model-len": 256, "max-num-batched-tokens": 2048, "max-num-seqs": 4}


def proof(task: Task, *answers: httpx.Response) -> tuple[bool, list[tuple[str, dict[str, object]]]]:
    seen: list[tuple[str, dict[str, object]]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, json.loads(request.content)))
        return answers[min(len(seen), len(answers)) - 1]

    return prove(httpx.MockTransport(answer), task, OPTIONS, "model"), seen


def vectors(*values: float) -> httpx.Response:
    return httpx.Response(200, content=json.dumps({"data": [{"embedding": list(values)}]}))


def test_embeddings_of_a_text_a_full_batch_and_every_sequence_are_requested() -> None:
    is_ready, seen = proof(Task.EMBED, vectors(0.1, -0.2))
    assert is_ready
    assert {path for path, _ in seen} == {"/v1/embeddings"}
    assert [isinstance(body["input"], str) for _, body in seen] == [True, False, False]
    assert [len(body["input"]) for _, body in seen[1:]] == [254, 4]  # type: ignore[arg-type]  # lists


@pytest.mark.parametrize("answer", [vectors(0.0, 0.0), vectors(float("nan"), 1.0), httpx.Response(500),
                                    httpx.Response(200, json={"data": []})])
def test_no_real_embedding_is_not_ready(answer: httpx.Response) -> None:
    assert not proof(Task.EMBED, answer)[0]


def test_a_ranking_is_requested_of_a_ranker() -> None:
    ranking = httpx.Response(200, json={"results": [{"relevance_score": 0.9}], "data": [1]})
    is_ready, seen = proof(Task.CLASSIFY, ranking)
    assert (is_ready, [path for path, _ in seen]) == (True, ["/v1/rerank", "/classify"])
    assert proof(Task.CLASSIFY, httpx.Response(404))[0]


def test_an_engine_that_dies_at_its_first_embedding_is_not_ready() -> None:
    def die(_: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError("gone")

    assert not prove(httpx.MockTransport(die), Task.EMBED, OPTIONS, "model")
