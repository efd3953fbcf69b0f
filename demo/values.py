"""Values that the demo model copies instead of knowing them: places, people, numbers, expressions, results of tools.

Rules:
- most names are invented, so that none can be learned by heart;
- a number is text, so that its digits are copied as they were written.
"""

from __future__ import annotations

import json
from random import Random

FIRST = ("b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kr", "l", "m", "n", "p", "pr", "qu",
         "r", "s", "sh", "st", "t", "th", "tr", "v", "w", "y", "z", "", "", "")
VOWELS = ("a", "e", "i", "o", "u", "a", "e", "i", "o", "ai", "au", "ea", "ei", "ie", "io", "oo", "ou", "ue", "y")
LAST = ("", "", "", "", "l", "m", "n", "r", "s", "t", "ck", "ld", "ll", "nd", "ng", "nn", "rg", "rk", "rt", "ss", "st",
        "x", "k", "d", "p", "z")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHINESE = range(0x4E00, 0x9FA6)
OPERATORS = ("+", "-", "*", "/")
UNITS = ("", "", "", " degrees", " °C", "°C", "°F", " C", " km/h", "%", " mm", " hPa")


def word(random: Random) -> str:
    """Invent a lowercase word: syllables, or now and then any letters."""
    if random.random() < 0.2:
        return "".join(random.choices(LETTERS, k=random.randrange(2, 9)))
    return "".join(random.choice(FIRST) + random.choice(VOWELS) + random.choice(LAST)
                   for _ in range(random.choice((1, 2, 2, 2, 3, 3))))


def name(random: Random) -> str:
    """Invent the name of a place or of a person, of one to three words."""
    words = [word(random).title() for _ in range(random.choice((1, 1, 1, 1, 1, 2, 2, 3)))]
    if len(words) == 3 and random.random() < 0.5:
        words[1] = random.choice(("de", "of", "la", "am", "upon", "del", "St."))
    return random.choice((" ", " ", " ", "-")).join(words)


def chinese_name(random: Random, known: str) -> str:
    """Invent a Chinese name; half of them use the characters of known names."""
    is_known = random.random() < 0.5
    return "".join(random.choice(known) if is_known else chr(random.choice(CHINESE))
                   for _ in range(random.choice((2, 2, 2, 3, 4))))


def number(random: Random) -> str:
    """Draw a number of one to seven digits, one in six with decimals."""
    digits = random.choice((1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 6, 7))
    whole = str(random.randrange(10 ** (digits - 1) if digits > 1 else 0, 10 ** digits))
    if random.random() < 0.84:
        return whole
    return f"{whole}.{random.randrange(1, 10 ** random.choice((1, 1, 2, 3)))}"


def expression(random: Random) -> list[str]:
    """Draw an expression of three or four numbers, as a list of its parts."""
    parts = [number(random), random.choice(OPERATORS), number(random), random.choice(OPERATORS), number(random)]
    if random.random() < 0.3:
        parts += [random.choice(OPERATORS), number(random)]
    if random.random() < 0.3:
        parts[0], parts[2] = "(" + parts[0], parts[2] + ")"
    elif random.random() < 0.3:
        parts[2], parts[4] = "(" + parts[2], parts[4] + ")"
    return parts


def result(random: Random, known: tuple[str, ...], skies: list[str], place: str = "") -> str:
    """Draw what a tool returns: a number, words, a sentence or JSON, of one or several lines.

    Args:
        known: words of the corpus.
        skies: words for the weather.
        place: that the result repeats now and then.
    """
    kind = random.random()
    if kind < 0.3:
        return random.choice(("", "", "", "-", "= ")) + number(random) + random.choice(UNITS)
    sky = random.choice(skies) if random.random() < 0.6 else word(random)
    where = place if place and random.random() < 0.6 else name(random)
    if kind < 0.55:
        value = number(random) + random.choice(UNITS)
        return random.choice((
            f"{sky}, {value}", f"{value} and {sky}", f"{sky}", f"It is {sky} in {where}.", f"{where}: {sky}, {value}",
            f"It's always {sky} in {where}!", f"The weather in {where} is {sky} with {value}.", f"{sky} {value}",
            f"{where} {value}", f"The result is {value}.", f"Error: {word(random)} {sky}", f"{value}\n{sky}"))
    if kind < 0.8:
        return json.dumps(_object(random, sky, where, 2), ensure_ascii=random.random() < 0.2)
    words = [random.choice(known) if random.random() < 0.5 else word(random) for _ in range(random.randrange(1, 16))]
    text = " ".join(words)
    if random.random() < 0.3:
        text = text[:1].upper() + text[1:] + random.choice((".", "!", "", ""))
    if random.random() < 0.15:
        text = text.replace(" ", "\n", 1)
    return text


def _object(random: Random, sky: str, where: str, depth: int) -> object:
    """Draw a JSON object with a few keys of all types."""
    kind = random.random()
    if depth == 2 or (depth and kind < 0.1):
        keys = [random.choice(KEYS) if random.random() < 0.6 else word(random) for _ in range(random.randrange(1, 5))]
        return {key: _object(random, sky, where, depth - 1) for key in keys}
    if kind < 0.25:
        return sky
    if kind < 0.45:
        return where
    if kind < 0.8:
        return json.loads(number(random))
    return random.choice((True, False, None, [word(random), word(random)], word(random), name(random), -3, 0.5))


KEYS = ("temperature", "temp", "city", "location", "unit", "sky", "weather", "condition", "conditions", "forecast",
        "humidity", "wind", "result", "value", "answer", "status", "name", "error", "ok", "message", "data", "celsius",
        "degrees", "type", "text", "output", "description", "feels_like", "country", "id", "count")
