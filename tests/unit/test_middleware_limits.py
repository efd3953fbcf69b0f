"""Limits: the header, the sliding window, and the cap on tokens with every way around it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoehorn_vllm.limits import Book, Limits, TooMuchError, capped

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"


def test_the_header_is_read_and_what_is_absent_has_no_limit() -> None:
    text = "requests_per_minute=60;concurrent=4;max_tokens=512;body_bytes=1048576"
    assert Limits.parse(text) == Limits(60, 4, 512, 1 << 20)
    assert Limits.parse("concurrent=0") == Limits(concurrent=0)
    assert Limits.parse("") == Limits()


@pytest.mark.parametrize("text", ["concurrent", "concurrent=", "concurrent=-1", "concurrent=1.5", "concurrent=²", "x=1",
                                  "concurrent=1;concurrent=2", "parse=1"])
def test_a_header_that_cannot_be_read_is_never_no_limit(text: str) -> None:
    with pytest.raises(ValueError, match="no limit"):
        Limits.parse(text)


def test_no_more_than_the_limit_in_any_minute() -> None:
    book, admitted = Book(), []
    for tenth in range(3000):
        now = tenth / 10
        if book.wait_seconds(7, now) is None:
            book.admitted.append(now)
            admitted.append(now)
    assert all(later - earlier >= 60 for earlier, later in zip(admitted, admitted[7:], strict=False))
    assert len(admitted) == 35


def test_the_wait_is_as_long_as_it_takes_and_no_longer() -> None:
    book = Book()
    book.admitted.extend([100.0, 110.0, 120.5])
    assert book.wait_seconds(3, 121.0) == 39
    assert book.wait_seconds(2, 121.0) == 49  # the limit was lowered meanwhile
    assert book.wait_seconds(4, 121.0) is None
    assert book.wait_seconds(0, 121.0) == 60
    assert book.wait_seconds(3, 160.0) is None
    book.wait_seconds(None, 160.0)
    assert not book.admitted


@pytest.mark.parametrize(("path", "field"), [(CHAT, "max_completion_tokens"), (RESPONSES, "max_output_tokens"),
                                             (MESSAGES, "max_tokens")])
def test_a_request_that_names_no_number_gets_the_cap(path: str, field: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "鞋 \ud83d"}], field: None}
    assert json.loads(capped(path, json.dumps(body).encode(), 512)) == {**body, field: 512}
    assert json.loads(capped(path, json.dumps({**body, "n": 4}).encode(), 512))[field] == 128


def test_completions_keep_their_own_default() -> None:
    assert json.loads(capped(COMPLETIONS, b'{"prompt": "a"}', 512))["max_tokens"] == 16
    assert json.loads(capped(COMPLETIONS, b'{"prompt": ["a", "b"]}', 20))["max_tokens"] == 10
    assert json.loads(capped(COMPLETIONS, b'{"prompt": [1, 2, 3]}', 12))["max_tokens"] == 12


@pytest.mark.parametrize(("path", "body"), [
    (CHAT, {"max_tokens": 512}), (CHAT, {"max_completion_tokens": 128, "n": 4}), (RESPONSES, {"max_output_tokens": 1}),
    (COMPLETIONS, {"max_tokens": 256, "prompt": ["a", "b"]}), (COMPLETIONS, {"max_tokens": 512, "prompt": [1, 2]}),
    ("/v1/embeddings", {"max_tokens": 9999}), ("/v1/messages/count_tokens", {"messages": []})])
def test_within_the_cap_the_body_is_left_as_it_is(path: str, body: dict[str, Any]) -> None:
    raw = b" " + json.dumps(body).encode()
    assert capped(path, raw, 512) is raw


@pytest.mark.parametrize(("path", "body", "culprit"), [
    (CHAT, {"max_tokens": 513}, "max_tokens"), (CHAT, {"max_completion_tokens": 1, "max_tokens": 513}, "max_tokens"),
    (CHAT, {"max_tokens": 1, "max_completion_tokens": 513}, "max_completion_tokens"),
    (CHAT, {"max_tokens": 300, "n": 2}, "max_tokens"), (CHAT, {"n": 513}, "n"),
    (COMPLETIONS, {"max_tokens": 300, "best_of": 2, "n": 1}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 300, "prompt": ["a", "b"]}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 300, "prompt": [[1], [2]]}, "max_tokens"),
    (RESPONSES, {"max_output_tokens": 513}, "max_output_tokens"), (MESSAGES, {"max_tokens": 513}, "max_tokens"),
    (CHAT, {"max_tokens": "9999"}, "max_tokens"), (CHAT, {"max_tokens": 1e4}, "max_tokens"),
    (CHAT, {"max_tokens": True}, "max_tokens"), (CHAT, {"max_tokens": 100, "n": "9"}, "n")])
def test_above_the_cap_is_refused_by_name(path: str, body: dict[str, Any], culprit: str) -> None:
    with pytest.raises(TooMuchError) as caught:
        capped(path, json.dumps(body).encode(), 512)
    assert caught.value.culprit == culprit


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"\xff\xfe", b'"text"'])
def test_what_is_no_object_is_left_to_the_engine(body: bytes) -> None:
    assert capped(CHAT, body, 1) is body


def test_the_engine_reads_the_last_of_two_fields_of_one_name_and_so_does_the_cap() -> None:
    with pytest.raises(TooMuchError):
        capped(CHAT, b'{"max_tokens": 1, "max_tokens": 600}', 512)


def test_a_body_nested_beyond_reading_is_refused() -> None:
    with pytest.raises(TooMuchError, match="deeply"):
        capped(CHAT, b"[" * 200_000 + b"]" * 200_000, 512)
