"""Priorities of requests: keys that used fewer tokens of late come first (start-time fair queueing).

Each key has a position: the tokens that its requests have taken since the server was last idle. A request gets the
position of its key as its priority (lower is earlier) and moves the key on by its expected tokens, corrected by the
real ones. So the requests of a flood have ever later positions, and a single request of another key precedes most.

Rules:
- a key without running requests starts where the earliest running request is, so that it neither saves up time nor
  waits for tokens that others used before it came;
- what a key used while it was ahead of others is forgotten by half in each minute of its absence;
- the requests of one key keep their order;
- no I/O; the time is an argument.

Source: Goyal, Vin, Cheng, Start-time Fair Queueing, SIGCOMM 1996; Sheng et al., Fairness in Serving Large Language
Models, OSDI 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ANSWER_TOKENS = 256
"""Expected tokens of an answer; a smaller maximum of the request is expected instead."""

HALF_LIFE_SECONDS = 60.0

_BYTES_PER_TOKEN = 4
_MAXIMA = ("max_completion_tokens", "max_tokens", "max_output_tokens")


def expected_tokens(body: bytes, document: Mapping[str, Any] | None, sequences: int) -> int:
    """Estimate the tokens of a request, at least 1: from its length, and its maximum of each of its answers."""
    maxima = [value for name in _MAXIMA if isinstance(value := (document or {}).get(name), int)]
    return max(1, len(body) // _BYTES_PER_TOKEN + sequences * max(0, min([ANSWER_TOKENS, *maxima])))


class Turn:
    """The place of one request in the order.

    Attributes:
        priority: for the engine's scheduler; lower is earlier.
    """

    def __init__(self, share: _KeyShare, priority: int, expected: int) -> None:
        self.priority = priority
        self._share, self._expected, self._used = share, expected, 0

    def add(self, tokens: int) -> None:
        """Count processed tokens; those beyond the expected ones move the key on."""
        beyond = max(0, self._used - self._expected)
        self._used += tokens
        self._share.position += max(0, self._used - self._expected) - beyond

    @property
    def unused(self) -> int:
        """Expected tokens that were not processed."""
        return max(0, self._expected - self._used)


@dataclass
class _KeyShare:
    position: float = 0.0
    turns: set[Turn] = field(default_factory=set)
    left_at: float = 0.0


class FairShare:
    """The order of all requests of one server."""

    def __init__(self) -> None:
        self._shares: dict[str, _KeyShare] = {}

    def begin(self, key: str, expected: int, now: float) -> Turn:
        """Give a request its place.

        Args:
            expected: its tokens (`expected_tokens`).
            now: monotonic seconds.
        """
        running = [turn.priority for share in self._shares.values() for turn in share.turns]
        if not running:
            self._shares.clear()  # an idle server owes nothing to anybody
        share = self._shares.setdefault(key, _KeyShare())
        earliest = min(running, default=0)
        if share.turns:
            place = max(share.position, max(turn.priority for turn in share.turns))
        else:
            ahead = max(0.0, share.position - earliest)
            place = earliest + ahead * 0.5 ** ((now - share.left_at) / HALF_LIFE_SECONDS)
        turn = Turn(share, round(place), expected)
        share.position = place + expected
        share.turns.add(turn)
        return turn

    def end(self, key: str, turn: Turn, now: float) -> None:
        """Take a request out, and give back what it did not use."""
        share = self._shares[key]
        share.turns.remove(turn)
        share.position = max(0.0, share.position - turn.unused)
        share.left_at = now
