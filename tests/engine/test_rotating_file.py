"""Size limit of the engine's log file."""

from __future__ import annotations

from pathlib import Path

from shoehorn.engine.rotating_file import RotatingFile


def test_log_file_is_rotated_at_its_maximum_size(tmp_path: Path) -> None:
    log_file = RotatingFile(tmp_path / "engine.log", limit_bytes=1000)
    for number in range(200):
        log_file.write(f"line {number:03} 鞋")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.log", "engine.log.1"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2000
    assert (tmp_path / "engine.log").read_text().endswith("line 199 鞋\n")
