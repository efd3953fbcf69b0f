"""The secret of a cluster (CLUSTER_SECRET_FILE)."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from shoehorn.common.errors import SettingsError

MIN_CHARACTERS = 32
_CREATE = "Create it: (umask 077; openssl rand -hex 32 > FILE), and give all machines the same file."


def read(path: Path) -> str:
    """Read the secret.

    Raises:
        SettingsError: the file is missing or unreadable, other users may read it, or its content is too short.
    """
    name = f"CLUSTER_SECRET_FILE={path}"
    try:
        mode = path.stat().st_mode
        secret = path.read_text(encoding="ascii").strip()
    except UnicodeDecodeError:
        raise SettingsError(f"{name}: invalid, contains other characters than ASCII.", _CREATE) from None
    except OSError as error:
        raise SettingsError(f"{name}: user {os.geteuid()} cannot read it ({error.strerror}).",
                            "Mount the file readable for that user or its group.",
                            code="secret_unreadable") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise SettingsError(f"{name}: every user may read or change it.", f"Type: chmod o-rwx {path}",
                            code="secret_exposed")
    if len(secret) < MIN_CHARACTERS or any(character.isspace() for character in secret):
        raise SettingsError(f"{name}: invalid, expected at least {MIN_CHARACTERS} characters without white space.",
                            _CREATE, code="secret_invalid")
    return secret
