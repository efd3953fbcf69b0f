"""`shoehorn keys usage`."""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shoehorn.commands import keys as command
from shoehorn.common.errors import SettingsError
from shoehorn.config.models_dir import ModelsDir
from shoehorn.runtime.usage_file import Account, Usage, UsageFiles

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp()


@pytest.fixture(autouse=True)
def _time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)


def call(home: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words), {"MODELS_DIR": str(home), "RUN_DIR": str(home), "MODEL_ID": "a/b"})


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a volume with the keys alice, with budgets, and bob, and usage of three days and a revoked key."""
    call(tmp_path, "add", "alice", "--tokens-per-day", "1000", "--tokens-per-month", "5000000000")
    call(tmp_path, "add", "bob")
    UsageFiles(ModelsDir(tmp_path).usage).add({
        Account("2026-10-31", "alice", "m"): Usage(1, 1, 1), Account("2026-11-01", "alice", "m"): Usage(2, 20, 10),
        Account("2026-11-28", "alice", "m"): Usage(3, 300, 200), Account("2026-11-27", "gone", "n"): Usage(1, 7, 0)})
    return tmp_path


def test_usage_of_this_month_by_key_and_model_with_budgets(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert call(home, "usage") == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["since", "2026-11-01", "(UTC)"], ["KEY", "MODEL", "REQUESTS", "TOKENS", "IN", "TOKENS", "OUT"],
        ["alice", "m", "5", "320", "210"], ["gone", "n", "1", "7", "0"], [],
        ["KEY", "BUDGET", "USED", "RENEWED"],
        ["alice", "1000", "a", "day", "500", "(50%)", "2026-11-29", "00:00Z"],
        ["alice", "5000000000", "a", "month", "530", "(0%)", "2026-12-01", "00:00Z"]]


@pytest.mark.parametrize(("since", "first", "alice"), [
    ("2026-10-31", "2026-10-31", [6, 321, 211]), ("2026-11-28", "2026-11-28", [3, 300, 200]),
    ("1d", "2026-11-28", [3, 300, 200]), ("4w", "2026-11-01", [5, 320, 210]), ("0d", "2026-11-28", [3, 300, 200])])
def test_usage_since_a_day_as_json(home: Path, since: str, first: str, alice: list[int],
                                   capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert call(home, "usage", "--since", since, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["since"] == first
    [row] = [row for row in document["usage"] if row["key"] == "alice"]
    assert row == {"key": "alice", "model": "m", "requests": alice[0], "prompt_tokens": alice[1],
                   "completion_tokens": alice[2]}
    assert document["budgets"][0] == {"key": "alice", "period": "day", "limit": 1000, "used": 500,
                                      "renewed": NOW + 43200}, "whatever --since says"


@pytest.mark.parametrize("since", ["yesterday", "7", "2026-13-01", "7h", "-1d", "2026-11"])
def test_invalid_since_is_rejected(home: Path, since: str) -> None:
    with pytest.raises(SettingsError, match=r"--since.*invalid") as caught:
        call(home, "usage", f"--since={since}")
    assert "7d" in caught.value.remedy


def test_usage_without_any_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, "usage") == 0
    assert capsys.readouterr().err == "no usage since 2026-11-01 (UTC)\n"


def test_damaged_usage_file_is_an_error(home: Path) -> None:
    (ModelsDir(home).usage / "2026-11.json").write_text("{")
    with pytest.raises(SettingsError, match="damaged"):
        call(home, "usage")
