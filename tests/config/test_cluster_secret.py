"""The secret of a cluster: refused unless it is long and only its owner and group can read it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoehorn.common.errors import SettingsError
from shoehorn.config import cluster_secret

SECRET = "0123456789abcdef" * 2


@pytest.mark.parametrize(("content", "mode", "code"), [
    (SECRET, 0o604, "secret_exposed"), (SECRET, 0o602, "secret_exposed"), ("short", 0o600, "secret_invalid"),
    ("", 0o600, "secret_invalid"), (f"{SECRET} {SECRET}", 0o600, "secret_invalid"),
    ("ü" * 40, 0o600, "invalid_settings")])
def test_unusable_secret_is_refused_and_never_shown(tmp_path: Path, content: str, mode: int, code: str) -> None:
    file = tmp_path / "secret"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(SettingsError) as caught:
        cluster_secret.read(file)
    assert caught.value.code == code
    assert not content or content not in str(caught.value)


def test_missing_secret_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        cluster_secret.read(tmp_path / "absent")
    assert caught.value.code == "secret_unreadable"


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o600, 0o660])
def test_secret_of_owner_and_group_is_read(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n")
    os.chmod(file, mode)
    assert cluster_secret.read(file) == SECRET
