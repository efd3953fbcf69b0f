"""Calibration texts of the package: size, and that no test or benchmark is measured on them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from shoehorn.int4.calibration import text

HOME = Path(__file__).resolve().parents[2]
WORDS = 12


def windows(document: str) -> set[str]:
    """All runs of WORDS words, or of twice as many characters in scripts without spaces."""
    words = re.findall(r"\w", document) if not re.search(r"[a-z]{3}", document) else re.findall(r"\w+", document)
    length = WORDS if re.search(r"[a-z]{3}", document) else 2 * WORDS
    return {" ".join(words[start:start + length]) for start in range(len(words) - length + 1)}


def packaged() -> set[str]:
    return set().union(*(windows(path.read_text(encoding="utf-8")) for path in text.files(None)))


def test_texts_have_every_kind_and_fit_into_a_megabyte() -> None:
    paths = text.files(None)
    assert [path.name for path in paths] == ["chat.jsonl", "chinese.txt", "code.txt", "english.txt"]
    assert sum(path.stat().st_size for path in paths) <= 1_000_000
    assert (text.PACKAGED / "SOURCES").read_text(encoding="utf-8").count("\n") > 5


def test_windows_find_a_shared_passage() -> None:
    passage = "one two three four five six seven eight nine ten eleven twelve"
    assert windows(f"before {passage} after") & windows(f"other words {passage}")


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md", "docs/gateway.md", "docs/reliability.md",
                                  "docs/int4.md"])
def test_no_text_of_the_quality_measurements_is_calibrated_on(name: str) -> None:
    assert not packaged() & windows((HOME / name).read_text(encoding="utf-8"))


def test_no_prompt_of_the_demo_is_calibrated_on() -> None:
    conversations = [json.loads(line)["messages"] for line in (text.PACKAGED / "chat.jsonl").read_text(
        encoding="utf-8").splitlines()]
    demo = (HOME / "demo").rglob("*.*")
    corpus = "\n".join(path.read_text(encoding="utf-8") for path in demo if path.suffix in (".py", ".txt", ".jsonl"))
    assert not [turn for messages in conversations for turn in messages if turn["content"] in corpus]
