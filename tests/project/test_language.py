"""The language lint: each rule finds its bad example and accepts its good one; every kind of text is covered."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
import yaml

from shoehorn.common.paths import HOME


def _load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("lint_language", HOME / "tools" / "lint_language.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


lint = _load()
PROSE = yaml.safe_load((HOME / "tools" / "language.yaml").read_text(encoding="utf-8"))["prose"]


@pytest.mark.parametrize("rule", PROSE, ids=lambda rule: rule["bad"])
def test_rule_finds_its_bad_example_and_accepts_its_good_one(rule: dict[str, str]) -> None:
    assert any(message.endswith(f"use {rule['say']}") for message in lint.check_prose(rule["bad"]))
    assert lint.check_prose(rule["good"]) == []


@pytest.mark.parametrize("text", ["The file `mend` is data.", "a 24 GB card", "graphics cards"])
def test_code_spans_and_sold_sizes_are_accepted(text: str) -> None:
    assert lint.check_prose(text) == []


@pytest.mark.parametrize(("docstring", "findings"), [
    ("What the plan needs.", 1), ("Whether the file is complete.", 1), ("How many GPUs there are.", 1),
    ("Return the plan.", 0), ("The plan of one start.", 0), ("", 0)])
def test_docstring_opens_with_verb_or_noun(docstring: str, findings: int) -> None:
    assert len(lint.check_opening(docstring)) == findings


@pytest.mark.parametrize("source", [
    '"""What a module is for."""\n', "x = 1  # a mend of the loader\n", 'raise ValueError("the card is full")\n',
    'def f(x):\n    return f"{x} is no origin"\n', "def test_it_goes_on():\n    pass\n", "found = 1\n",
    "def f(made):\n    pass\n", "class Wish:\n    pass\n"])
def test_each_part_of_a_python_file_is_checked(source: str) -> None:
    assert len(list(lint.check_python(source))) == 1


@pytest.mark.parametrize("source", [
    "card = 1\n", 'x = {"card": 1}\n', "x = 'the card'  # language: quoted from vLLM's log\n", "print(result.found)\n"])
def test_names_keys_and_quotations_are_accepted(source: str) -> None:
    assert list(lint.check_python(source)) == []


def test_code_blocks_of_markdown_are_accepted() -> None:
    assert list(lint.check_lines("```\nthe card\n```\nthe card\n")) == [(4, "'card': use GPU")]


def test_covered_files_include_code_documents_and_settings() -> None:
    names = lint.files()
    assert {"README.md", "Makefile", "Dockerfile", "src/shoehorn/cli.py", "gateway/page/index.html",
            "monitoring/prometheus/rules.yml"} <= set(names)
    assert not [name for name in names if re.search(r"tests/(golden|captures)/", name)]
