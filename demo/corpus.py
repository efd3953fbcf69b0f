"""Training text of the demo model: the files in `text/`, read into frozen dataclasses.

Rules:
- `text/around.yaml` contains phrases around a question, `text/tools.yaml` questions for tools; every other file a list
  of topics;
- a topic has, per language, one `answer`, a `keyword` that only this answer contains, questions for training (`ask`)
  and questions excluded from the training to measure it (`held_out`), one per line;
- a line is a pattern: `[a|b|]` means `a`, `b` or nothing (no nesting), and `{thing}` a line of `things`;
- `share` (default 1) is the relative frequency of the topic;
- a question equal to a held-out one, ignoring case, spaces and punctuation, is never used for training.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import yaml

TEXT = Path(__file__).parent / "text"
LANGUAGES = ("en", "zh")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Phrases:
    """One topic in one language. `slots` maps the name of a slot to its values."""

    answer: str
    keyword: str
    ask: tuple[str, ...]
    held_out: tuple[str, ...]
    slots: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Topic:
    """One topic that the model can talk about."""

    name: str
    share: int
    phrases: dict[str, Phrases]


@dataclass(frozen=True)
class Around:
    """Phrases before and after a question, and around a conversation, in one language.

    Attributes:
        again: requests for the last answer again.
        translate: requests for the last answer in the other language.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    systems: tuple[str, ...]
    held_out_systems: tuple[str, ...]
    again: tuple[str, ...]
    translate: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """The content of `text/`, and the held-out questions in normalized form."""

    topics: tuple[Topic, ...]
    around: dict[str, Around]
    kept_out: frozenset[str]


def load(folder: Path = TEXT) -> Corpus:
    """Read all files.

    Raises:
        KeyError, ValueError: a file has an invalid format.
    """
    topics = tuple(_topic(entry) for path in sorted(folder.glob("*.yaml")) if path.stem not in ("around", "tools")
                   for entry in yaml.safe_load(path.read_text(encoding="utf-8")))
    around = yaml.safe_load((folder / "around.yaml").read_text(encoding="utf-8"))
    kept_out = frozenset(bare(question) for topic in topics for phrases in topic.phrases.values()
                         for question in held_out_questions(phrases))
    return Corpus(topics, {language: _around(around[language]) for language in LANGUAGES}, kept_out)


def draw(pattern: str, slots: dict[str, tuple[str, ...]], random: Random) -> str:
    """Draw one of the texts of a pattern."""
    text = _CHOICE.sub(lambda choice: random.choice(choice[1].split("|")), pattern)
    return _tidy(_SLOT.sub(lambda slot: random.choice(slots[slot[1]]), text))


def all_of(pattern: str, slots: dict[str, tuple[str, ...]]) -> list[str]:
    """Return every text of a pattern; slots are filled in turn, not in every combination."""
    parts = _CHOICE.split(pattern)
    choices = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    texts = []
    for combination in product(*choices):
        text = "".join(combination)
        slot = _SLOT.search(text)
        for value in slots[slot[1]] if slot else ("",):
            texts.append(_tidy(_SLOT.sub(lambda _, value=value: value, text)))
    return texts


def held_out_questions(phrases: Phrases) -> list[str]:
    """Return the held-out questions of one topic in one language, with patterns and slots filled."""
    return [text for pattern in phrases.held_out for text in all_of(pattern, phrases.slots)]


def bare(text: str) -> str:
    """Normalize a text for comparison: without case, spaces and punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in folded if letter.isalnum()) or folded


def _tidy(text: str) -> str:
    return re.sub(r" +", " ", text).strip()


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _topic(entry: dict[str, Any]) -> Topic:
    phrases = {language: _phrases(entry[language]) for language in LANGUAGES}
    for one in phrases.values():
        if one.keyword not in one.answer:
            raise ValueError(f"topic {entry['topic']}: the answer lacks its keyword {one.keyword!r}")
    return Topic(entry["topic"], entry.get("share", 1), phrases)


def _phrases(entry: dict[str, str]) -> Phrases:
    slots = {"thing": _lines(entry.get("things", "")), "held_out_thing": _lines(entry.get("held_out_things", ""))}
    return Phrases(entry["answer"].strip(), entry["keyword"], _lines(entry["ask"]), _lines(entry["held_out"]), slots)


def _around(entry: dict[str, str]) -> Around:
    return Around(**{name: _lines(entry[name]) for name in Around.__dataclass_fields__})
