"""Requests for tools and thoughts: refused in each API's form, or adapted to the loaded model."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoehorn_vllm.api.abilities import CHAT, COMPLETIONS, MESSAGES, RESPONSES, UnsupportedError, adapt
from shoehorn_vllm.protocol import ABILITIES_VARIABLE, Abilities
from support.gate_calls import Engine, error, run

NOTHING = Abilities(without_thoughts="the chat template opens no thoughts", without_tools="the template shows no tools")
EVERYTHING = Abilities("qwen3", "hermes", "enable_thinking")
TOOL = {"type": "function", "name": "f", "function": {"name": "f"}}
CLAUDE_TOOL = {"name": "f", "input_schema": {}}
THINKING = {"type": "enabled", "budget_tokens": 1024}


@pytest.mark.parametrize(("path", "fields", "param", "setting"), [
    (CHAT, {"tools": [TOOL]}, "tools", "TOOL_CALL_PARSER"),
    (CHAT, {"tools": [TOOL], "tool_choice": "required"}, "tools", "TOOL_CALL_PARSER"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tools",
     "TOOL_CALL_PARSER"),
    (RESPONSES, {"tools": [TOOL], "tool_choice": "required"}, "tools", "TOOL_CALL_PARSER"),
    (RESPONSES, {"tools": [{"type": "web_search"}]}, "tools", "TOOL_CALL_PARSER"),
    (MESSAGES, {"tools": [CLAUDE_TOOL], "tool_choice": {"type": "any"}}, "tools", "TOOL_CALL_PARSER"),
    (CHAT, {"reasoning_effort": "low"}, "reasoning_effort", "REASONING_PARSER"),
    (RESPONSES, {"reasoning": {"effort": "high"}}, "reasoning.effort", "REASONING_PARSER"),
    (MESSAGES, {"thinking": THINKING}, "thinking", "REASONING_PARSER"),
])
def test_what_the_model_cannot_do_is_refused_with_the_setting(path: str, fields: dict[str, Any], param: str,
                                                            setting: str) -> None:
    with pytest.raises(UnsupportedError, match=setting) as caught:
        adapt(path, fields, NOTHING)
    assert caught.value.param == param


@pytest.mark.parametrize(("path", "fields", "param"), [
    (CHAT, {"functions": [{"name": "f"}]}, "functions"),
    (COMPLETIONS, {"tools": [TOOL]}, "tools"),
    (COMPLETIONS, {"reasoning_effort": "low"}, "reasoning_effort"),
    (RESPONSES, {"tools": [TOOL, {"type": "web_search"}]}, "tools"),
    (MESSAGES, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
])
def test_what_no_model_can_do_is_refused(path: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        adapt(path, fields, EVERYTHING)
    assert caught.value.param == param


@pytest.mark.parametrize(("path", "fields"), [
    (CHAT, {}), (CHAT, {"tools": []}), (CHAT, {"tools": None}), (CHAT, {"tools": [TOOL], "tool_choice": "none"}),
    (CHAT, {"reasoning_effort": "none"}), (CHAT, {"reasoning_effort": None}), (CHAT, {"tools": "x"}),
    (RESPONSES, {"reasoning": {"summary": "auto"}}), (RESPONSES, {"reasoning": None}),
    (MESSAGES, {"tools": [CLAUDE_TOOL], "tool_choice": {"type": "none"}}), (MESSAGES, {"thinking": "x"}),
    (MESSAGES, {"thinking": {"type": "adaptive"}}), (MESSAGES, {"thinking": {"type": "disabled"}}),
    ("/v1/messages/count_tokens", {"tools": [CLAUDE_TOOL]}), ("/v1/embeddings", {"input": "x"}),
])
def test_other_requests_pass_unchanged(path: str, fields: dict[str, Any]) -> None:
    assert adapt(path, fields, NOTHING) is None


@pytest.mark.parametrize(("path", "fields"), [
    (CHAT, {"tools": [TOOL]}), (RESPONSES, {"tools": [TOOL, {"type": "custom", "name": "g"}]}),
    (MESSAGES, {"tools": [CLAUDE_TOOL, {**CLAUDE_TOOL, "type": "custom"}]})])
def test_tools_of_the_client_pass(path: str, fields: dict[str, Any]) -> None:
    assert adapt(path, fields, EVERYTHING) is None


def test_a_tool_server_runs_its_own_tools() -> None:
    abilities = Abilities("openai_gptoss", "openai", runs_tools=True)
    assert adapt(RESPONSES, {"tools": [{"type": "web_search_preview"}]}, abilities) is None


@pytest.mark.parametrize(("path", "fields", "value"), [
    (CHAT, {"reasoning_effort": "low"}, True), (CHAT, {"reasoning_effort": "none"}, False),
    (RESPONSES, {"reasoning": {"effort": "low"}}, True), (MESSAGES, {"thinking": THINKING}, True),
    (MESSAGES, {"thinking": {"type": "adaptive"}}, True), (MESSAGES, {"thinking": {"type": "disabled"}}, False)])
def test_thoughts_are_switched_by_the_template_s_variable(path: str, fields: dict[str, Any], value: bool) -> None:
    abilities = Abilities("deepseek_v3", thinking_switch="thinking")
    assert adapt(path, fields, abilities) == {**fields, "chat_template_kwargs": {"thinking": value}}
    chosen = {**fields, "chat_template_kwargs": {"thinking": not value}}
    assert adapt(path, chosen, abilities) is None
    other = {**fields, "chat_template_kwargs": {"date": "today"}}
    assert adapt(path, other, abilities) == {**fields, "chat_template_kwargs": {"date": "today", "thinking": value}}


def test_a_budget_that_the_parser_cannot_limit_is_left_to_the_model() -> None:
    assert adapt(MESSAGES, {"thinking": THINKING}, Abilities("openai_gptoss")) == {"thinking": {"type": "adaptive"}}
    assert adapt(MESSAGES, {"thinking": THINKING}, Abilities("deepseek_r1")) is None


def test_thoughts_in_the_answer_s_text_can_still_be_switched() -> None:
    abilities = Abilities(thinking_switch="enable_thinking", without_thoughts="REASONING_PARSER=off")
    assert adapt(CHAT, {"reasoning_effort": "low"}, abilities)


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_refusal_has_the_form_of_the_route_and_costs_the_engine_nothing(path: str,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ABILITIES_VARIABLE, NOTHING.to_json())

    async def test(engine: Engine) -> None:
        status, _, body = await engine.call(path, body=json.dumps({"tools": [CLAUDE_TOOL]}).encode()).answer()
        assert status == 400
        inner = json.loads(body)["error"] if path == MESSAGES else error(body)
        assert inner["type"] == "invalid_request_error"
        assert "TOOL_CALL_PARSER" in inner["message"]
        assert path == MESSAGES or (inner["code"], inner["param"]) == ("unsupported_parameter", "tools")
        assert engine.bodies == []
        assert engine.count("unsupported_parameter") == 1

    run(test)


def test_switch_and_token_cap_both_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ABILITIES_VARIABLE, EVERYTHING.to_json())

    async def test(engine: Engine) -> None:
        engine.go.set()
        await engine.call(body=b'{"reasoning_effort": "low"}', limits="max_tokens=7").answer()
        assert json.loads(engine.bodies[0]) == {"reasoning_effort": "low", "max_completion_tokens": 7,
                                                "chat_template_kwargs": {"enable_thinking": True}}

    run(test)
