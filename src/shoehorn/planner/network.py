"""Network between the machines of a cluster, and the time that a division of the model spends on it.

Rules: a pipeline sends the activations of its tokens once for every two stages on different machines; matrices divided
over machines add up their results twice in every layer, and once for the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from shoehorn.model.shape import ModelShape

PREFILL_TOKENS, PREFILL_SECONDS = 8192, 2.0
"""Prompt, and the time that the network may add to it where matrices are divided over machines."""

_GOODPUT = 0.94
"""Share of an Ethernet link that carries data, as TCP with usual frames reaches it."""

_ROUND_TRIPS = ((100e9, 5e-6), (25e9, 35e-6), (10e9, 50e-6), (0.0, 150e-6))
"""Bits a second, and the usual round trip of a network at least as fast: RDMA from 100 Gbit/s on, TCP below."""

_TEXT = re.compile(r"(\d+(?:\.\d+)?) ?([MG])bit(?:/s)?(?::(\d+(?:\.\d+)?) ?(us|ms))?", re.IGNORECASE)


@dataclass(frozen=True)
class Link:
    """Connection between two machines: bits a second, and seconds of a round trip."""

    bits_per_second: float
    round_trip_seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Bytes of data that it carries in a second."""
        return self.bits_per_second / 8 * _GOODPUT

    @property
    def text(self) -> str:
        """Rate and round trip, for people."""
        return f"{self.bits_per_second / 1e9:g} Gbit/s, round trip {self.round_trip_seconds * 1e6:g} us"


@dataclass(frozen=True)
class Crossing:
    """Division of a model over machines.

    Attributes:
        boundaries: pairs of neighbouring stages on different machines.
        machines: over which matrices are divided; 1 where they are divided within each machine only.
        width: bytes of an activation.
    """

    boundaries: int
    machines: int = 1
    width: int = 2


def parse_link(text: str) -> Link:
    """Parse 1Gbit, 10Gbit or 25Gbit:35us, with the round trip after a colon. Raises ValueError."""
    match = _TEXT.fullmatch(text.strip())
    rate = float(match[1]) * {"M": 1e6, "G": 1e9}[match[2].upper()] if match else 0.0
    if not match or not rate:
        raise ValueError(f"{text!r} is not a rate like 1Gbit, 10Gbit or 25Gbit:35us")
    usual = next(seconds for least, seconds in _ROUND_TRIPS if rate >= least)
    return Link(rate, float(match[3]) * {"us": 1e-6, "ms": 1e-3}[match[4].lower()] if match[3] else usual)


def seconds(link: Link, shape: ModelShape, crossing: Crossing, tokens: int) -> float:
    """Return the time that one forward pass of that many tokens spends on the network."""
    activations = tokens * shape.hidden * crossing.width
    passing = 2 * activations / link.bytes_per_second + link.round_trip_seconds  # activations and the residual
    others = crossing.machines - 1
    if not others:
        return crossing.boundaries * passing
    sums = 2 * shape.layers + 1
    return sums * (activations * 2 * others / crossing.machines / link.bytes_per_second + 2 * link.round_trip_seconds)


def with_network(rates: Mapping[str, float | None], link: Link, shape: ModelShape, crossing: Crossing
                 ) -> dict[str, float | None]:
    """Return expected tokens per second (`batch_1`, `batch_8`) with the time on the network."""
    return {key: None if not (rate := rates.get(key)) else
            round(requests / (requests / rate + seconds(link, shape, crossing, requests)), 2)
            for key, requests in (("batch_1", 1), ("batch_8", 8))}
