"""Disk space: measuring, waiting, monitoring; errors of the models volume."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from shoehorn.common import disk
from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.errors import ModelUnavailableError


def test_free_space_of_a_missing_folder_is_that_of_its_nearest_parent(tmp_path: Path) -> None:
    assert disk.disk_free(tmp_path / "not" / "yet") > 0


def test_used_space_is_the_sum_of_all_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "part").write_bytes(b"123")
    (tmp_path / "a" / "whole").write_bytes(b"4567")
    assert disk.disk_used(tmp_path / "a") == 7
    assert disk.disk_used(tmp_path / "missing") == 0


def test_full_disk_is_logged_once_and_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    free, probed = tmp_path / "free", list[Path]()
    free.mkdir()

    def write(path: Path, text: str) -> None:
        probed.append(path.parent)
        if path.parent == tmp_path and probed.count(tmp_path) < 4:
            raise OSError(28, "No space left on device")
        write_atomic(path, text)

    monkeypatch.setattr(disk, "write_atomic", write)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    disk.wait_for_free_space(tmp_path, free, tmp_path / "absent")
    assert probed.count(tmp_path) == 4
    assert [(record.levelname, str(tmp_path) in record.getMessage()) for record in caplog.records] == [("ERROR", True)]
    assert list(tmp_path.iterdir()) == [free]


@pytest.mark.parametrize(("number", "code", "remedy"), [
    (errno.ENOSPC, "disk_full", "larger volume"), (errno.EDQUOT, "disk_full", "larger volume"),
    (errno.EROFS, "volume_read_only", "without :ro"), (errno.EACCES, "volume_permission_denied", "sudo chown -R"),
    (errno.EPERM, "volume_permission_denied", "sudo chown -R"), (errno.EIO, "volume_failed", "Check the disk")])
@pytest.mark.fault("Volume read-only, full, failing, over its quota", "One error with a remedy.")
def test_error_of_the_volume_has_a_code_and_a_remedy(tmp_path: Path, number: int, code: str, remedy: str) -> None:
    error = disk.volume_error(tmp_path, OSError(number, os.strerror(number), f"{tmp_path}/x"))
    assert error.code == code
    assert str(tmp_path) in error.cause
    assert remedy in error.remedy


def test_too_little_free_space_is_an_error_before_writing(tmp_path: Path) -> None:
    disk.require_space(tmp_path, 1)
    with pytest.raises(ModelUnavailableError) as caught:
        disk.require_space(tmp_path, 1 << 60)
    assert caught.value.code == "volume_too_small"


def test_free_space_is_monitored_every_few_seconds(tmp_path: Path) -> None:
    now, checks = [0.0], list[float]()

    def remaining_bytes() -> int:
        checks.append(now[0])
        return 1

    monitor = disk.FreeSpaceMonitor(tmp_path, remaining_bytes, lambda: now[0])
    for now[0] in (1.0, 4.9, 5.0, 9.9, 10.0):
        monitor.check()
    assert checks == [5.0, 10.0]
