"""Free and used disk space."""

from __future__ import annotations

from pathlib import Path

from shoehorn.common import disk


def test_free_space_of_a_missing_folder_is_that_of_its_nearest_parent(tmp_path: Path) -> None:
    assert disk.disk_free(tmp_path / "not" / "yet") > 0


def test_used_space_is_the_sum_of_all_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "part").write_bytes(b"123")
    (tmp_path / "a" / "whole").write_bytes(b"4567")
    assert disk.disk_used(tmp_path / "a") == 7
    assert disk.disk_used(tmp_path / "missing") == 0
