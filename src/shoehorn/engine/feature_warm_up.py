"""First requests for log probabilities, structured output and tool calls, before the appliance reports `ready`.

The engine imports and compiles what such a request needs when the first one arrives; all other requests wait meanwhile,
on a CPU for 11 to 30 s.
Rules: a request that the model declines prevents nothing; an error of the server is logged, since the appliance serves
everything else; an engine that dies has failed to start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

log = logging.getLogger("engine")

_TIMEOUT_SECONDS = 1800.0
_ANSWER_TOKENS = 4
_SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
           "additionalProperties": False}
_TOOL = {"type": "function", "function": {"name": "warm_up", "parameters": _SCHEMA}}
_HELLO = [{"role": "user", "content": "Hello"}]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def requests(options: Mapping[str, object], model: str, token: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield feature, path and body of each request.

    Args:
        options: vLLM's options; tools are tried where it has a parser of their calls.
        token: of the vocabulary, for prompts that need no chat template.
    """
    common = {"model": model, "max_tokens": _ANSWER_TOKENS, "temperature": 0}
    prompt = {**common, "prompt": [token]}
    yield "log probabilities", COMPLETIONS, {**prompt, "logprobs": 5}
    yield "log probabilities of the prompt", COMPLETIONS, {**prompt, "prompt": [token] * 4, "prompt_logprobs": 1}
    yield "sampling", COMPLETIONS, {**prompt, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 1,
                                    "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1}
    yield "JSON", COMPLETIONS, {**prompt, "response_format": {"type": "json_object"}}
    schema = {"type": "json_schema", "json_schema": {"name": "warm_up", "schema": _SCHEMA}}
    yield "structured output", COMPLETIONS, {**prompt, "response_format": schema}
    yield "structured output by a pattern", COMPLETIONS, {**prompt, "structured_outputs": {"regex": "[a-z]{2}"}}
    if options.get("tool-call-parser"):
        for choice in ("auto", "required"):
            yield f"tools ({choice})", CHAT, {**common, "messages": _HELLO, "tools": [_TOOL], "tool_choice": choice}


def warm_up_features(transport: httpx.BaseTransport, options: Mapping[str, object], model: str, token: int) -> bool:
    """Send the requests one after another; return False if the engine died."""
    with httpx.Client(transport=transport, timeout=_TIMEOUT_SECONDS) as client:
        for feature, path, body in requests(options, model, token):
            try:
                answer = client.post(f"http://engine{path}", json=body)
            except httpx.TransportError as error:
                log.warning("Engine died during its first request feature=%s error=%s", feature, type(error).__name__)
                return False
            if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
                log.warning("Engine failed its first request feature=%s status=%d body=%.300s", feature,
                            answer.status_code, answer.text)
    return True
