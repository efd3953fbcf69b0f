"""Requests for tools and thoughts to a model that has neither, with real clients: refused on every route."""

from __future__ import annotations

import anthropic
import httpx
import openai
import pytest

from support.running import Appliance

pytestmark = pytest.mark.engine

MODEL, QUESTION = "shoehorn-demo", "What is your name?"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "parameters": SCHEMA}


def test_tools_are_refused_with_reason_and_setting_in_openais_form(appliance: Appliance) -> None:
    with openai.OpenAI(base_url=f"{appliance.url}/v1", api_key=appliance.key) as client:
        with pytest.raises(openai.BadRequestError) as chat:
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": QUESTION}],
                                           tools=[{"type": "function", "function": FUNCTION}])
        for choice in ("auto", "required"):
            with pytest.raises(openai.BadRequestError) as responses:
                client.responses.create(model=MODEL, input=QUESTION, tools=[{"type": "function", **FUNCTION}],
                                        tool_choice=choice)
            assert (responses.value.code, responses.value.param) == ("unsupported_parameter", "tools")
        assert (chat.value.code, chat.value.param) == ("unsupported_parameter", "tools")
        assert "the chat template does not show tools" in chat.value.message
        assert "TOOL_CALL_PARSER" in chat.value.message
        with pytest.raises(openai.BadRequestError, match="REASONING_PARSER"):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": QUESTION}],
                                           reasoning_effort="low")
        with pytest.raises(openai.BadRequestError, match="REASONING_PARSER"):
            client.responses.create(model=MODEL, input=QUESTION, reasoning={"effort": "low"})


def test_tools_and_thoughts_are_refused_in_anthropics_form(appliance: Appliance) -> None:
    with anthropic.Anthropic(base_url=appliance.url, api_key=appliance.key) as client:
        fields = {"model": MODEL, "max_tokens": 1100, "messages": [{"role": "user", "content": QUESTION}]}
        with pytest.raises(anthropic.BadRequestError, match="TOOL_CALL_PARSER"):
            client.messages.create(**fields, tools=[{"name": "get_weather", "input_schema": SCHEMA}])
        with pytest.raises(anthropic.BadRequestError, match="REASONING_PARSER") as thinking:
            client.messages.create(**fields, thinking={"type": "enabled", "budget_tokens": 1024})
        assert thinking.value.body["error"]["type"] == "invalid_request_error"
        answer = client.messages.create(**fields, thinking={"type": "adaptive"})
        assert "Shoehorn" in answer.content[0].text


def test_completions_take_no_tools(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"model": MODEL, "prompt": "x", "tools": [{"type": "function"}]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


def test_log_probabilities_and_structured_output_are_served(client: httpx.Client) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    answer = client.post("/v1/chat/completions", json={**body, "max_tokens": 4, "logprobs": True, "top_logprobs": 2})
    assert len(answer.json()["choices"][0]["logprobs"]["content"]) == 4
    chosen = client.post("/v1/chat/completions", json={**body, "max_tokens": 8, "structured_outputs": {
        "choice": ["yes", "no"]}})
    assert chosen.json()["choices"][0]["message"]["content"] in ("yes", "no")
