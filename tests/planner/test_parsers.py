"""Parsers of thoughts and tool calls: the choice for every family, the user's choice, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes import chat_templates
from fakes.chat_templates import ALWAYS, CASES, HERMES, LLAMA, R1, template
from shoehorn.common.errors import SettingsError
from shoehorn.config import profiles, settings, vllm_parsers
from shoehorn.model.chat_format import STRUCTURAL_TOKENS, ChatFormat
from shoehorn.planner import parser_table
from shoehorn.planner.build import make_plan
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from shoehorn.planner.plan import Plan
from support.plans import CPU_ONLY, reason, tiny

REASONING, TOOLS, SWITCH = "reasoning-parser", "tool-call-parser", "enable-auto-tool-choice"


def planned(chat: ChatFormat, architecture: str = "LlamaForCausalLM", engine: dict[str, object] | None = None,
            **environment: str) -> Plan:
    profile = profiles.load("cpu")
    profile = replace(profile, engine={**profile.engine, **(engine or {})})
    plan = make_plan(PlanInputs(PlanSettings.of(settings.load(environment)), CPU_ONLY, profile,
                                replace(tiny(), architecture=architecture), chat=chat))
    assert isinstance(plan, Plan)
    return plan


def parsers(plan: Plan) -> tuple[object, object]:
    """The two parsers, "" for none."""
    return plan.engine_args.get(REASONING, ""), plan.engine_args.get(TOOLS, "")


@pytest.mark.parametrize("name", CASES)
def test_family_gets_its_parsers_and_a_reason(name: str) -> None:
    case = CASES[name]
    plan = planned(chat_templates.read(case.template), case.architecture)
    assert parsers(plan) == (case.reasoning, case.tools)
    assert plan.engine_args.get(SWITCH, False) is bool(case.tools)
    for option in (REASONING, TOOLS):
        value, source, code = reason(plan, option)
        assert (value or "", source) == (plan.engine_args.get(option, ""), "model")
        assert (code == "parser-format") is bool(value)


def test_at_least_25_families_and_every_parser_of_the_table_exist() -> None:
    families = {row.family for row in (*parser_table.REASONING, *parser_table.TOOLS) if row.parser}
    assert len(families) >= 25
    for option, rows, tokens in ((REASONING, parser_table.REASONING, parser_table.REASONING_TOKENS),
                                 (TOOLS, parser_table.TOOLS, parser_table.TOOL_TOKENS)):
        assert {row.parser for row in rows if row.parser} | tokens.keys() <= set(vllm_parsers.names(option))
        assert {token for each in tokens.values() for token in each} <= set(STRUCTURAL_TOKENS)


def test_every_row_is_the_first_match_of_a_family() -> None:
    rows = set()
    for case in CASES.values():
        chat = chat_templates.read(case.template)
        for table in (parser_table.REASONING, parser_table.TOOLS):
            rows |= {next((row for row in table if row.matches(case.architecture, chat)), None)}
    shared = {row.parser for row in rows if row}
    assert {row.parser for row in (*parser_table.REASONING, *parser_table.TOOLS)} - shared <= {
        "deepseek_v41", "hy_v3", "hy_v4", "k2_horizon", "kimi_k3", "inkling", "plamo3", "muse_glimmer", "dots",
        "granite_thinking_parser", "minicpmv", "minicpm5"}


def test_a_parser_that_the_tokenizer_cannot_serve_is_not_chosen() -> None:
    plan = planned(chat_templates.read(template(LLAMA, ALWAYS), tokens=("<think>",)))
    assert parsers(plan) == ("", "")
    assert reason(plan, REASONING)[2] == reason(plan, TOOLS)[2] == "parser-no-token"


def test_an_unreadable_tokenizer_proves_nothing_against_a_parser() -> None:
    chat = replace(chat_templates.read(template(LLAMA, ALWAYS)), tokens=None)
    assert parsers(planned(chat)) == ("deepseek_r1", "llama3_json")


def test_mistrals_own_tokenizer_needs_no_template() -> None:
    chat = chat_templates.read("", tekken__json="{}", SYSTEM_PROMPT__txt="Think in [THINK] and [/THINK].")
    assert parsers(planned(chat, "MistralForCausalLM")) == ("mistral", "mistral")


def test_thoughts_on_request_report_their_tags() -> None:
    plan = planned(chat_templates.read(CASES["DeepSeek V3.1"].template), "DeepseekV3ForCausalLM")
    assert plan.engine_args["reasoning-config"] == {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
    assert plan.thinking_switch == "thinking"


def test_settings_override_the_table() -> None:
    chat = chat_templates.read(template(HERMES, ALWAYS))
    assert parsers(planned(chat, REASONING_PARSER="off", TOOL_CALL_PARSER="off")) == ("", "")
    plan = planned(chat, REASONING_PARSER="qwen3", TOOL_CALL_PARSER="xlam")
    assert parsers(plan) == ("qwen3", "xlam")
    assert reason(plan, TOOLS) == ("xlam", "setting", "set")
    assert plan.engine_args[SWITCH] is True
    assert parsers(planned(chat_templates.read(template(R1)), TOOL_CALL_PARSER="auto")) == ("", "deepseek_v3")


def test_arguments_win_over_settings_and_these_over_a_profile() -> None:
    chat = chat_templates.read(template(HERMES, ALWAYS))
    assert parsers(planned(chat, engine={REASONING: "olmo3", TOOLS: "jamba"})) == ("olmo3", "jamba")
    assert parsers(planned(chat, engine={TOOLS: "jamba"}, TOOL_CALL_PARSER="off"))[1] == ""
    assert parsers(planned(chat, TOOL_CALL_PARSER="off", VLLM_EXTRA_ARGS="--tool-call-parser xlam"))[1] == "xlam"


@pytest.mark.parametrize(("name", "value"), [("REASONING_PARSER", "deepseek-r1"), ("TOOL_CALL_PARSER", "hermess"),
                                             ("TOOL_CALL_PARSER", "On")])
def test_unknown_name_of_a_setting_lists_the_names(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}: unknown parser '{value}'.*hermes|deepseek_r1"):
        settings.load({name: value})


@pytest.mark.parametrize(("engine", "environment", "where"), [
    ({}, {"VLLM_EXTRA_ARGS": "--reasoning-parser deepseek-r1"}, "VLLM_EXTRA_ARGS"),
    ({}, {"VLLM_EXTRA_ARGS": "--tool-call-parser hermess"}, "VLLM_EXTRA_ARGS"),
    ({REASONING: "deepseek-r1"}, {}, "Profile cpu"),
    ({}, {"VLLM_EXTRA_ARGS": '--structured-outputs-config {"reasoning_parser":"deepseek-r1"}'.replace('"', '\\"')},
     "structured-outputs-config")])
def test_unknown_name_elsewhere_is_refused_by_the_plan(engine: dict[str, object], environment: dict[str, str],
                                                      where: str) -> None:
    with pytest.raises(SettingsError, match=f"{where}.*did you mean") as caught:
        planned(ChatFormat(), engine=engine, **environment)
    assert caught.value.code == "unknown_parser"


def test_parser_of_a_plugin_is_not_checked() -> None:
    plan = planned(ChatFormat(), VLLM_EXTRA_ARGS="--tool-call-parser mine --tool-parser-plugin /mine.py")
    assert parsers(plan)[1] == "mine"


def test_tools_can_be_switched_off_by_vllms_own_option() -> None:
    plan = planned(chat_templates.read(template(HERMES)), VLLM_EXTRA_ARGS="--no-enable-auto-tool-choice")
    assert TOOLS not in plan.engine_args
    assert reason(plan, TOOLS)[2] == "parser-switched-off"


def test_tools_without_a_parser_are_refused() -> None:
    with pytest.raises(SettingsError) as caught:
        planned(chat_templates.read(template()), VLLM_EXTRA_ARGS="--enable-auto-tool-choice")
    assert caught.value.code == "tool_parser_missing"


def test_parser_hf_is_combined_with_no_other() -> None:
    chat = chat_templates.read(template(HERMES, ALWAYS))
    assert parsers(planned(chat, REASONING_PARSER="hf")) == ("hf", "")
    with pytest.raises(SettingsError) as caught:
        planned(chat, REASONING_PARSER="hf", TOOL_CALL_PARSER="hermes")
    assert caught.value.code == "contradicting_parsers"
