"""Names of variables that are one typing error away from the name of a setting.

Rules: case and underscores do not count; a typing error is one character inserted, left out, replaced or exchanged with
its neighbour; short names have no near ones, since other programs use them.
"""

from __future__ import annotations

from collections.abc import Iterable

_SHORTEST = 6
"""Letters of a name below which one other letter makes another word: PORT and POST."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the first of the known names that is one typing error away; "" if none is."""
    typed = _letters(name)
    return next((each for each in known if len(_letters(each)) >= _SHORTEST and _is_near(typed, _letters(each))), "")


def _letters(name: str) -> str:
    return name.replace("_", "").replace("-", "").upper()


def _is_near(left: str, right: str) -> bool:
    """Return whether two texts are equal or one typing error apart."""
    if len(left) > len(right):
        left, right = right, left
    if len(right) - len(left) > 1:
        return False
    start = next((index for index, letter in enumerate(left) if letter != right[index]), len(left))
    rest, other = left[start:], right[start:]
    if len(left) < len(right):
        return rest == other[1:]
    return rest[1:] == other[1:] or (rest[:2] == other[:2][::-1] and rest[2:] == other[2:])
