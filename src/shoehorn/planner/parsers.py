"""Choice of vLLM's parsers of thoughts and tool calls: from the user, or from architecture and chat template.

Rules:
- VLLM_EXTRA_ARGS wins over REASONING_PARSER and TOOL_CALL_PARSER, these over the profile, all of them over the tables;
- an unknown name is refused before anything is pulled, unless the user loads a plugin with parsers;
- a parser that the tokenizer cannot serve is not chosen, since the engine would not start;
- without a parser the reason says why, and the appliance refuses requests for what the model cannot do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoehorn.common.errors import SettingsError
from shoehorn.config import vllm_parsers
from shoehorn.config.vllm_parsers import AUTO, OFF
from shoehorn.model.chat_format import ChatFormat
from shoehorn.planner.inputs import PlanSettings
from shoehorn.planner.option_set import OptionSet
from shoehorn.planner.parser_table import (
    MISTRAL_TOKENIZER,
    OFF_BY_DEFAULT,
    REASONING,
    REASONING_TOKENS,
    TOOL_TOKENS,
    TOOLS,
    Format,
)
from shoehorn.planner.reasons import MODEL, SETTING

AUTO_TOOLS, HIDE_TOOLS = "enable-auto-tool-choice", "exclude-tools-when-tool-choice-none"
_COMBINED = "hf"
"""The parser that vLLM combines with no other."""

_TAGS = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
"""Tags of thoughts that a parser of `OFF_BY_DEFAULT` does not report to vLLM."""


@dataclass(frozen=True)
class _Kind:
    """Thoughts or tool calls: vLLM's options, the setting, the table of formats and the tokens of each parser."""

    option: vllm_parsers.Option
    plugin: str
    setting: str
    what: str
    table: tuple[Format, ...]
    tokens: Mapping[str, tuple[str, ...]]


_THOUGHTS = _Kind("reasoning-parser", "reasoning-parser-plugin", "REASONING_PARSER", "thoughts", REASONING,
                  REASONING_TOKENS)
_CALLS = _Kind("tool-call-parser", "tool-parser-plugin", "TOOL_CALL_PARSER", "tool calls", TOOLS, TOOL_TOKENS)


def apply_settings(options: OptionSet, settings: PlanSettings) -> OptionSet:
    """Set the parsers that REASONING_PARSER and TOOL_CALL_PARSER name, or none where they are `off`."""
    for kind, value in ((_THOUGHTS, settings.reasoning_parser), (_CALLS, settings.tool_call_parser)):
        if value == OFF:
            options = options.drop(kind.option, SETTING, "parser-off", setting=kind.setting).fix(kind.option)
        elif value != AUTO:
            options = options.set_by_user(kind.option, value, setting=kind.setting)
    return options


def choose(options: OptionSet, architecture: str, chat: ChatFormat | None) -> OptionSet:
    """Check the parsers that the user named, and choose the others.

    Args:
        options: after all options of the user.
        chat: None for a model without conversations, or if its files were not read.

    Raises:
        SettingsError: an unknown parser, or tools without one.
    """
    for kind in (_THOUGHTS, _CALLS):
        options = _checked(options, kind)
        if chat and kind.option not in options.values and kind.option not in options.fixed:
            options = _derived(options, kind, architecture, chat)
    options = _combined(options)
    if options.values.get(_THOUGHTS.option) in OFF_BY_DEFAULT and "reasoning-config" not in options.values:
        options = options.set("reasoning-config", dict(_TAGS), MODEL, "thought-tags")
    return _with_auto_tools(options)


def _checked(options: OptionSet, kind: _Kind) -> OptionSet:
    """Check a parser that the user named."""
    nested = options.values.get("structured-outputs-config")
    if kind is _THOUGHTS and kind.option not in options.values and isinstance(nested, dict) and \
            nested.get("reasoning_parser"):  # an older place of the same option
        options = options.set_by_user(kind.option, nested["reasoning_parser"],
                                      setting="reasoning_parser of structured-outputs-config")
    if kind.option not in options.values:
        return options
    name, reason = str(options.values[kind.option]), options.reasons[kind.option]
    if not name:  # vLLM's own way to write none
        return options.without(kind.option).fix(kind.option)
    if name not in vllm_parsers.names(kind.option) and not options.values.get(kind.plugin):
        where = reason.params.get("setting", f"Profile {reason.params.get('profile')}")
        raise SettingsError(f"{where}: --{kind.option}: {vllm_parsers.unknown(kind.option, name)}.",
                            f"Set it to one of {', '.join(vllm_parsers.names(kind.option))}; or remove it, and the "
                            "plan chooses a parser.", code="unknown_parser")
    return options


def _derived(options: OptionSet, kind: _Kind, architecture: str, chat: ChatFormat) -> OptionSet:
    """Choose a parser by the table, or none with the reason."""
    rows = (MISTRAL_TOKENIZER, *kind.table) if chat.mistral_tokenizer and not chat.shows_tools else kind.table
    row = next((each for each in rows if each.matches(architecture, chat)), None)
    has_own_template = row is not None and row.own_template
    if kind is _CALLS and not chat.shows_tools and not has_own_template:
        return options.drop(kind.option, MODEL, "tools-not-shown" if chat.text else "no-chat-template")
    if row is None and kind is _THOUGHTS:
        code = "no-thoughts" if "think>" not in chat.text else "parser-unknown"
        return options.drop(kind.option, MODEL, code if chat.text else "no-chat-template", what=kind.what,
                            setting=kind.setting)
    if row is None:
        return options.drop(kind.option, MODEL, "parser-unknown", what=kind.what, setting=kind.setting)
    facts = {"family": row.family, "evidence": row.evidence}
    if not row.parser:
        return options.drop(kind.option, MODEL, "parser-missing", **facts)
    missing = next((token for token in kind.tokens.get(row.parser, ())
                    if chat.tokens is not None and token not in chat.tokens and not has_own_template), None)
    if missing:
        return options.drop(kind.option, MODEL, "parser-no-token", token=missing, parser=row.parser, **facts)
    return options.set(kind.option, row.parser, MODEL, "parser-format", **facts)


def _combined(options: OptionSet) -> OptionSet:
    """Leave out a derived parser next to `hf`, which the user set.

    Raises:
        SettingsError: the user set `hf` and another one.
    """
    names = {kind.option: options.values.get(kind.option) for kind in (_THOUGHTS, _CALLS)}
    if _COMBINED not in names.values() or not set(names.values()) - {_COMBINED, None}:
        return options
    other = next(option for option, name in names.items() if name != _COMBINED)
    if other in options.fixed or options.source_of(other) != MODEL:
        raise SettingsError("REASONING_PARSER and TOOL_CALL_PARSER: the parser hf cannot be combined with others.",
                            "Set both to hf, or one of them to off.", code="contradicting_parsers")
    return options.drop(other, MODEL, "parser-not-combined")


def _with_auto_tools(options: OptionSet) -> OptionSet:
    """Switch tool calls on where there is a parser; vLLM ignores the parser otherwise.

    A request with `tool_choice: none` does not show its tools to the model, which would call them.
    """
    parser, switch = options.values.get(_CALLS.option), options.values.get(AUTO_TOOLS)
    if parser and switch is not False and HIDE_TOOLS not in options.values:
        options = options.set(HIDE_TOOLS, True, MODEL, "tools-hidden")
    if parser and switch is None:
        return options.set(AUTO_TOOLS, True, MODEL, "parser-needs-auto")
    if parser and not switch:
        return options.drop(_CALLS.option, SETTING, "parser-switched-off")
    if switch and not parser:
        reason = options.reasons[AUTO_TOOLS]
        where = reason.params.get("setting", f"Profile {reason.params.get('profile')}")
        raise SettingsError(f"{where}: --{AUTO_TOOLS}: no parser of tool calls is known for this model.",
                            "Set TOOL_CALL_PARSER to the name of a parser, or remove the option.",
                            code="tool_parser_missing")
    return options
