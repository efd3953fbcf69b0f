"""Time that a division of the model over machines spends on the network, against measured and computed figures."""

from __future__ import annotations

import pytest

from fakes import captured
from shoehorn.model import checkpoint
from shoehorn.planner.network import Crossing, Link, parse_link, seconds, with_network

MODEL = checkpoint.read(captured.files("deepseek-r1-distill-llama-70b"))
LAYERS, MATRICES = {"batch_1": 17.6, "batch_8": 141.0}, {"batch_1": 31.1, "batch_8": 248.8}
"""Expected rates of the 70B in INT4 on two RTX 4090 of one machine."""


@pytest.mark.parametrize(("link", "layers", "matrices", "prefill"), [
    ("1Gbit", (17.5, 135), (9.7, 31), (2.3, 185)), ("10Gbit", (17.6, 140), (19.8, 121), (0.23, 18)),
    ("25Gbit", (17.6, 141), (22.6, 158), (0.09, 7.5)), ("100Gbit", (17.6, 141), (29.4, 225), (0.023, 1.87)),
])
def test_rates_over_links(link: str, layers: tuple[float, float], matrices: tuple[float, float],
                          prefill: tuple[float, float]) -> None:
    by_layers, by_matrices = Crossing(1), Crossing(1, machines=2)
    for planned, crossing, expected in ((LAYERS, by_layers, layers), (MATRICES, by_matrices, matrices)):
        rates = with_network(planned, parse_link(link), MODEL, crossing)
        assert tuple(rates.values()) == pytest.approx(expected, rel=.05)
    assert [seconds(parse_link(link), MODEL, each, 8192) for each in (by_layers, by_matrices)] == pytest.approx(
        prefill, rel=.05)


def test_unknown_rate_stays_unknown() -> None:
    assert with_network({"batch_1": None, "batch_8": None}, parse_link("1Gbit"), MODEL, Crossing(1)) == {
        "batch_1": None, "batch_8": None}


def test_round_trip_is_usual_or_named() -> None:
    assert parse_link("2.5Gbit:0.3ms") == Link(2.5e9, pytest.approx(3e-4))
    assert parse_link("100 Mbit/s").round_trip_seconds == 150e-6


@pytest.mark.parametrize("text", ["fast", "1", "1GB", "0Gbit", "1Gbit:", "-1Gbit"])
def test_invalid_link(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate like"):
        parse_link(text)
