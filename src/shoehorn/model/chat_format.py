"""Format of a model's conversations, read from its chat template and tokenizer, never from its name.

Rules: the template's text and what it renders decide; a template of the user replaces the checkpoint's; a missing or
unreadable file means that nothing is known, not an error.

Sources: resolution of chat templates in transformers (tokenization_utils_base.py), and in vLLM 0.32.0
(vllm/renderers/hf.py); its registry of tokenizers (vllm/tokenizers/registry.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from shoehorn.model import template_probe
from shoehorn.model.files import Files
from shoehorn.model.template_probe import PROBE_TOOL

STRUCTURAL_TOKENS = (
    "<think>", "</think>", "<mm:think>", "</mm:think>", "<ifm|think>", "</ifm|think>", "<assistant>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<tool_calls>", "</tool_calls>", "<|tool_call_start|>",
    "<|tool_call_end|>", "<|python_tag|>", "[TOOL_CALLS]")
"""Tokens that a parser of the engine may require as single tokens of the vocabulary."""

SWITCHES = ("enable_thinking", "thinking")
"""Variables of chat templates that switch thoughts on and off."""

_THINK, _END_THINK = "<think>", "</think>"
_MAX_TOKENIZER_BYTES = 64 << 20
_MISTRAL_TOKENIZERS = ("tekken.json", "tokenizer.model.v")


class Thinking(Enum):
    """When the chat template makes the model think between <think> tags."""

    ALWAYS = "always"
    ON = "on"
    """Unless a request switches it off."""
    OFF = "off"
    """Only where a request switches it on."""
    NEVER = "never"


@dataclass(frozen=True)
class ChatFormat:
    """Facts about a model's conversations.

    Attributes:
        text: of all chat templates; "" without one.
        shows_tools: the template shows a request's tools to the model.
        switch: variable of the template that switches thoughts; "" without one.
        tokens: the `STRUCTURAL_TOKENS` of the tokenizer; None if it could not be read.
        mistral_tokenizer: Mistral's own tokenizer, which the engine prefers and which has a template of its own.
    """

    text: str = ""
    shows_tools: bool = False
    thinking: Thinking = Thinking.NEVER
    switch: str = ""
    tokens: frozenset[str] | None = None
    mistral_tokenizer: bool = False


def read(files: Files, template: str = "") -> ChatFormat:
    """Read the format of a checkpoint's conversations.

    Args:
        template: chat template of the user, which replaces the checkpoint's.

    Raises:
        ModelUnavailableError: a file that exists cannot be fetched.
    """
    names = files.names()
    config = _json(files, names, "tokenizer_config.json")
    templates = {"default": template} if template else _templates(files, names, config)
    plain = templates.get("default") or next(iter(templates.values()), "")
    tokens = {name: token for name in ("bos_token", "eos_token", "pad_token", "unk_token")
              if isinstance(token := _content(config.get(name)), str)}
    thinking, switch = _thinking(plain, tokens)
    text = "\n".join(templates.values())
    if not text and "SYSTEM_PROMPT.txt" in names:
        text = files.read("SYSTEM_PROMPT.txt").decode(errors="replace")
    shows_tools = any(PROBE_TOOL in prompt for prompt in template_probe.prompts(
        templates.get("tool_use") or plain, tokens, with_tools=True))
    return ChatFormat(text, shows_tools, thinking, switch, _tokens(files, names, config, text),
                      any(name.startswith(_MISTRAL_TOKENIZERS) for name in names))


def _thinking(template: str, tokens: Mapping[str, str]) -> tuple[Thinking, str]:
    """Return when the template makes the model think, and its switch."""
    base = next(template_probe.prompts(template, tokens), "")
    for switch in SWITCHES:
        if switch not in template_probe.variables(template):
            continue
        on, off = (next(template_probe.prompts(template, tokens, **{switch: value}), "") for value in (True, False))
        if on != off:
            is_on = base == on or (base != off and _opens_thoughts(base))
            return (Thinking.ON if is_on else Thinking.OFF), switch
    return (Thinking.ALWAYS if _opens_thoughts(base) else Thinking.NEVER), ""


def _opens_thoughts(prompt: str) -> bool:
    """Return whether a prompt asks for thoughts: it opens them, or its instructions mention the tags."""
    return _THINK in prompt and not prompt.rstrip().endswith(_END_THINK)


def _templates(files: Files, names: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name; files of their own come before the tokenizer's configuration."""
    if "chat_template.jinja" in names:
        templates = {"default": files.read("chat_template.jinja").decode(errors="replace")}
        return templates | {name.rsplit("/", 1)[-1].removesuffix(".jinja"): files.read(name).decode(errors="replace")
                        for name in names if name.startswith("additional_chat_templates/") and name.endswith(".jinja")}
    for source in (config, _json(files, names, "chat_template.json"), _json(files, names, "processor_config.json")):
        template = source.get("chat_template")
        if isinstance(template, str) and template:
            return {"default": template}
        if isinstance(template, list):
            return {str(each.get("name")): str(each.get("template")) for each in template if isinstance(each, dict)}
    return {}


def _tokens(files: Files, names: Mapping[str, int], config: Mapping[str, Any], text: str) -> frozenset[str] | None:
    """Return the structural tokens of the tokenizer; its large file is read only if the text mentions others."""
    added = config.get("added_tokens_decoder")
    known = set(_contents(added.values())) if isinstance(added, dict) else set()
    known |= _json(files, names, "added_tokens.json").keys()
    if all(token in known for token in STRUCTURAL_TOKENS if token in text):
        return frozenset(known.intersection(STRUCTURAL_TOKENS)) if known or "tokenizer.json" in names else None
    document = _json(files, names, "tokenizer.json")
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(document.get("added_tokens"), list):
        known |= set(_contents(document["added_tokens"]))
    if isinstance(vocabulary, dict):
        known |= vocabulary.keys() & set(STRUCTURAL_TOKENS)
    return frozenset(known.intersection(STRUCTURAL_TOKENS)) if known else None


def _contents(tokens: Iterable[object]) -> list[str]:
    return [content for token in tokens if isinstance(content := _content(token), str)]


def _content(token: object) -> object:
    """Return the text of a token, which the file writes as a text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _json(files: Files, names: Mapping[str, int], name: str) -> Mapping[str, Any]:
    """Return a JSON object; empty if the file is missing, too large or invalid: the engine reports that better."""
    if not 0 < names.get(name, 0) <= _MAX_TOKENIZER_BYTES:
        return {}
    try:
        document = json.loads(files.read(name))
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
