"""Disk space of the served model: files that are already in the volume count as available."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoehorn.common import disk
from shoehorn.deployment import served_model
from shoehorn.model.reference import ModelRef

REF = ModelRef("a/b", "modelscope", "master")


@pytest.mark.parametrize(("ref", "expected"), [(REF, 1000 + 10), (REF.converted, 1000 + 10 + 20)])
def test_partial_pull_and_conversion_count_as_available(ref: ModelRef, expected: int, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "disk_free", lambda path: 1000)
    for each, size in ((REF, 10), (REF.converted, 20)):
        folder = each.directory(tmp_path)
        folder.mkdir(parents=True)
        (folder / "part.safetensors").write_bytes(bytes(size))
    assert served_model.available_bytes(tmp_path, ref) == expected


def test_model_that_is_not_in_the_volume_is_fetched_in_its_steps(tmp_path: Path) -> None:
    assert served_model.fetch_steps(tmp_path, REF) == ("pull",)
    assert served_model.fetch_steps(tmp_path, REF.converted) == ("pull", "convert")
