"""Waits of the engine program and their test variable."""

from __future__ import annotations

import pytest

from shoehorn.common.errors import SettingsError
from shoehorn.engine import timing
from shoehorn.engine.timing import Timing


def test_defaults_hold_without_the_variable() -> None:
    assert timing.load({}) == Timing()


def test_variable_replaces_named_waits_only() -> None:
    loaded = timing.load({"SHOEHORN_TIMING": '{"quiet": 2, "backoff": 0.1}'})
    assert loaded == Timing(quiet=2.0, backoff=0.1)
    assert loaded.restart_delay(3) == pytest.approx(0.4)


@pytest.mark.parametrize("text", ["{", "[]", '{"quite": 1}', '{"quiet": "1"}', '{"quiet": 0}', '{"quiet": true}',
                                  '{"quiet": NaN}'])
def test_invalid_variable_is_refused_by_name(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^SHOEHORN_TIMING: ") as caught:
        timing.load({"SHOEHORN_TIMING": text})
    assert "worker_grace" in caught.value.remedy
