"""The counts of needed experts, with the memory of this process in the place of the GPU's."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from shoehorn_vllm.protocol import EXPERTS_FILE, MEMORY_DIR_VARIABLE
from shoehorn_vllm.telemetry import expert_lookups
from shoehorn_vllm.telemetry.expert_lookups import Lookups


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> Lookups:
    monkeypatch.setattr(expert_lookups, "get_accelerator_view_from_cpu_tensor", lambda tensor: tensor)
    return Lookups("cpu")


def test_layers_are_added_up_and_written_when_they_changed(lookups: Lookups, tmp_path: Path) -> None:
    file, rows = tmp_path / EXPERTS_FILE, [lookups.row(), lookups.row()]
    assert not lookups.write(file), "nothing was needed yet"
    assert not file.exists()
    for row, (needed, absent) in zip(rows, ((8, 3), (6, 0)), strict=True):
        row[0], row[1] = needed, absent
    assert lookups.write(file)
    assert json.loads(file.read_text()) == {"gpu": 11, "cpu": 3}
    assert not lookups.write(file)
    rows[0][0] += 1
    assert lookups.write(file)
    assert [path.name for path in tmp_path.iterdir()] == [EXPERTS_FILE]


def test_thread_survives_a_folder_that_is_replaced(lookups: Lookups, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_lookups, "PERIOD_S", 0.01)
    monkeypatch.setenv(MEMORY_DIR_VARIABLE, str(tmp_path / "later"))
    row = lookups.row()
    row[0] = 5
    lookups.start()
    time.sleep(0.05)
    (tmp_path / "later").mkdir()
    limit = time.monotonic() + 20
    while not (tmp_path / "later" / EXPERTS_FILE).exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert json.loads((tmp_path / "later" / EXPERTS_FILE).read_text()) == {"gpu": 5, "cpu": 0}
