"""The parts of the store that need no hub: progress, and the volume's troubles in words."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from shoehorn.common import mounts
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.hub.files import ModelFile
from shoehorn.hub.transfer import partial_path, stored_bytes
from shoehorn.model.reference import ModelRef
from shoehorn.store import locks, pull
from support.pulling import MODEL, Volume


def test_whole_and_partial_files_count_and_none_above_its_size(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    files = [ModelFile(name, 10, "") for name in ("whole", "sub/partial", "absent", "too long")]
    (tmp_path / "whole").write_bytes(bytes(10))
    partial_path(tmp_path / "sub/partial").write_bytes(bytes(4))
    (tmp_path / "too long").write_bytes(bytes(50))
    assert stored_bytes(tmp_path, files) == 24


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
    found = mounts.find_mount(user.models, table)
    assert found
    assert found.local_locks == named
    monkeypatch.setattr(mounts, "find_mount", lambda _folder: found)
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
    with locks.only_writer(user.models, MODEL), locks.only_writer(user.models, "owner/other"):
        names = sorted(path.name for path in (user.models / ".shoehorn" / "locks").iterdir())
    assert names == ["owner--other.lock", f"{MODEL.replace('/', '--')}.lock"]
