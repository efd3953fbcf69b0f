"""Atomic replacement of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoehorn.common.atomic_file import write_atomic


def test_file_is_replaced_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_atomic(path, "old", 0o644)
    write_atomic(path, "new", 0o600)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


@pytest.mark.fault("Disk full while state or keys are written", "The old file stays complete.")
def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    write_atomic(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
