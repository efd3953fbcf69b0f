"""Write lock of a model, and volumes on which it cannot be taken."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from shoehorn.common import mounts
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.model.reference import ModelRef
from shoehorn.store import locks, pull
from support.pulling import MODEL, Volume


@pytest.mark.fault("Volume not mounted", "An error; no folder is created in its place.")
def test_missing_volume_is_not_created(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    volume.models.rmdir()
    with pytest.raises(ModelUnavailableError) as caught:
        volume.pull_here()
    assert caught.value.code == "volume_not_found"
    assert "Mount a volume" in caught.value.remedy
    assert not volume.models.exists()


def test_unwritable_volume_is_named(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    (volume.models / ".shoehorn").touch()  # blocks the folder, for root too
    with pytest.raises(ModelUnavailableError, match=str(volume.models)):
        volume.pull_here()


@pytest.mark.fault("Volume without file locks", "An error that names the volume.")
def test_file_system_without_locks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ModelUnavailableError) as caught:
        Volume(tmp_path).pull_here()
    assert caught.value.code == "volume_no_locks"


@pytest.mark.parametrize(("kind", "options", "reason"), [
    ("nfs", "rw,vers=3,nolock,local_lock=all", "nolock"), ("nfs4", "rw,vers=4.1,local_lock=flock", "local_lock=flock"),
    ("cifs", "rw,nobrl", "nobrl"), ("nfs4", "rw,vers=4.2,local_lock=none", ""), ("ext4", "rw", "")])
@pytest.mark.fault("Volume on NFS or CIFS with machine-local locks", "An error that names the mount option.")
def test_network_volume_with_machine_local_locks_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str,
                                                             options: str, reason: str) -> None:
    volume, table = Volume(tmp_path), tmp_path / "mountinfo"
    table.write_text("22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
                     f"40 22 0:50 /export {str(volume.models).replace('-', chr(92) + '055')} rw,relatime - {kind} "
                     f"server:/export {options}\n")
    mount = mounts.find_mount(volume.models, table)
    assert mount
    assert mount.local_locks == reason
    monkeypatch.setattr(mounts, "find_mount", lambda _folder: mount)
    if not reason:
        with locks.write_lock(volume.models, MODEL):
            return
    with pytest.raises(ModelUnavailableError, match=f"{kind}.*{reason}") as caught, \
            locks.write_lock(volume.models, MODEL):
        pass
    assert caught.value.code == "volume_local_locks"


def test_disk_error_during_verification_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locate(_models_dir: Path, _ref: ModelRef) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/models/owner/tiny")

    monkeypatch.setattr(pull, "locate", locate)
    with pytest.raises(ModelUnavailableError, match="Input/output error") as caught:
        pull.pull(Volume(tmp_path).settings, lambda _: None)
    assert caught.value.code == "volume_failed"


def test_locks_of_different_models_are_independent(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    with locks.write_lock(volume.models, MODEL), locks.write_lock(volume.models, "owner/other"):
        names = sorted(path.name for path in (volume.models / ".shoehorn" / "locks").iterdir())
    assert names == ["owner--other.lock", f"{MODEL.replace('/', '--')}.lock"]
