"""First requests of each feature before readiness: which are sent, and what their failures mean."""

from __future__ import annotations

import json
import logging

import httpx
import pytest

from shoehorn.engine.feature_warm_up import CHAT, warm_up_features

WITH_TOOLS = {"tool-call-parser": "hermes"}


def warmed_up(status: int, options: dict[str, object] | None = None,
              ) -> tuple[bool, list[tuple[str, dict[str, object]]]]:
    seen: list[tuple[str, dict[str, object]]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, json.loads(request.content)))
        return httpx.Response(status)

    return warm_up_features(httpx.MockTransport(answer), options or {}, "model", 10), seen


def test_features_that_stop_an_engine_at_their_first_use_are_requested() -> None:
    is_ready, seen = warmed_up(200, WITH_TOOLS)
    assert is_ready
    fields = {name for _, body in seen for name in body}
    assert {"logprobs", "prompt_logprobs", "response_format", "structured_outputs", "tools", "min_p"} <= fields
    assert [body["tool_choice"] for path, body in seen if path == CHAT] == ["auto", "required"]
    assert all(body["max_tokens"] == 4 for _, body in seen)


def test_tools_are_not_requested_without_a_parser() -> None:
    assert not any("tools" in body for _, body in warmed_up(200)[1])


@pytest.mark.parametrize(("status", "warnings"), [(400, 0), (404, 0), (500, 6)])
def test_a_declined_feature_prevents_nothing(status: int, warnings: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "engine"):
        is_ready, seen = warmed_up(status)
    assert is_ready
    assert len(seen) == 6
    assert len(caplog.records) == warnings


def test_an_engine_that_dies_is_not_ready() -> None:
    def die(_: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError("gone")

    assert not warm_up_features(httpx.MockTransport(die), {}, "model", 10)
