"""Stored bytes of a download."""

from __future__ import annotations

from pathlib import Path

from shoehorn.hub.files import ModelFile
from shoehorn.hub.transfer import partial_path, stored_bytes


def test_complete_and_partial_files_count_up_to_their_size(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    files = [ModelFile(name, 10, "") for name in ("whole", "sub/partial", "absent", "too long")]
    (tmp_path / "whole").write_bytes(bytes(10))
    partial_path(tmp_path / "sub/partial").write_bytes(bytes(4))
    (tmp_path / "too long").write_bytes(bytes(50))
    assert stored_bytes(tmp_path, files) == 24
