"""Messages of a start: about keys, the volume and the example call."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from shoehorn.commands.serve import _require_volume, disable_core_dumps, first_key_line, welcome
from shoehorn.common import mounts
from shoehorn.common.disk import volume_error
from shoehorn.common.errors import SettingsError
from shoehorn.config.settings import load
from shoehorn.gateway.keys.store import KeyStore, NewKey

BASE = {"MODEL_ID": "a/b", "PORT": "7001"}


@pytest.fixture
def new_key(tmp_path: Path) -> NewKey:
    new = KeyStore(tmp_path).create_first(0.0)
    assert new is not None
    return new


def test_new_key_is_shown_in_a_command_to_paste(new_key: NewKey) -> None:
    text = welcome(load(BASE), new_key).text()
    assert f'curl -N http://127.0.0.1:7001/v1/chat/completions -H "Authorization: Bearer {new_key.token}"' in text
    assert new_key.token in first_key_line(new_key)
    assert "shoehorn keys rotate default" in first_key_line(new_key)


def test_configured_key_is_not_shown() -> None:
    text = welcome(load({**BASE, "API_KEY": "sk-canary-key"}), None).text()
    assert "Bearer $API_KEY" in text
    assert "canary" not in text


def test_existing_key_has_a_placeholder_and_a_remedy() -> None:
    text = welcome(load(BASE), None).text()
    assert "Bearer YOUR_KEY" in text
    assert "shoehorn keys add NAME" in text


def test_address_with_a_certificate_is_https() -> None:
    text = welcome(load({**BASE, "API_KEY": "sk-canary-key", "TLS_CERT_FILE": "/c", "TLS_KEY_FILE": "/k"}), None).text()
    assert "curl -k -N https://127.0.0.1:7001/" in text


@pytest.mark.parametrize(("published", "shown"), [
    ("127.0.0.1:8000", "127.0.0.1:8000"), ("0.0.0.0:8000", "127.0.0.1:8000"), ("[::]:8000", "127.0.0.1:8000"),
    (":8000", "127.0.0.1:8000"), ("192.0.2.7:80", "192.0.2.7:80"), ("[::1]:80", "[::1]:80"),
    ("127.0.0.1:0", "127.0.0.1:7001"), ("127.0.0.1:8000-8010", "127.0.0.1:7001")])
def test_published_address_is_shown(published: str, shown: str) -> None:
    text = welcome(load({**BASE, "PUBLISHED_ADDRESS": published}), None).text()
    assert f"http://{shown}/v1/" in text
    assert f"on http://{shown}. Try" in text


def test_folder_of_the_host_is_refused_inside_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(SettingsError) as refusal:
        _require_volume(tmp_path / "disk")
    assert refusal.value.code == "volume_not_mounted"
    assert f"MODELS_VOLUME={tmp_path}/disk" in refusal.value.remedy
    assert volume_error(tmp_path / "disk", OSError(errno.EROFS, "")).code == "volume_not_mounted"
    assert volume_error(tmp_path, OSError(errno.EROFS, "")).code == "volume_read_only"


@pytest.mark.parametrize(("number", "code", "remedy"), [
    (errno.EROFS, "volume_read_only", "without :ro"), (errno.ENOSPC, "disk_full", "Free space there"),
    (errno.EACCES, "volume_not_writable", "sudo chown -R")])
@pytest.mark.fault("Volume read-only, full or another user's when the appliance starts",
                   "Exit code 2 with a remedy, before anything starts.")
def test_volume_that_cannot_store_keys_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          number: int, code: str, remedy: str) -> None:
    def touch(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(SettingsError) as refusal:
        _require_volume(tmp_path)
    assert refusal.value.code == code
    assert remedy in refusal.value.remedy


@pytest.mark.parametrize(("root", "named"), [
    (f"/var/lib/docker/volumes/{'ab' * 32}/_data", False), (f"/containers/storage/volumes/{'0f' * 32}/_data", False),
    (f"/cri/containers/{'ab' * 32}/volumes/{'cd' * 32}", False), ("/var/lib/docker/volumes/models/_data", True),
    ("/srv/models", True), ("/", True)])
@pytest.mark.fault("No volume is mounted, so that the container engine makes one of its own",
                   "Reported with a remedy: models are deleted with the container.")
def test_anonymous_volume_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str], root: str, named: bool) -> None:
    table = tmp_path / "mountinfo"
    table.write_text("22 1 8:1 / / rw,relatime shared:1 - overlay overlay rw\n"
                     f"40 22 8:2 {root} {tmp_path} rw,relatime - ext4 /dev/sda1 rw\nnothing\n")
    mount = mounts.find_mount(tmp_path / "models", table)
    monkeypatch.setattr(mounts, "find_mount", lambda _folder: mount)
    _require_volume(tmp_path)
    output = capsys.readouterr().out
    assert ("no volume is mounted" in output) != named
    assert f"docker run -v models:{tmp_path}" in output or named


def test_missing_mount_table_is_accepted(tmp_path: Path) -> None:
    assert mounts.find_mount(tmp_path, tmp_path / "none") is None
    assert mounts.find_mount(tmp_path) is not None


@pytest.mark.parametrize(("most", "limit"), [(resource.RLIM_INFINITY, 1), (4096, 1), (1, 1), (0, 0)])
def test_core_dumps_to_files_and_pipes_are_disabled(monkeypatch: pytest.MonkeyPatch, most: int, limit: int) -> None:
    new_key: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (0, most))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: new_key.append((which, limits)))
    disable_core_dumps()
    assert new_key == [(resource.RLIMIT_CORE, (limit, limit))]


def test_programs_append_to_a_file_of_standard_output(tmp_path: Path) -> None:
    """Another program opens the same file, as supervisord does; neither overwrites the other."""
    log = tmp_path / "log"
    code = ("import os; from shoehorn.commands.serve import append_to_files; os.write(1, b'one\\n'); "
            "append_to_files(); other = open('/dev/stdout', 'ab', 0); other.write(b'two\\n'); os.write(1, b'three\\n')")
    with log.open("wb") as opened:
        subprocess.run([sys.executable, "-c", code], stdout=opened, check=True)
    assert log.read_text().split() == ["one", "two", "three"]
