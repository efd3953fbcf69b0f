"""Limits: header, sliding window, and token cap with all ways to bypass it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoehorn_vllm.api.limits import (
    MAX_INPUTS,
    KeyUsage,
    LimitExceededError,
    apply_token_cap,
    count_sequences,
    parse_body,
)
from shoehorn_vllm.protocol import KeyLimits

EMBEDDINGS, RERANK, SCORE = "/v1/embeddings", "/v1/rerank", "/v1/score"
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"


def test_header_is_parsed_and_absent_limits_are_none() -> None:
    text = "requests_per_minute=60;concurrent=4;max_tokens=512;body_bytes=1048576"
    assert KeyLimits.from_header(text) == KeyLimits(60, 4, 512, 1 << 20)
    assert KeyLimits.from_header("concurrent=0") == KeyLimits(concurrent=0)
    assert KeyLimits.from_header("") == KeyLimits()


@pytest.mark.parametrize("text", ["concurrent", "concurrent=", "concurrent=-1", "concurrent=1.5", "concurrent=²", "x=1",
                                  "concurrent=1;concurrent=2", "parse=1"])
def test_invalid_header_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="invalid limit"):
        KeyLimits.from_header(text)


def test_limit_holds_in_any_minute() -> None:
    usage, admitted = KeyUsage(), []
    for tenth in range(3000):
        now = tenth / 10
        if usage.wait_seconds(7, now) is None:
            usage.admitted.append(now)
            admitted.append(now)
    assert all(later - earlier >= 60 for earlier, later in zip(admitted, admitted[7:], strict=False))
    assert len(admitted) == 35


def test_wait_is_exact() -> None:
    usage = KeyUsage()
    usage.admitted.extend([100.0, 110.0, 120.5])
    assert usage.wait_seconds(3, 121.0) == 39
    assert usage.wait_seconds(2, 121.0) == 49  # the limit was lowered meanwhile
    assert usage.wait_seconds(4, 121.0) is None
    assert usage.wait_seconds(0, 121.0) == 60
    assert usage.wait_seconds(3, 160.0) is None
    usage.wait_seconds(None, 160.0)
    assert not usage.admitted


def _capped(path: str, body: dict[str, Any], cap: int) -> dict[str, Any] | None:
    """As the middleware does it, from the bytes on."""
    document = parse_body(json.dumps(body).encode())
    assert document is not None
    return apply_token_cap(path, document, count_sequences(path, document, 1000), cap)


@pytest.mark.parametrize(("path", "field"), [(CHAT, "max_completion_tokens"), (RESPONSES, "max_output_tokens"),
                                             (MESSAGES, "max_tokens")])
def test_request_without_a_maximum_gets_the_cap(path: str, field: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "鞋 \ud83d"}], field: None}
    assert _capped(path, body, 512) == {**body, field: 512}
    assert _capped(path, {**body, "n": 4}, 512) == {**body, "n": 4, field: 128}


def test_completions_keep_their_default() -> None:
    for prompt, cap, tokens in (("a", 512, 16), (["a", "b"], 20, 10), ([1, 2, 3], 12, 12)):
        assert _capped(COMPLETIONS, {"prompt": prompt}, cap) == {"prompt": prompt, "max_tokens": tokens}


@pytest.mark.parametrize(("path", "body"), [
    (CHAT, {"max_tokens": 512}), (CHAT, {"max_completion_tokens": 128, "n": 4}), (RESPONSES, {"max_output_tokens": 1}),
    (COMPLETIONS, {"max_tokens": 256, "prompt": ["a", "b"]}), (COMPLETIONS, {"max_tokens": 512, "prompt": [1, 2]}),
    (EMBEDDINGS, {"max_tokens": 9999}), ("/v1/messages/count_tokens", {"messages": []})])
def test_body_within_the_cap_is_unchanged(path: str, body: dict[str, Any]) -> None:
    assert _capped(path, body, 512) is None


@pytest.mark.parametrize(("path", "body", "param"), [
    (CHAT, {"max_tokens": 513}, "max_tokens"), (CHAT, {"max_completion_tokens": 1, "max_tokens": 513}, "max_tokens"),
    (CHAT, {"max_tokens": 1, "max_completion_tokens": 513}, "max_completion_tokens"),
    (CHAT, {"max_tokens": 300, "n": 2}, "max_tokens"), (CHAT, {"n": 513}, "n"),
    (COMPLETIONS, {"max_tokens": 300, "best_of": 2, "n": 1}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 300, "prompt": ["a", "b"]}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 300, "prompt": [[1], [2]]}, "max_tokens"),
    (RESPONSES, {"max_output_tokens": 513}, "max_output_tokens"), (MESSAGES, {"max_tokens": 513}, "max_tokens"),
    (CHAT, {"max_tokens": "9999"}, "max_tokens"), (CHAT, {"max_tokens": 1e4}, "max_tokens"),
    (CHAT, {"max_tokens": True}, "max_tokens"), (CHAT, {"max_tokens": 100, "n": "9"}, "n")])
def test_request_above_the_cap_is_rejected_with_its_field(path: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(LimitExceededError) as caught:
        _capped(path, body, 512)
    assert caught.value.param == param


@pytest.mark.parametrize(("path", "body", "answers"), [
    (CHAT, {}, 1), (CHAT, {"n": 7}, 7), (CHAT, {"n": 0}, 1), (CHAT, {"n": None}, 1), (CHAT, {"prompt": ["a"] * 9}, 1),
    (COMPLETIONS, {"prompt": ["a"] * 16, "n": 8}, 128), (COMPLETIONS, {"prompt": [[1, 2]] * 4, "best_of": 3}, 12),
    (COMPLETIONS, {"prompt": [1] * 500}, 1), (COMPLETIONS, {"prompt": []}, 1), (MESSAGES, {}, 1),
    (EMBEDDINGS, {"input": "a", "model": "m"}, 1), (EMBEDDINGS, {"input": ["a"] * MAX_INPUTS}, MAX_INPUTS),
    (EMBEDDINGS, {"input": [1] * 9999}, 1), (EMBEDDINGS, {}, 1),
    (RERANK, {"query": "a", "documents": ["b"] * 300}, 300), (SCORE, {"text_1": "a", "text_2": ["b"] * 3}, 3)])
def test_sequences_are_counted_as_in_the_engine(path: str, body: dict[str, Any], answers: int) -> None:
    assert count_sequences(path, body, 128) == answers


@pytest.mark.parametrize(("path", "body", "param"), [
    (CHAT, {"n": 129}, "n"), (COMPLETIONS, {"prompt": ["a"] * 65, "n": 2}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 2, "n": 65}, "n"), (COMPLETIONS, {"prompt": ["a"] * 128, "n": 128}, "n"),
    (EMBEDDINGS, {"input": ["a"] * 2049}, "input"), (RERANK, {"documents": ["a"] * 2049}, "input")])
def test_too_many_answers_are_rejected(path: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(LimitExceededError, match="answers") as caught:
        count_sequences(path, body, 128)
    assert (caught.value.param, caught.value.code) == (param, "too_many_answers")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"\xff\xfe", b'"text"'])
def test_invalid_objects_are_left_to_the_engine(body: bytes) -> None:
    assert parse_body(body) is None


@pytest.mark.parametrize("body", [b'{"n": 1, "n": 600}', '{"n": 600}'.encode("utf-16"), b'\xef\xbb\xbf{"n": 600}',
                                  b'{"\\u006e": 600}'])
def test_body_is_parsed_as_in_the_engine(body: bytes) -> None:
    assert parse_body(body) == json.loads(body) == {"n": 600}


def test_deeply_nested_body_is_rejected() -> None:
    with pytest.raises(LimitExceededError, match="deeply"):
        parse_body(b"[" * 200_000 + b"]" * 200_000)
