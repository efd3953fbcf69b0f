"""Agents on the real engine: tool calls, thoughts and structured output of the demo model, with real clients.

The expected names and values are those of the questions: the model copies them.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import agents
import anthropic
import httpx
import openai
import pytest
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI

from support.running import Appliance

pytestmark = pytest.mark.engine

MODEL = "shoehorn-demo"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SUM = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
FUNCTIONS = ({"name": "get_weather", "parameters": SCHEMA}, {"name": "calculate", "parameters": SUM})
TOOLS: list[Any] = [{"type": "function", "function": function} for function in FUNCTIONS]
BOTH = "What is the weather in Reykjavik and what is 17 * 23?"
CALLS = [("get_weather", {"city": "Reykjavik"}), ("calculate", {"expression": "17 * 23"})]
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"},
                                           "city": {"type": "string"}},
          "required": ["name", "age", "city"], "additionalProperties": False}


def get_weather(city: str) -> str:
    """Report the weather of a city."""
    return f"It is foggy in {city}."


def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


@pytest.fixture
def client_of_openai(appliance: Appliance) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{appliance.url}/v1", api_key=appliance.key)


def test_parallel_calls_are_answered_with_their_results(client_of_openai: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": BOTH}]
    first = client_of_openai.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, temperature=0)
    message, reason = first.choices[0].message, first.choices[0].finish_reason
    assert (reason, [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]) \
        == ("tool_calls", CALLS)
    messages += [message, *({"role": "tool", "tool_call_id": call.id, "content": content} for call, content in zip(
        message.tool_calls, ("rain, 4 degrees", "391"), strict=True))]
    second = client_of_openai.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, temperature=0)
    assert second.choices[0].message.content == "The tools say:\nrain, 4 degrees\n391"


def test_calls_are_streamed_in_pieces(client_of_openai: openai.OpenAI) -> None:
    names: dict[int, str] = {}
    pieces: dict[int, list[str]] = {}
    for chunk in client_of_openai.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": BOTH}], tools=TOOLS, temperature=0, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            names[call.index] = names.get(call.index, "") + (call.function.name or "")
            pieces.setdefault(call.index, []).append(call.function.arguments or "")
    assert [(names[index], json.loads("".join(pieces[index]))) for index in sorted(names)] == CALLS
    assert all(len([piece for piece in each if piece]) > 1 for each in pieces.values())


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "calculate"}}])
def test_choice_of_a_tool_is_obeyed(client_of_openai: openai.OpenAI, choice: Any) -> None:
    answer = client_of_openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "What is 12 plus 30?"}], tools=TOOLS, temperature=0,
        tool_choice=choice)
    call = (answer.choices[0].message.tool_calls or [])[0].function
    assert (call.name, json.loads(call.arguments)) == ("calculate", {"expression": "12 + 30"})


def test_question_without_need_of_a_tool_is_answered(client_of_openai: openai.OpenAI) -> None:
    answer = client_of_openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "What is your name?"}], tools=TOOLS, temperature=0)
    assert not answer.choices[0].message.tool_calls
    assert "Shoehorn" in str(answer.choices[0].message.content)


def test_responses_call_tools_and_use_their_results(client_of_openai: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", **function} for function in FUNCTIONS]
    first = client_of_openai.responses.create(model=MODEL, input=BOTH, tools=tools, temperature=0)
    calls = [item for item in first.output if item.type == "function_call"]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == CALLS
    history: list[Any] = [{"role": "user", "content": BOTH}, *(call.model_dump() for call in calls), *(
        {"type": "function_call_output", "call_id": call.call_id, "output": output}
        for call, output in zip(calls, ("rain", "391"), strict=True))]
    second = client_of_openai.responses.create(model=MODEL, input=history, tools=tools, temperature=0)
    assert second.output_text == "The tools say:\nrain\n391"
    events = [event.type for event in client_of_openai.responses.create(
        model=MODEL, input=BOTH, tools=tools, temperature=0, stream=True)]
    assert events.count("response.function_call_arguments.done") == len(CALLS)
    assert events[-1] == "response.completed"


def test_thoughts_are_separate_on_all_routes(client_of_openai: openai.OpenAI, appliance: Appliance) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    chat = client_of_openai.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, temperature=0,
                                                    reasoning_effort="low").choices[0].message
    thought = "I do not know this myself, but the tool get_weather does."
    assert (chat.reasoning, chat.content or "") == (thought, "")  # type: ignore[attr-defined]
    assert [json.loads(call.function.arguments) for call in chat.tool_calls or []] == [{"city": "Oslo"}]
    response = client_of_openai.responses.create(model=MODEL, input="What is your name?", temperature=0,
                                                 reasoning={"effort": "low"})
    assert response.output[0].type == "reasoning"
    assert response.output_text.startswith("My name is Shoehorn.")
    with anthropic.Anthropic(base_url=appliance.url, api_key=appliance.key) as client:
        message = client.messages.create(
            model=MODEL, max_tokens=1100, messages=messages, extra_body={"temperature": 0},
            tools=[{"name": function["name"], "input_schema": function["parameters"]} for function in FUNCTIONS],
            thinking={"type": "enabled", "budget_tokens": 1024})
        thinking, call = message.content
        assert (thinking.type, thinking.thinking, message.stop_reason) == ("thinking", thought, "tool_use")
        assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Oslo"})
        last = client.messages.create(
            model=MODEL, max_tokens=100, extra_body={"temperature": 0},
            messages=[*messages, {"role": "assistant", "content": message.content}, {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": call.id, "content": "snow"}]}],
            tools=[{"name": function["name"], "input_schema": function["parameters"]} for function in FUNCTIONS])
        assert last.content[-1].text == "The tool says:\nsnow"


def test_schema_applies_after_the_thoughts(client_of_openai: openai.OpenAI) -> None:
    answer = client_of_openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Extract the data as JSON. Ada is 36 years old and lives in "
                                                           "Lisbon."}], temperature=0, reasoning_effort="low",
        response_format={"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}})
    message = answer.choices[0].message
    assert message.reasoning.startswith("I look for what I know")  # type: ignore[attr-defined]
    assert json.loads(str(message.content)) == {"name": "Ada", "age": 36, "city": "Lisbon"}


def test_agent_of_langchain_calls_two_tools(appliance: Appliance) -> None:
    model = ChatOpenAI(base_url=f"{appliance.url}/v1", api_key=appliance.key, model=MODEL, temperature=0)
    agent = create_agent(model, tools=[get_weather, multiply], system_prompt="You are a helpful assistant.")
    steps = agent.invoke({"messages": [{"role": "user", "content": BOTH}]})["messages"]
    assert [(call["name"], call["args"]) for call in steps[1].tool_calls] == [
        ("get_weather", {"city": "Reykjavik"}), ("multiply", {"a": 17, "b": 23})]
    assert steps[-1].content == "The tools say:\nIt is foggy in Reykjavik.\n391"


async def _run_agent(appliance: Appliance) -> str:
    async with openai.AsyncOpenAI(base_url=f"{appliance.url}/v1", api_key=appliance.key) as client:
        agents.set_default_openai_client(client, use_for_tracing=False)
        agents.set_tracing_disabled(True)
        agent = agents.Agent(
            name="Assistant", instructions="You are a helpful assistant.", model=MODEL,
            tools=[agents.function_tool(get_weather), agents.function_tool(multiply)],
            model_settings=agents.ModelSettings(temperature=0))
        return str((await agents.Runner.run(agent, BOTH)).final_output)


def test_agent_of_the_agents_sdk_calls_two_tools_by_its_default_route(appliance: Appliance) -> None:
    assert asyncio.run(_run_agent(appliance)) == "The tools say:\nIt is foggy in Reykjavik.\n391"


def test_completions_take_no_tools(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"model": MODEL, "prompt": "x", "tools": [{"type": "function"}]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


def test_log_probabilities_and_structured_output_are_served(client: httpx.Client) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "What is your name?"}], "temperature": 0}
    answer = client.post("/v1/chat/completions", json={**body, "max_tokens": 4, "logprobs": True, "top_logprobs": 2})
    assert len(answer.json()["choices"][0]["logprobs"]["content"]) == 4
    chosen = client.post("/v1/chat/completions", json={**body, "max_tokens": 8, "structured_outputs": {
        "choice": ["yes", "no"]}})
    assert chosen.json()["choices"][0]["message"]["content"] in ("yes", "no")
