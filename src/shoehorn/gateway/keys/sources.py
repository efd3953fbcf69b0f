"""Sources of API keys: API_KEY, the file of API_KEYS_FILE, and the volume.

Rules:
- a name belongs to one key: API_KEY (`default`) precedes the file, the file precedes the volume;
- a source that is damaged, incomplete or missing makes all keys unavailable: no request is admitted by the others;
- the hash of API_KEY is in RUN_DIR, written by each start, so that the key itself is in no environment;
- the next request sees a change of any file.

The file of API_KEYS_FILE has one key a line, `NAME KEY [LIMIT=VALUE]... [expires=DAY]`; `#` begins a comment. A
line must end in a newline, so that a file that is being written never yields a part of a key, or a key without its
limits.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.errors import SettingsError
from shoehorn.common.file_stamp import FileStamp, stamp
from shoehorn.config.settings import Settings
from shoehorn.gateway.keys.api_key import DEFAULT_NAME, Key, Keyring, parse_day, parse_limits
from shoehorn.gateway.keys.store import KeyStore, NewKey, dump, parse
from shoehorn.runtime.run_dir import RunDir

_RECHECK_SECONDS = 0.2
"""A file written twice within one tick of its clock looks unchanged the second time, so it is read once more."""


def prepare(settings: Settings) -> NewKey | None:
    """Prepare a start: write the hash of API_KEY to RUN_DIR, and generate the first key if none exists.

    Returns:
        The generated key, to be shown; None when there were keys.

    Raises:
        SettingsError: a source is unreadable, or names collide.
    """
    setting_keys = [Key.make(DEFAULT_NAME, settings.api_key, time.time())] if settings.api_key else []
    write_atomic(_setting_file(settings), dump(setting_keys), 0o600)
    has_other_keys = settings.api_key or settings.api_keys_file
    new_key = None if has_other_keys else KeyStore(settings.models_dir).create_first(time.time())
    KeyStore(settings.models_dir).read()
    if settings.api_keys_file:
        listed = _read_file(settings.api_keys_file)
        if setting_keys and any(key.name == DEFAULT_NAME for key in listed):
            raise SettingsError(f"API_KEYS_FILE: key {DEFAULT_NAME!r} already exists, it is API_KEY.",
                                "Rename the key in the file.")
    return new_key


def list_keys(settings: Settings) -> dict[str, tuple[Key, str]]:
    """List keys by name, each with its source: `API_KEY`, `API_KEYS_FILE` or `volume`; for the command line.

    Raises:
        SettingsError: a source is unreadable or damaged.
    """
    keys = {key.name: (key, "volume") for key in KeyStore(settings.models_dir).read()}
    if settings.api_keys_file:
        keys |= {key.name: (key, "API_KEYS_FILE") for key in _read_file(settings.api_keys_file)}
    if settings.api_key:
        keys[DEFAULT_NAME] = (Key.make(DEFAULT_NAME, settings.api_key, time.time()), "API_KEY")
    return keys


class KeySources:
    """The valid keys of a running appliance, reloaded whenever a file changes.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._store = KeyStore(settings.models_dir)
        self._files = [_setting_file(settings), self._store.file]
        if settings.api_keys_file:
            self._files.append(settings.api_keys_file)
        self._stamps: list[FileStamp | None] | None = None
        self._recheck_at = math.inf
        self._state: Keyring | SettingsError = SettingsError("API keys: not loaded.")

    def current(self) -> Keyring:
        """The currently valid keys.

        Raises:
            SettingsError: no key exists, or a source is unreadable or damaged.
        """
        stamps = [stamp(file) for file in self._files]
        changed, due = stamps != self._stamps, self._clock() >= self._recheck_at
        if changed or due:
            self._stamps = stamps
            self._recheck_at = self._clock() + _RECHECK_SECONDS if changed else math.inf
            try:
                self._state = self._read()
            except SettingsError as error:
                self._state = error
        if isinstance(self._state, SettingsError):
            raise self._state
        return self._state

    def _read(self) -> Keyring:
        file = _setting_file(self._settings)
        try:
            setting_keys = parse(file.read_text(encoding="utf-8", errors="replace"), file)
        except OSError as error:
            raise SettingsError(f"{file}: unreadable ({error.strerror}).", "Restart the container.") from error
        keys = [*self._store.read()]
        if self._settings.api_keys_file:
            keys += _read_file(self._settings.api_keys_file)
        keys += setting_keys
        if not keys:
            raise SettingsError("API keys: none exist, so every request is refused.", "Type: shoehorn keys add NAME")
        return Keyring(keys)


def parse_lines(text: str, file: Path, created: float) -> tuple[Key, ...]:
    """Parse the keys of API_KEYS_FILE. Errors never show a line, since it contains a key.

    Raises:
        SettingsError: a line is invalid or incomplete, a name or key is repeated, or the file contains no key.
    """
    keys: dict[str, Key] = {}
    tokens: set[str] = set()
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        words = line.split("#", 1)[0].split()
        if not words and line.endswith("\n"):
            continue
        try:
            if not line.endswith("\n"):
                raise ValueError("missing newline at its end, so it may be incomplete")
            if len(words) < 2:
                raise ValueError("expected NAME KEY")
            key = _from_words(words, created)
            if key.name in keys or words[1] in tokens:
                raise ValueError("its name or its key already exists in an earlier line")
        except ValueError as error:
            raise SettingsError(f"API_KEYS_FILE={file}, line {number}: {error}.", "Correct the line; see "
                                "docs/configuration.md for the format.") from None
        keys[key.name] = key
        tokens.add(words[1])
    if not keys:
        raise SettingsError(f"API_KEYS_FILE={file}: contains no key.", "Add one per line: NAME KEY")
    return tuple(keys.values())


def _from_words(words: list[str], created: float) -> Key:
    options: dict[str, str] = {}
    for word in words[2:]:
        name, equals, value = word.partition("=")
        if not equals or name in options:
            raise ValueError("expected LIMIT=VALUE after NAME and KEY, each limit once")
        options[name] = value
    expires = options.pop("expires", None)
    return Key.make(words[0], words[1], created, None if expires is None else parse_day(expires),
                    parse_limits(options))


def _read_file(file: Path) -> tuple[Key, ...]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        created = file.stat().st_mtime
    except OSError as error:
        raise SettingsError(f"API_KEYS_FILE={file}: user {os.geteuid()} cannot read it ({error.strerror}).",
                            "Mount its folder, readable for that user.") from error
    return parse_lines(text, file, created)


def _setting_file(settings: Settings) -> Path:
    return RunDir(settings.run_dir).setting_key
