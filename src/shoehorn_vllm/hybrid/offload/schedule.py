"""Which matrices of a forward pass are streamed to the GPU, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """Passes of up to `tokens` tokens stream this share of the bytes (0 to 1), and the CPU multiplies the rest."""

    tokens: int
    streamed: float


def streamed_share(levels: Sequence[Level], tokens: int) -> float:
    """Share of the bytes that a pass of that many tokens streams: everything beyond the last level.

    Args:
        levels: by ascending tokens.
    """
    return next((level.streamed for level in levels if tokens <= level.tokens), 1.0)


def select(sizes: Sequence[int], share: float) -> list[int]:
    """Choose numbers of matrices, evenly over the pass, whose bytes come closest to a share of all; at least one."""
    chosen, done, target = [], 0.0, 0.0
    for number, size in enumerate(sizes):
        target += size * share
        if target - done >= size / 2:
            chosen.append(number)
            done += size
    return chosen or [max(range(len(sizes)), key=lambda number: sizes[number])]


def following(count: int, streamed: Sequence[int], depth: int) -> list[list[int]]:
    """For each matrix the streamed ones from it on, in the order of the pass and over into the next pass.

    Args:
        count: number of matrices.
        streamed: numbers of the streamed ones, ascending.
        depth: matrices on the GPU at a time. A streamed matrix is followed by as many, as far as there are others.
    """
    result = []
    for number in range(count):
        begin = next((place for place, each in enumerate(streamed) if each >= number), 0)
        ahead = depth + (streamed[begin] == number)
        result.append([streamed[(begin + step) % len(streamed)] for step in range(min(ahead, len(streamed)))])
    return result
