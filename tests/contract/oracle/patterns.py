"""Many numbered names as few patterns: `layers.{0-2,4-6}.mlp.experts.{0-127}.up_proj` stands for every combination.

The form is that of tests/captures/models, extended by lists of ranges.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

_RANGES = re.compile(r"\{([\d,-]+)\}")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")

Indices = tuple[int, ...]
Kind = TypeVar("Kind", bound=Hashable)


def compact(items: Iterable[tuple[str, Kind]]) -> dict[str, Kind]:
    """Patterns of all names, each with what its names have in common, in the order of first appearance."""
    groups: defaultdict[tuple[str, Kind], set[Indices]] = defaultdict(set)
    for name, kind in items:
        template = _NUMBER.sub("{}", name)
        groups[template, kind].add(tuple(int(number) for number in _NUMBER.findall(name)))
    patterns: dict[str, Kind] = {}
    for (template, kind), indices in groups.items():
        for ranges in _products(indices):
            pattern = template
            for part in ranges:
                pattern = pattern.replace("{}", part, 1)
            patterns[pattern] = kind
    return patterns


def expand(pattern: str) -> Iterator[str]:
    """Every name that a pattern stands for."""
    parts = _RANGES.split(pattern)
    choices = [[part] if number % 2 == 0 else _numbers(part) for number, part in enumerate(parts)]
    return ("".join(combination) for combination in itertools.product(*choices))


def expand_all(patterns: Mapping[str, Kind]) -> dict[str, Kind]:
    """Every name of all patterns."""
    return {name: kind for pattern, kind in patterns.items() for name in expand(pattern)}


def _products(indices: set[Indices]) -> Iterator[tuple[str, ...]]:
    """The tuples as products of ranges."""
    if not next(iter(indices)):
        yield ()
        return
    rests: defaultdict[int, set[Indices]] = defaultdict(set)
    for first, *rest in indices:
        rests[first].add(tuple(rest))
    firsts: defaultdict[frozenset[Indices], list[int]] = defaultdict(list)
    for first, rest in sorted(rests.items()):
        firsts[frozenset(rest)].append(first)
    for rest, numbers in firsts.items():
        for tail in _products(set(rest)):
            yield (_ranges(numbers), *tail)


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as ranges in braces; a single one as it is."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if len(numbers) == 1 else "{" + text + "}"


def _numbers(ranges: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += map(str, range(int(first), int(last or first) + 1))
    return numbers
