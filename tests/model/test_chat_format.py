"""Reading of chat templates and tokenizers: where templates are, what a hostile or broken one does, and tokens."""

from __future__ import annotations

import json

import pytest

from fakes import chat_templates
from fakes.chat_templates import ALWAYS, OFF, ON, MemoryFiles, template
from shoehorn.model import chat_format
from shoehorn.model.chat_format import ChatFormat, Thinking

TOOLS = "<tool_call>{}</tool_call>"


@pytest.mark.parametrize("files", [
    {"chat_template__jinja": template(TOOLS, ALWAYS)},
    {"tokenizer_config__json": json.dumps({"chat_template": template(TOOLS, ALWAYS)})},
    {"chat_template__json": json.dumps({"chat_template": template(TOOLS, ALWAYS)})},
    {"chat_template__jinja": template("", ALWAYS), "additional_chat_templates/tool_use__jinja": template(TOOLS)},
    {"tokenizer_config__json": json.dumps({"chat_template": [
        {"name": "default", "template": template("", ALWAYS)}, {"name": "tool_use", "template": template(TOOLS)}]})}])
def test_template_is_found_wherever_published(files: dict[str, str]) -> None:
    chat = chat_format.read(MemoryFiles(**files))
    assert (chat.shows_tools, chat.thinking, "<tool_call>" in chat.text) == (True, Thinking.ALWAYS, True)


def test_template_of_the_user_replaces_the_checkpoint_s() -> None:
    files = MemoryFiles(chat_template__jinja=template("", ALWAYS))
    assert chat_format.read(files, template(TOOLS)).shows_tools
    assert chat_format.read(files, template(TOOLS)).thinking is Thinking.NEVER


@pytest.mark.parametrize(("prompt", "thinking", "switch"), [
    (ON, Thinking.ON, "enable_thinking"), (OFF, Thinking.OFF, "thinking"), (ALWAYS, Thinking.ALWAYS, ""),
    ("<think></think>", Thinking.NEVER, ""), ("", Thinking.NEVER, "")])
def test_switch_and_default_are_what_the_prompt_shows(prompt: str, thinking: Thinking, switch: str) -> None:
    chat = chat_templates.read(template("", prompt))
    assert (chat.thinking, chat.switch) == (thinking, switch)


@pytest.mark.parametrize("text", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 9999999999 }}", "{{ 9 ** 99999999 }}", "{{ [0] * 9999999 * 9999 }}", "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__ }}", "{% if %}", "{{ messages[7].content.x }}", "{{ 1 / 0 }}", "{{ undefined.x.y }}",
    "{{ messages | tojson(indent='x') | int + [] }}"])
def test_hostile_or_broken_template_shows_nothing(text: str) -> None:
    chat = chat_templates.read("{{ bos_token }}<think>" + text)
    assert (chat.shows_tools, chat.thinking) == (False, Thinking.NEVER)


@pytest.mark.parametrize("text", [
    "{{ strftime_now('%d %b %Y') }}", "{% generation %}{% endgeneration %}",
    "{% for a in [1] %}{% break %}{% endfor %}",
    "{{ messages[0].content[0].text }}", "{% if messages[0].role != 'system' %}{{ raise_exception('x') }}{% endif %}"])
def test_peculiar_templates_render(text: str) -> None:
    assert chat_templates.read(text + template(TOOLS)).shows_tools


def test_tokenizer_is_read_for_tokens_that_its_configuration_lacks() -> None:
    text = template("<tool_calls></tool_calls>", ALWAYS)
    files = {"chat_template__jinja": text, "tokenizer__json": json.dumps(
        {"added_tokens": [{"content": "<think>"}], "model": {"vocab": {"</think>": 1, "x": 2}}})}
    assert chat_format.read(MemoryFiles(**files)).tokens == {"<think>", "</think>"}
    assert chat_format.read(MemoryFiles(chat_template__jinja=text)).tokens is None
    assert chat_format.read(MemoryFiles(chat_template__jinja=text, tokenizer__json="{broken")).tokens is None


def test_a_folder_without_any_of_the_files_has_no_conversations() -> None:
    assert chat_format.read(MemoryFiles(config__json="{}")) == ChatFormat()
