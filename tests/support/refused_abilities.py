"""Checks that an appliance without parsers refuses tools and thoughts on every route, with real clients."""

from __future__ import annotations

import anthropic
import openai
import pytest

from support.running import Appliance

MODEL, QUESTION = "shoehorn-demo", "What is your name?"
END_OF_THOUGHTS = "</think>"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "parameters": SCHEMA}


def check_openais_form(appliance: Appliance) -> None:
    """Fail unless chat and responses refuse tools with the reason and the setting, and leave thoughts in the text.

    The template of the demo model has a switch for thoughts, so they are available without a parser.
    """
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
        assert "TOOL_CALL_PARSER" in chat.value.message
        asked = {"role": "user", "content": QUESTION}
        thoughts = client.chat.completions.create(model=MODEL, messages=[asked], reasoning_effort="low")
        assert END_OF_THOUGHTS in (thoughts.choices[0].message.content or ""), thoughts
        thoughts = client.responses.create(model=MODEL, input=QUESTION, reasoning={"effort": "low"})
        assert END_OF_THOUGHTS in thoughts.output_text, thoughts


def check_anthropics_form(appliance: Appliance) -> None:
    """Fail unless messages refuse both, and answer where thoughts are optional."""
    with anthropic.Anthropic(base_url=appliance.url, api_key=appliance.key) as client:
        fields = {"model": MODEL, "max_tokens": 1100, "messages": [{"role": "user", "content": QUESTION}]}
        with pytest.raises(anthropic.BadRequestError, match="TOOL_CALL_PARSER"):
            client.messages.create(**fields, tools=[{"name": "get_weather", "input_schema": SCHEMA}])
        with pytest.raises(anthropic.BadRequestError, match="REASONING_PARSER") as thinking:
            client.messages.create(**fields, thinking={"type": "enabled", "budget_tokens": 1024})
        assert thinking.value.body["error"]["type"] == "invalid_request_error"
        answer = client.messages.create(**fields, thinking={"type": "adaptive"})
        assert "Shoehorn" in answer.content[0].text
