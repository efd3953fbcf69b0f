"""Units, files, restarts and logging."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

from shoehorn.common import disk, logging_config
from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.units import GIB, format_size, parse_size
from shoehorn.engine.log_file import EngineLog
from shoehorn.engine.restart_budget import LIMIT, WINDOW_SECONDS, Restarts
from shoehorn.engine.timing import Timing


@pytest.mark.parametrize(("text", "size"), [
    ("7GiB", 7 << 30), ("7 GiB", 7 << 30), ("7g", 7 << 30), ("8GB", 8 * 10**9), ("512m", 512 << 20),
    ("1.5gib", 3 << 29), ("1073741824", 1 << 30), ("2TB", 2 * 10**12), ("10 KiB", 10240)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "1e9", "7 GiBs", "seven"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write"):
        parse_size(text)


def test_sizes_are_written_in_binary_units() -> None:
    assert [format_size(size) for size in (7 * GIB, 512 << 20, 2048, 12)] == ["7.00 GiB", "512 MiB", "2 KiB", "12 B"]


def test_a_file_is_replaced_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_atomic(path, "old", 0o644)
    write_atomic(path, "new", 0o600)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


@pytest.mark.fault("Disk full while state or keys are written", "The old file stays whole.")
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    write_atomic(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_budget_is_used_up_by_failures_within_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic() + 10_000
    monkeypatch.setattr(time, "monotonic", lambda: now)
    path = tmp_path / "restarts.json"
    for number in range(1, LIMIT + 1):
        assert not Restarts(path).exhausted
        assert Restarts(path).record() == number
    assert Restarts(path).exhausted
    now += WINDOW_SECONDS + 1
    assert not Restarts(path).exhausted


@pytest.mark.fault("Record of restarts corrupt", "Counts as empty.")
def test_a_damaged_budget_counts_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "restarts.json"
    path.write_text("[1, ")
    assert not Restarts(path).exhausted


def test_the_pause_grows_and_is_bounded() -> None:
    assert [Timing().restart_delay(failures) for failures in (0, 1, 2, 3, 4, 50)] == [1, 1, 2, 4, 8, 30]


def test_json_logging_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logging_config.configure("json")
    logging.getLogger("engine").info("loading %s", "a\nb 鞋")
    record = json.loads(capsys.readouterr().out)
    assert (record["program"], record["level"], record["message"]) == ("engine", "INFO", "loading a\nb 鞋")
    logging.getLogger().handlers.clear()


def test_a_full_disk_is_waited_for_and_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    free, looked = tmp_path / "free", list[Path]()
    free.mkdir()

    def write(path: Path, text: str) -> None:
        looked.append(path.parent)
        if path.parent == tmp_path and looked.count(tmp_path) < 4:
            raise OSError(28, "No space left on device")
        write_atomic(path, text)

    monkeypatch.setattr(disk, "write_atomic", write)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    disk.wait_for(tmp_path, free, tmp_path / "absent")
    assert looked.count(tmp_path) == 4
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} is full, so nothing can be served. It goes on by itself once there is room."]
    assert list(tmp_path.iterdir()) == [free]


def test_the_engines_log_keeps_to_its_size(tmp_path: Path) -> None:
    written = EngineLog(tmp_path / "engine.log", most_bytes=1000)
    for number in range(200):
        written.write(f"line {number:03} 鞋")
    written.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.log", "engine.log.1"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2000
    assert (tmp_path / "engine.log").read_text().endswith("line 199 鞋\n")
