"""Questions that the demo model answers with a tool, drawn from `text/tools.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import values
import yaml
from corpus import TEXT, draw

KINDS = {"weather": 36, "arithmetic": 40, "two_cities": 7, "three_cities": 3, "two_sums": 5, "both": 5,
         "both_reversed": 4}
BEFORE = {"en": ("please ", "Please, ", "hey, ", "So ", "Can you help me: ", "Hi! ", "OK, ", "I want to know ", "now "),
          "zh": ("请问", "请", "麻烦", "你好，", "嗨，", "我想知道", "我想查一下", "能告诉我", "帮我查查")}
SLOTS = {name: ("{" + name + "}",) for name in ("city", "other", "third", "sum", "sum2", "person", "age", "a", "b")}


@dataclass(frozen=True)
class Need:
    """Something that a question needs a tool for: the weather of a place, or the parts of a sum (`12`, `*`, `7`)."""

    purpose: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question, and what it needs, in order."""

    text: str
    needs: tuple[Need, ...]


class ToolTexts:
    """Draws questions. `names` contains the names of tools and parameters."""

    def __init__(self, path: Path = TEXT / "tools.yaml") -> None:
        self._texts: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        self.names: dict[str, Any] = self._texts["tools"]

    def text(self, language: str, name: str) -> str:
        """Return one text."""
        return str(self._texts[language][name])

    def skies(self, language: str) -> list[str]:
        """Return words for the weather."""
        return list(self._texts[language]["skies"])

    def draw(self, language: str, random: Random) -> Question:
        """Draw a question."""
        kind = random.choices(list(KINDS), list(KINDS.values()))[0]
        return self._filled(random.choice(self._texts[language][kind].splitlines()), language, random)

    def again(self, language: str, random: Random) -> Question:
        """Draw a question that is about the weather only because the one before it was."""
        return self._filled(random.choice(self._texts[language]["again"].splitlines()), language, random)

    def person(self, language: str, random: Random) -> tuple[str, dict[str, object]]:
        """Draw a sentence about a person with a request for JSON. Returns it and its facts."""
        texts = self._texts[language]
        facts = {"person": self._place(language, random), "city": self._place(language, random),
                 "age": random.randrange(1, 100) if random.random() < 0.8 else random.randrange(1000)}
        lines = [draw(random.choice(texts["person"].splitlines()), SLOTS, random),
                 draw(random.choice(texts["ask_json"].splitlines()), SLOTS, random)]
        facts = {name: fact for name, fact in facts.items() if "{" + name + "}" in lines[0]}
        if random.random() < 0.3:
            lines.reverse()
        elif random.random() < 0.2:
            lines.pop()
        gap = random.choice((" ", " ", "\n")) if language == "en" else random.choice(("", "", "\n"))
        return _replaced(gap.join(lines), {name: str(value) for name, value in facts.items()}), facts

    def json(self, language: str, random: Random) -> tuple[str, str]:
        """Draw a question for JSON about a place. Returns it and the place."""
        city = self._place(language, random)
        pattern = random.choice(self._texts[language]["json"].splitlines())
        return _replaced(draw(pattern, SLOTS, random), {"city": city}), city

    def held_out(self, language: str, random: Random) -> list[Question]:
        """Return questions that are not used for training, with places that are not either."""
        texts = self._texts[language]
        places = [city.replace("_", " ") for city in texts["cities_held_out"].split()]
        questions = []
        for kind in ("weather_held_out", "arithmetic_held_out", "both_held_out", "two_cities"):
            for pattern in texts[kind].splitlines():
                for word, operator in random.sample(list(texts["words"].items()), 7):
                    city, other = random.sample(places, 2)
                    parts = (str(random.randrange(2, 1000)), operator, str(random.randrange(2, 1000)))
                    questions.append(_question(draw(pattern, SLOTS, random), {"city": city, "other": other}, {
                        "sum": (f"{parts[0]} {word} {parts[2]}", parts)}))
        return questions

    def _filled(self, pattern: str, language: str, random: Random) -> Question:
        text = _worn(draw(pattern, SLOTS, random), language, random)
        places = {slot: self._place(language, random) for slot in ("city", "other", "third")}
        if random.random() < 0.12:
            text = text.lower()
            places = {slot: place.lower() for slot, place in places.items()}
        return _question(text, places, {slot: self._sum(language, random) for slot in ("sum", "sum2")})

    def _sum(self, language: str, random: Random) -> tuple[str, tuple[str, ...]]:
        """Draw something to calculate. Returns its text and its parts."""
        texts = self._texts[language]
        if random.random() < 0.12:
            parts = values.expression(random)
            return random.choice((" ", " ", "")).join(parts), tuple(parts)
        a, b = values.number(random), values.number(random)
        word, operator = random.choice(list(texts["words"].items()))
        if random.random() < 0.25:
            pattern = draw(texts["verbs"][operator], SLOTS, random)
            return _replaced(pattern, {"a": a, "b": b}), (a, operator, b)
        gap = "" if not word[0].isalpha() and random.random() < 0.3 else " "
        if language == "zh" and random.random() < 0.4:
            gap = ""
        return f"{a}{gap}{word}{gap}{b}", (a, operator, b)

    def _place(self, language: str, random: Random) -> str:
        cities = self._texts[language]["cities"]
        kind = random.random()
        if kind < 0.2:
            return str(random.choice(cities.split())).replace("_", " ")
        if language == "zh" and kind < 0.85:
            return values.chinese_name(random, "".join(cities.split()))
        return values.name(random)


def _question(text: str, places: dict[str, str], sums: dict[str, tuple[str, tuple[str, ...]]]) -> Question:
    """Fill the slots of a text. The needs come in the order of the slots in the text."""
    slots = sorted((slot for slot in (*places, *sums) if "{" + slot + "}" in text),
                   key=lambda slot: text.index("{" + slot + "}"))
    needs = tuple(Need("weather", (places[slot],)) if slot in places else Need("sum", sums[slot][1]) for slot in slots)
    return Question(_replaced(text, {**places, **{slot: words for slot, (words, _) in sums.items()}}), needs)


def _replaced(text: str, slots: dict[str, str]) -> str:
    for slot, value in slots.items():
        text = text.replace("{" + slot + "}", value)
    return text.strip()


def _worn(text: str, language: str, random: Random) -> str:
    """Vary the first letter, the last mark, and words around a question."""
    if random.random() < 0.5:
        text = text[:1].upper() + text[1:]
    if random.random() < 0.2:
        text = random.choice(BEFORE[language]) + text
    if random.random() < 0.3:
        text = text.rstrip("?？.") + random.choice(("", "", ".", "!", "?", "？" if language == "zh" else "?"))
    if random.random() < 0.08:
        text += random.choice((" Thanks!", " please", ", please.", " Use the tools.") if language == "en"
                              else ("谢谢", "，谢谢！"))
    return text
