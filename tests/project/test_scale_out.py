"""The simulation of many machines: seeded, close to the closed form, and shown as it was written."""

from __future__ import annotations

import json

import pytest

import scale_out
from scale_out import Fleet, expected_capacity, simulate


def test_seed_determines_the_outcome() -> None:
    assert simulate(Fleet(20, 2), 300, 7) == simulate(Fleet(20, 2), 300, 7)
    assert simulate(Fleet(20, 2), 300, 7) != simulate(Fleet(20, 2), 300, 8)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_lost_capacity_agrees_with_the_closed_form(group: int) -> None:
    fleet = Fleet(100, group, mtbf_days=3.0)
    lost = 1 - simulate(fleet, 365, 1).capacity
    assert lost == pytest.approx(1 - expected_capacity(fleet), rel=0.05)


def test_losses_are_as_frequent_as_the_machines_say() -> None:
    assert simulate(Fleet(100, 1), 3650, 1).losses_per_day == pytest.approx(100 / 30, rel=0.05)


def test_machine_that_is_never_lost_costs_nothing() -> None:
    outcome = simulate(Fleet(10, 5, mtbf_days=1e9), 100, 1)
    assert (outcome.capacity, outcome.least_capacity, outcome.losses_per_day) == (1.0, 1.0, 0.0)


def test_remaining_machines_form_no_group() -> None:
    assert Fleet(100, 8).groups == 12


def test_document_shows_the_result() -> None:
    rows = json.loads(scale_out.RESULT.read_text(encoding="utf-8"))["rows"]
    assert scale_out.table(rows) in scale_out.DOCUMENT.read_text(encoding="utf-8")
