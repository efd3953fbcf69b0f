"""Errors carry a cause, a remedy, a stable code and an exit code."""

from __future__ import annotations

import pytest

from shoehorn.common.errors import (
    DoesNotFitError,
    EngineFailedError,
    ModelUnavailableError,
    SettingsError,
    ShoehornError,
)

CLASSES = (ShoehornError, SettingsError, DoesNotFitError, ModelUnavailableError, EngineFailedError)


def test_each_class_has_its_own_exit_code_and_default_code() -> None:
    assert [each.exit_code for each in CLASSES] == [1, 2, 3, 4, 5]
    assert len({each("Model: invalid.").code for each in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize("kind", CLASSES)
def test_code_of_one_error_replaces_the_default_of_its_class(kind: type[ShoehornError]) -> None:
    assert kind("Volume: disk full.", code="disk_full").code == "disk_full"
    assert kind("Volume: disk full.").code == kind.code


def test_text_shows_the_remedy_below_the_cause() -> None:
    assert str(SettingsError("PORT: invalid.", "Set PORT.")) == "PORT: invalid.\n  -> Set PORT."
    assert str(SettingsError("PORT: invalid.")) == "PORT: invalid."
