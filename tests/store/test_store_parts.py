"""The parts of the store that need no hub: progress, and the volume's troubles in words."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest

from shoehorn.common import disk, mounts
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.common.progress import Meter, Progress, reported
from shoehorn.hub.files import ModelFile
from shoehorn.hub.transfer import bytes_there, partial_path
from shoehorn.model.reference import ModelRef
from shoehorn.store import locks, pull
from support.pulling import MODEL, Volume


def test_progress_only_rises_and_never_passes_the_total() -> None:
    now = iter(range(100))
    meter = Meter("pulling", 100, lambda: next(now))
    assert [meter.at(done).bytes_done for done in (0, 50, 20, 60, 1000, 0)] == [0, 50, 50, 60, 100, 100]


def test_the_rate_is_that_of_the_last_seconds() -> None:
    now = [0.0]
    meter = Meter("pulling", 10**9, lambda: now[0])
    assert meter.at(1000).rate_bytes_per_second == 0, "what was there before does not count"
    rates = []
    for second in range(1, 31):
        now[0] = float(second)
        rates.append(meter.at(1000 + 100 * min(second, 15)).rate_bytes_per_second)
    assert rates[10] == 100
    assert rates[19] == 50
    assert rates[29] == 0, "a stall shows"


def test_a_phase_is_reported_at_its_start_meanwhile_and_at_its_end() -> None:
    seen: list[Progress] = []
    done = 0
    with reported("verifying", 10, lambda: done, seen.append, period_seconds=0.01):
        end = time.monotonic() + 60
        while len(seen) < 5 and time.monotonic() < end:
            time.sleep(0.01)
        meanwhile = len(seen)
        done = 10
    assert (seen[0].bytes_done, seen[-1].bytes_done) == (0, 10)
    assert meanwhile > 4


def test_a_phase_that_fails_is_not_reported_as_done() -> None:
    seen: list[Progress] = []
    with pytest.raises(FileNotFoundError), reported("pulling", 10, lambda: len(seen), seen.append):
        Path("/nowhere/at/all").stat()
    assert [progress.bytes_done for progress in seen] == [0]


def test_whole_and_partial_files_count_and_none_above_its_size(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    files = [ModelFile(name, 10, "") for name in ("whole", "sub/partial", "absent", "too long")]
    (tmp_path / "whole").write_bytes(bytes(10))
    partial_path(tmp_path / "sub/partial").write_bytes(bytes(4))
    (tmp_path / "too long").write_bytes(bytes(50))
    assert bytes_there(tmp_path, files) == 24


@pytest.mark.parametrize(("number", "words", "remedy"), [
    (errno.ENOSPC, "is full", "larger volume"), (errno.EDQUOT, "is full", "larger volume"),
    (errno.EROFS, "read-only", "without :ro"), (errno.EACCES, "cannot be written by user", "sudo chown -R"),
    (errno.EPERM, "cannot be written by user", "sudo chown -R"), (errno.EIO, "fails", "Check the disk")])
@pytest.mark.fault("Volume read-only, full, failing, over its quota", "One message that says what to type.")
def test_trouble_with_the_volume_is_told_in_words(number: int, words: str, remedy: str) -> None:
    told = disk.trouble(Path("/models"), OSError(number, os.strerror(number), "/models/x"))
    assert words in told.cause
    assert remedy in told.remedy


@pytest.mark.fault("Volume not mounted", "Told; no folder is made in its place.")
def test_an_absent_volume_is_not_made_up(tmp_path: Path) -> None:
    user = Volume(tmp_path)
    user.models.rmdir()
    with pytest.raises(ModelUnavailableError, match="does not exist") as refusal:
        user.pull_here()
    assert "Mount a volume" in refusal.value.remedy
    assert not user.models.exists()


def test_a_volume_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    user = Volume(tmp_path)
    (user.models / ".shoehorn").touch()  # stands in the way, for root too
    with pytest.raises(ModelUnavailableError, match=str(user.models)):
        user.pull_here()


@pytest.mark.fault("Volume without locks", "Refused by name.")
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ModelUnavailableError, match="has no locks"):
        Volume(tmp_path).pull_here()


@pytest.mark.parametrize(("kind", "options", "named"), [
    ("nfs", "rw,vers=3,nolock,local_lock=all", "nolock"), ("nfs4", "rw,vers=4.1,local_lock=flock", "local_lock=flock"),
    ("cifs", "rw,nobrl", "nobrl"), ("nfs4", "rw,vers=4.2,local_lock=none", ""), ("ext4", "rw", "")])
@pytest.mark.fault("Volume on NFS or CIFS whose locks hold on one machine only", "Refused by name.")
def test_a_network_volume_without_true_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str,
                                                        options: str, named: str) -> None:
    user, table = Volume(tmp_path), tmp_path / "mountinfo"
    table.write_text("22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
                     f"40 22 0:50 /export {str(user.models).replace('-', chr(92) + '055')} rw,relatime - {kind} "
                     f"server:/export {options}\n")
    found = mounts.of(user.models, table)
    assert found
    assert found.local_locks == named
    monkeypatch.setattr(mounts, "of", lambda _folder: found)
    if not named:
        with locks.only_writer(user.models, MODEL):
            return
    with pytest.raises(ModelUnavailableError, match=f"{kind} volume mounted with {named}"), \
            locks.only_writer(user.models, MODEL):
        pass


def test_a_disk_error_while_checking_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locate(_models_dir: Path, _ref: ModelRef) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/models/owner/tiny")

    monkeypatch.setattr(pull, "locate", locate)
    with pytest.raises(ModelUnavailableError, match="Input/output error"):
        pull.pull(Volume(tmp_path).settings, lambda _: None)


def test_locks_of_different_models_do_not_meet(tmp_path: Path) -> None:
    user = Volume(tmp_path)
    with locks.only_writer(user.models, MODEL):
        user.environment["MODEL_ID"] = "owner/other"
        with locks.only_writer(user.models, MODEL):
            names = sorted(path.name for path in (user.models / ".shoehorn" / "locks").iterdir())
    assert names == ["owner--other.lock", f"{MODEL.replace('/', '--')}.lock"]
