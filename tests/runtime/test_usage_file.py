"""Used tokens in the volume: months, merging, damage."""

from __future__ import annotations

import json
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shoehorn.common.errors import SettingsError
from shoehorn.runtime.usage_file import Account, Usage, UsageFiles, day_of, renewal, total

ALICE = Account("2026-11-28", "alice", "m")
ONE = Usage(1, 10, 5)


def moment(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def test_figures_are_added_by_month_and_survive(tmp_path: Path) -> None:
    files = UsageFiles(tmp_path / "usage")
    assert files.months() == []
    assert files.read("2026-11") == {}
    files.add({ALICE: ONE, ALICE._replace(day="2026-12-01"): Usage(1, 1, 1)})
    changed = files.add({ALICE: ONE, ALICE._replace(key="bob"): ONE})
    again = UsageFiles(tmp_path / "usage")
    assert again.read("2026-11") == {ALICE: Usage(2, 20, 10), ALICE._replace(key="bob"): ONE} == changed["2026-11"]
    assert again.read("2026-12") == {ALICE._replace(day="2026-12-01"): Usage(1, 1, 1)}
    assert again.months() == ["2026-11", "2026-12"]
    assert stat.S_IMODE((tmp_path / "usage" / "2026-11.json").stat().st_mode) == 0o600


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    threads = [threading.Thread(target=lambda: [UsageFiles(tmp_path).add({ALICE: ONE}) for _ in range(5)])
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert UsageFiles(tmp_path).read("2026-11") == {ALICE: Usage(20, 200, 100)}


def test_damaged_file_is_reported_at_every_length_and_never_overwritten(tmp_path: Path) -> None:
    files = UsageFiles(tmp_path)
    files.add({ALICE: ONE, ALICE._replace(key="bob"): ONE})
    file = tmp_path / "2026-11.json"
    whole = file.read_text()
    row = json.loads(whole)["usage"][0]
    changed = [json.dumps({"version": 1, "usage": [{**row, **change}]}) for change in (
        {"prompt_tokens": -1}, {"requests": True}, {"completion_tokens": "5"}, {"day": "2026-12-01"})]
    for text in [*(whole[:length] for length in range(0, len(whole) - 2, 7)), "[]", '{"version": 2}', *changed]:
        file.write_text(text)
        with pytest.raises(SettingsError, match="damaged"):
            files.add({ALICE: ONE})
        assert file.read_text() == text


@pytest.mark.parametrize(("now", "day", "month"), [
    ("2026-11-28T23:59:59", "2026-11-29T00:00:00", "2026-12-01T00:00:00"),
    ("2026-12-31T00:00:00", "2027-01-01T00:00:00", "2027-01-01T00:00:00"),
    ("2028-02-28T12:00:00", "2028-02-29T00:00:00", "2028-03-01T00:00:00")])
def test_days_and_months_of_utc_begin(now: str, day: str, month: str) -> None:
    assert renewal("day", moment(now)) == moment(day)
    assert renewal("month", moment(now)) == moment(month)


def test_totals_are_of_the_day_and_the_month() -> None:
    now = moment("2026-11-28T01:00:00")
    assert day_of(now) == "2026-11-28"
    content = {ALICE: ONE, ALICE._replace(day="2026-11-27"): ONE, ALICE._replace(model="n"): ONE}
    assert total(content, "day", now) == {("alice", "m"): ONE, ("alice", "n"): ONE}
    assert total(content, "month", now) == {("alice", "m"): ONE + ONE, ("alice", "n"): ONE}
