"""The API key: where it comes from, where it is kept, and how nginx reads it.

Rules:
- API_KEY wins; else the key in the volume; else one is generated into the volume, once, under a lock;
- the files that hold a key are readable by their owner only, and a key never stands in `repr`, a log or an argument;
- nginx compares the whole header, case-sensitively; with no key in its file it lets nobody in.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shoehorn.errors import SettingsError
from shoehorn.files import write_atomic
from shoehorn.settings import TABLE, Settings

log = logging.getLogger("keys")

_parse = next(row.parse for row in TABLE if row.name == "API_KEY")


@dataclass(frozen=True)
class ApiKey:
    """A key, and where it comes from: API_KEY, just generated, or generated before and kept in the volume."""

    value: str = field(repr=False)
    origin: Literal["setting", "generated", "volume"]


def path(settings: Settings) -> Path:
    """Where the volume keeps a generated key."""
    return settings.models_dir / ".shoehorn" / "api_key"


def in_force(settings: Settings) -> ApiKey | None:
    """The key of these settings; None when none was set or generated yet.

    Raises:
        SettingsError: the volume's key cannot be read, or is damaged.
    """
    if settings.api_key:
        return ApiKey(settings.api_key, "setting")
    value = _read(path(settings))
    return ApiKey(value, "volume") if value else None


def ensure(settings: Settings) -> ApiKey:
    """The key of these settings; generates one when there is none.

    Raises:
        SettingsError: the volume's key cannot be read or written, or is damaged.
    """
    if settings.api_key:
        return ApiKey(settings.api_key, "setting")
    with _locked(path(settings)):
        return in_force(settings) or _generate(path(settings))


def rotate(settings: Settings) -> ApiKey:
    """Put a new generated key in the place of the volume's.

    Raises:
        SettingsError: the key in force comes from API_KEY, or the volume cannot be written.
    """
    if settings.api_key:
        raise SettingsError("The key in force comes from API_KEY (or API_KEY_FILE), so it cannot be rotated here.",
                            "Change it where you set it and restart; or unset it to have keys generated.")
    with _locked(path(settings)):
        return _generate(path(settings))


def write_map(run_dir: Path, keys: Sequence[str]) -> Path:
    """Write what nginx includes to check keys, `keys.map`; returns its path. Without keys it lets nobody in.

    Raises:
        ValueError: a key has characters or a length that no key may have.
    """
    lines = "".join(f'"~^(?i:Bearer) +{_pattern(key)}$" 1;\n' for key in keys)
    target = run_dir / "keys.map"
    write_atomic(target, lines, 0o600)
    return target


def _pattern(key: str) -> str:
    """The key as a regular expression; of the characters that a key may have, two are special there."""
    return str(_parse(key)).replace(".", "[.]").replace("+", "[+]")


def _generate(file: Path) -> ApiKey:
    value = "sk-" + secrets.token_urlsafe(32)
    try:
        write_atomic(file, value + "\n", 0o600)
    except OSError as error:
        raise _unusable(file, error) from error
    return ApiKey(value, "generated")


def _read(file: Path) -> str | None:
    """The key in `file`, made private first if it is not; None when there is no such file."""
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            _make_private(file, opened.fileno())
            text = opened.read(1024).strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(file, error) from error
    try:
        return str(_parse(text))
    except ValueError as error:
        raise SettingsError(f"{file} holds no usable key: {error}.",
                            "Delete the file to have a new key generated, or set API_KEY.") from None


def _make_private(file: Path, descriptor: int) -> None:
    others = stat.S_IRWXG | stat.S_IRWXO
    if not os.fstat(descriptor).st_mode & others:
        return
    os.fchmod(descriptor, stat.S_IRUSR | stat.S_IWUSR)
    if os.fstat(descriptor).st_mode & others:
        log.warning("%s can be read by others, and its volume keeps no file modes. Set API_KEY_FILE instead.", file)
    else:
        log.warning("%s could be read by others; now only by its owner. If somebody else had access to it, type: "
                    "shoehorn keys rotate", file)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time, also from other containers on the same volume."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file.with_name("api_key.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(file, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _unusable(file: Path, error: OSError) -> SettingsError:
    return SettingsError(f"The API key {file} cannot be read or written by user {os.geteuid()}: {error.strerror}.",
                         "Give that user the volume (sudo chown -R), or set API_KEY.")
