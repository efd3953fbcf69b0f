"""Where keys come from, put together: API_KEY, the file of API_KEYS_FILE, and the volume.

Rules:
- a name stands for one key: API_KEY's (`default`) goes before the file's, the file's before the volume's;
- any source that is damaged, half-written or missing makes all keys unavailable: nobody gets in by what is left of it;
- API_KEY's hash stands in RUN_DIR, written anew by each start, so that the key itself is in no environment;
- a change of any file is seen by the next request.

The file of API_KEYS_FILE has one key a line, `NAME KEY [LIMIT=VALUE]... [expires=DAY]`; `#` begins a comment. A line
counts with the newline at its end only, so that a file that is being written never shows a part of a key, or a key
without its limits.
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
from shoehorn.gateway.keys.api_key import DEFAULT_NAME, Key, Keyring, Limits, parse_day
from shoehorn.gateway.keys.store import KeyStore, NewKey, dump, parse
from shoehorn.runtime.run_dir import RunDir

_RECHECK_SECONDS = 0.2
"""A file that is written twice within its clock's tick looks unchanged the second time; so it is read once more."""


def prepare(settings: Settings) -> NewKey | None:
    """For a start: leave API_KEY's hash in RUN_DIR, and generate the first key where there would be none.

    Returns:
        The generated key, to be shown; None when there were keys.

    Raises:
        SettingsError: a source cannot be read, or names clash.
    """
    given = [Key.make(DEFAULT_NAME, settings.api_key, time.time())] if settings.api_key else []
    write_atomic(_setting_file(settings), dump(given), 0o600)
    made = None if settings.api_key or settings.api_keys_file else KeyStore(settings.models_dir).first(time.time())
    KeyStore(settings.models_dir).read()
    if settings.api_keys_file:
        listed = _read_file(settings.api_keys_file)
        if given and any(key.name == DEFAULT_NAME for key in listed):
            raise SettingsError(f"API_KEY and a line of API_KEYS_FILE are both the key {DEFAULT_NAME!r}.",
                                "Rename the key in the file.")
    return made


def in_force(settings: Settings) -> dict[str, tuple[Key, str]]:
    """Keys by name, each with its source: `API_KEY`, `API_KEYS_FILE` or `volume`; for the command line.

    Raises:
        SettingsError: a source cannot be read, or is damaged.
    """
    found = {key.name: (key, "volume") for key in KeyStore(settings.models_dir).read()}
    if settings.api_keys_file:
        found |= {key.name: (key, "API_KEYS_FILE") for key in _read_file(settings.api_keys_file)}
    if settings.api_key:
        found[DEFAULT_NAME] = (Key.make(DEFAULT_NAME, settings.api_key, time.time()), "API_KEY")
    return found


class KeySources:
    """The keys in force in a running appliance, read again whenever a file changes.

    Args:
        clock: seconds that only ever grow.
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
        self._state: Keyring | SettingsError = SettingsError("Not read yet.")

    def current(self) -> Keyring:
        """The keys in force now.

        Raises:
            SettingsError: there are none, or a source cannot be trusted.
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
            given = parse(file.read_text(encoding="utf-8", errors="replace"), file)
        except OSError as error:
            raise SettingsError(f"{file} cannot be read: {error.strerror}.", "Restart the container.") from error
        keys = [*self._store.read()]
        if self._settings.api_keys_file:
            keys += _read_file(self._settings.api_keys_file)
        keys += given
        if not keys:
            raise SettingsError("There is no key, so nobody can be let in.", "Type: shoehorn keys add NAME")
        return Keyring(keys)


def parse_lines(text: str, file: Path, created: float) -> tuple[Key, ...]:
    """The keys of API_KEYS_FILE. Never shows a line, since it holds a key.

    Raises:
        SettingsError: a line is wrong or half-written, a name or key stands there twice, or there is no key at all.
    """
    found: dict[str, Key] = {}
    tokens: set[str] = set()
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        words = line.split("#", 1)[0].split()
        if not words and line.endswith("\n"):
            continue
        try:
            if not line.endswith("\n"):
                raise ValueError("it has no newline at its end, so it may be half-written")
            if len(words) < 2:
                raise ValueError("write NAME KEY")
            key = _from_words(words, created)
            if key.name in found or words[1] in tokens:
                raise ValueError("its name or its key stands in an earlier line too")
        except ValueError as error:
            raise SettingsError(f"API_KEYS_FILE={file}, line {number}: {error}.", "Correct the line; "
                                "docs/configuration.md has the format.") from None
        found[key.name] = key
        tokens.add(words[1])
    if not found:
        raise SettingsError(f"API_KEYS_FILE={file} has no key in it.", "Write one a line: NAME KEY")
    return tuple(found.values())


def _from_words(words: list[str], created: float) -> Key:
    options: dict[str, str] = {}
    for word in words[2:]:
        name, equals, value = word.partition("=")
        if not equals or name in options:
            raise ValueError("behind NAME and KEY stand LIMIT=VALUE, each limit once")
        options[name] = value
    expires = options.pop("expires", None)
    return Key.make(words[0], words[1], created, None if expires is None else parse_day(expires),
                    Limits.parse(options))


def _read_file(file: Path) -> tuple[Key, ...]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        created = file.stat().st_mtime
    except OSError as error:
        raise SettingsError(f"API_KEYS_FILE={file} cannot be read by user {os.geteuid()}: {error.strerror}.",
                            "Mount the folder that holds it, readable for that user.") from error
    return parse_lines(text, file, created)


def _setting_file(settings: Settings) -> Path:
    return RunDir(settings.run_dir).setting_key
