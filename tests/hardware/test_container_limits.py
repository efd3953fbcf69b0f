"""Shared and locked memory of the container."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from shoehorn.common import disk
from shoehorn.common.errors import SettingsError
from shoehorn.common.units import MIB
from shoehorn.hardware import container_limits


@pytest.mark.fault("Docker's default of 64 MiB of shared memory", "Exit code 2 with a remedy, before a download.")
def test_too_little_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk, "disk_free", lambda _path: 64 * MIB)
    with pytest.raises(SettingsError) as caught:
        container_limits.check_shared_memory(tmp_path)
    assert caught.value.code == "shared_memory_too_small"
    assert "--shm-size" in caught.value.remedy
    monkeypatch.setattr(disk, "disk_free", lambda _path: 160 * MIB)
    container_limits.check_shared_memory(tmp_path)


@pytest.mark.parametrize(("soft", "limit"), [(resource.RLIM_INFINITY, None), (8 * MIB, 8 * MIB), (0, 0)])
def test_limit_of_locked_memory_is_read(monkeypatch: pytest.MonkeyPatch, soft: int, limit: int | None) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (soft, soft))
    assert container_limits.locked_memory_limit() == limit
