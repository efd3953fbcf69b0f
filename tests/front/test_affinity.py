"""Affinity: which requests belong together."""

from __future__ import annotations

from typing import Any

import pytest

from shoehorn.front.affinity import PREFIX_BYTES, digest

LONG = "system " * PREFIX_BYTES


def chat(*texts: str, system: str = "") -> dict[str, Any]:
    """Return a conversation in which user and assistant take turns."""
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


@pytest.mark.parametrize(("first", "second"), [
    (chat("hello"), chat("hello", "hi", "and now?")),
    (chat("hello", system="be brief"), chat("hello", "hi", "more", system="be brief")),
    (chat("one", system=LONG), chat("two", system=LONG)),
    ({"system": LONG, **chat("one")}, {"system": LONG, **chat("two")}),
    ({"instructions": "be brief", "input": "hello"}, {"input": "hello", "instructions": "be brief", "stream": True}),
    ({"prompt": LONG + "one"}, {"prompt": LONG + "two"}),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]},
     {"messages": [{"content": [{"text": "hello", "type": "text"}], "role": "user"}], "temperature": 0}),
])
def test_same_beginning_has_the_same_affinity(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert digest("key", first) == digest("key", second)


@pytest.mark.parametrize(("first", "second"), [
    (chat("hello"), chat("goodbye")), (chat("hello", system="be brief"), chat("hello", system="be kind")),
    ({"prompt": "a"}, {"prompt": "b"}), ({"prompt": [1, 2]}, {"prompt": [1, 3]}),
    ({"input": [{"role": "user", "content": "a"}]}, {"input": [{"role": "user", "content": "b"}]}),
    ({"query": "a", "documents": ["x"]}, {"query": "b", "documents": ["x"]}),
])
def test_other_beginning_has_another_affinity(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert digest("key", first) != digest("key", second)


def test_key_and_attempt_change_the_affinity() -> None:
    values = {digest(key, chat("hello"), attempt) for key in ("a", "b") for attempt in (0, 1)}
    assert len(values) == 4
    assert all(len(value) == 32 for value in values)


@pytest.mark.parametrize("document", [None, {}, {"messages": 7}, {"messages": [3, None]}, {"prompt": None},
                                      {"messages": [{"role": "user", "content": "\ud800"}]}])
def test_any_document_has_an_affinity(document: dict[str, Any] | None) -> None:
    assert digest("key", document)
