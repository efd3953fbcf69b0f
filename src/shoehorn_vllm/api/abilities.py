"""Tools and thoughts of the loaded model: refusal of requests that it cannot serve, and the switch for thoughts.

Rules:
- nothing that a request asks for is dropped in silence: it is served or refused, with the setting's name;
- a request that leaves the choice to the model (`thinking: adaptive`, `tool_choice: none`) is served by any model;
- the variable of the chat template that switches thoughts is set for a request that asks for them in its API's own way;
  `chat_template_kwargs` of the request win.

Source: vLLM 0.32.0, vllm/entrypoints/{anthropic,openai/chat_completion,openai/responses}: without a parser of tool
calls, calls stay text on every route; a Responses tool that the server would have to run is dropped without a tool
server; `thinking.budget_tokens` is refused for a parser that reports no tags of thoughts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoehorn_vllm.protocol import Abilities

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"

CLIENT_TOOLS = ("function", "custom", "namespace")
"""Types of tools that the client runs; the server would have to run any other."""

WITHOUT_TAGS = frozenset({"granite", "hunyuan_a13b", "minimax_m2_append_think", "muse_glimmer", "openai_gptoss"})
"""Parsers that report no tags of thoughts to vLLM, which then cannot limit the length of thoughts."""


class UnsupportedError(ValueError):
    """The loaded model cannot do what a request asks for. `param` names the field."""

    code = "unsupported_parameter"

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def adapt(path: str, document: Mapping[str, Any], abilities: Abilities) -> dict[str, Any] | None:
    """Return the document with the switch for thoughts set; None where it stays as it is.

    Raises:
        UnsupportedError: the model cannot do what the document asks for.
    """
    if path not in (CHAT, COMPLETIONS, RESPONSES, MESSAGES):
        return None
    _check_tools(path, document, abilities)
    asks = _wants_thoughts(path, document)
    if asks:
        _check_thoughts(path, document, abilities)
    changed = dict(document)
    thinking = document.get("thinking")
    if path == MESSAGES and isinstance(thinking, dict) and thinking.get("type") == "enabled" \
            and abilities.reasoning_parser in WITHOUT_TAGS:
        changed["thinking"] = {"type": "adaptive"}
    variables = document.get("chat_template_kwargs")
    variables = variables if isinstance(variables, dict) else {}
    if path != COMPLETIONS and asks is not None and abilities.thinking_switch \
            and abilities.thinking_switch not in variables:
        changed["chat_template_kwargs"] = {**variables, abilities.thinking_switch: asks}
    return changed if changed != document else None


def _check_tools(path: str, document: Mapping[str, Any], abilities: Abilities) -> None:
    tools = document.get("tools")
    if path == CHAT and document.get("functions"):
        raise UnsupportedError("functions: no longer supported; send tools instead.", "functions")
    if not tools or not isinstance(tools, list):
        return
    if path == COMPLETIONS:
        raise UnsupportedError(f"tools: {COMPLETIONS} takes none. Send the request to {CHAT}.", "tools")
    choice = document.get("tool_choice")
    if choice == "none" or (isinstance(choice, dict) and choice.get("type") == "none"):
        return
    if not abilities.tool_call_parser:
        raise UnsupportedError(f"tools: this model is served without tool calls ({abilities.without_tools}). Send no "
                               "tools, or set TOOL_CALL_PARSER on the server.", "tools")
    types = [tool.get("type") for tool in tools if isinstance(tool, dict)]
    foreign = next((kind for kind in types if kind is not None and kind not in CLIENT_TOOLS), None)
    if foreign is not None and path in (RESPONSES, MESSAGES) and not abilities.runs_tools:
        raise UnsupportedError(f"tools: unsupported type {foreign!r}: the server runs no tools. Send tools of type "
                               f"{CLIENT_TOOLS[0]!r} or {CLIENT_TOOLS[1]!r}.", "tools")


def _wants_thoughts(path: str, document: Mapping[str, Any]) -> bool | None:
    """Return whether a request asks for thoughts or against them; None if it does neither."""
    if path == MESSAGES:
        thinking = document.get("thinking")
        kind = thinking.get("type") if isinstance(thinking, dict) else None
        return None if kind is None else kind != "disabled"
    reasoning = document.get("reasoning")
    effort = document.get("reasoning_effort") if path != RESPONSES else \
        reasoning.get("effort") if isinstance(reasoning, dict) else None
    return None if effort is None else effort != "none"


def _check_thoughts(path: str, document: Mapping[str, Any], abilities: Abilities) -> None:
    param = {MESSAGES: "thinking", RESPONSES: "reasoning.effort"}.get(path, "reasoning_effort")
    if path == COMPLETIONS:
        raise UnsupportedError(f"{param}: {COMPLETIONS} continues a text as it is. Send the request to {CHAT}.", param)
    if path == MESSAGES and document["thinking"].get("type") == "adaptive":
        return
    if not abilities.reasoning_parser and (path == MESSAGES or not abilities.thinking_switch):
        raise UnsupportedError(f"{param}: this model is served without thoughts ({abilities.without_thoughts}). Omit "
                               f"{param}, or set REASONING_PARSER on the server.", param)
