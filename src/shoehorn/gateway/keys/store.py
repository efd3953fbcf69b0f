"""Key file of the volume, `MODELS_DIR/.shoehorn/keys.json`: written by `shoehorn keys`, read by the key service.

Rules:
- the file is private (0600), replaced as a whole, and changed by one process at a time, also across containers;
- a key is shown once, when it is created; only its hash is stored;
- the times of last use are in a file of their own, `keys-used.json`, so that the key service, which writes it, never
  writes the keys.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from shoehorn.common import locks
from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.errors import SettingsError
from shoehorn.config.models_dir import ModelsDir
from shoehorn.gateway.keys.api_key import DEFAULT_NAME, Key, new_token

log = logging.getLogger("keys")

VERSION = 1


@dataclass(frozen=True)
class NewKey:
    """A key that was just created, with its token, which is known only now."""

    key: Key
    token: str = field(repr=False)


def dump(keys: Iterable[Key]) -> str:
    """Format keys as the text of a key file."""
    return json.dumps({"version": VERSION, "keys": [key.to_json() for key in keys]}, indent=1) + "\n"


def parse(text: str, file: Path) -> tuple[Key, ...]:
    """Parse a key file; the error names `file`.

    Raises:
        SettingsError: the text is incomplete, empty or invalid.
    """
    try:
        document = json.loads(text)
        if document["version"] != VERSION:
            raise ValueError("unsupported version")
        keys = tuple(Key.from_json(each) for each in document["keys"])
        if len({key.name for key in keys}) != len(keys):
            raise ValueError("duplicate name")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise SettingsError(f"{file}: the key file is damaged.", "Restore a backup; or delete it, restart, and create "
                            "new keys.") from None
    return keys


class KeyStore:
    """The key file below a models directory, which need not exist yet."""

    def __init__(self, models_dir: Path) -> None:
        self.file = ModelsDir(models_dir).keys
        self._used = self.file.with_name("keys-used.json")

    def read(self) -> tuple[Key, ...]:
        """Read the keys; none without a file. A file that others can read is made private first.

        Raises:
            SettingsError: the file is unreadable or damaged.
        """
        try:
            with self.file.open(encoding="utf-8", errors="replace") as opened:
                self._make_private(opened.fileno())
                return parse(opened.read(), self.file)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise self._unusable(error) from error

    def create_first(self, now: float) -> NewKey | None:
        """Generate the key `default` unless a key file exists; returns None then.

        Raises:
            SettingsError: the key file is unreadable, unwritable or damaged.
        """
        with self._locked():
            if self.file.exists():
                self.read()
                return None
            return self._add((), Key.make(DEFAULT_NAME, token := new_token(), now), token)

    def add(self, template: Key) -> NewKey:
        """Add a new key with the name, times and limits of `template`.

        Raises:
            SettingsError: the name already exists, or as `create_first`.
        """
        with self._locked():
            keys = self.read()
            if any(key.name == template.name for key in keys):
                raise SettingsError(f"Key {template.name!r}: already exists.",
                                    f"Choose another name, or type: shoehorn keys rotate {template.name}")
            token = new_token()
            key = Key.make(template.name, token, template.created, template.expires, template.limits)
            return self._add(keys, key, token)

    def rotate(self, name: str, now: float) -> NewKey:
        """Give a key a new token; its limits and expiry stay. The old token is invalid from then on.

        Raises:
            SettingsError: the key does not exist, or as `create_first`.
        """
        with self._locked():
            keys = self.read()
            old = self._named(keys, name)
            token = new_token()
            new = replace(Key.make(name, token, now), expires=old.expires, limits=old.limits)
            return self._add([key for key in keys if key is not old], new, token)

    def revoke(self, name: str) -> None:
        """Remove a key.

        Raises:
            SettingsError: the key does not exist, or as `create_first`.
        """
        with self._locked():
            keys = self.read()
            old = self._named(keys, name)
            self._write([key for key in keys if key is not old])

    def last_used(self) -> dict[str, float]:
        """Read when each key, from whatever source, was last used (Unix time); empty when unknown."""
        try:
            document = json.loads(self._used.read_text(encoding="utf-8"))
            return {str(name): float(when) for name, when in document.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def save_last_used(self, used: Mapping[str, float], known: Iterable[str]) -> None:
        """Merge times of last use into the stored ones, of the `known` names only.

        Raises:
            OSError: the volume is not writable.
            SettingsError: its lock is unavailable.
        """
        with self._locked():
            stored = self.last_used()
            merged = {name: max(used.get(name, 0.0), stored.get(name, 0.0)) for name in known
                      if name in used or name in stored}
            write_atomic(self._used, json.dumps(merged) + "\n", 0o600)

    @staticmethod
    def _named(keys: Iterable[Key], name: str) -> Key:
        for key in keys:
            if key.name == name:
                return key
        raise SettingsError(f"Key {name!r}: not found in the volume.", "Type: shoehorn keys list")

    def _add(self, others: Iterable[Key], key: Key, token: str) -> NewKey:
        self._write([*others, key])
        return NewKey(key, token)

    def _write(self, keys: Iterable[Key]) -> None:
        try:
            write_atomic(self.file, dump(keys), 0o600)
        except OSError as error:
            raise self._unusable(error) from error

    def _make_private(self, descriptor: int) -> None:
        others = stat.S_IRWXG | stat.S_IRWXO
        if not os.fstat(descriptor).st_mode & others:
            return
        os.fchmod(descriptor, stat.S_IRUSR | stat.S_IWUSR)
        if os.fstat(descriptor).st_mode & others:
            log.warning("key file is readable by others, and its volume has no file modes: path=%s", self.file)
        else:
            log.warning("made the key file private, it was readable by others: path=%s", self.file)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude other processes, also those of other containers on the same volume."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lock = locks.acquire(self.file.with_name("keys.lock"))
        except OSError as error:
            raise self._unusable(error) from error
        try:
            yield
        finally:
            os.close(lock)

    def _unusable(self, error: OSError) -> SettingsError:
        return SettingsError(
            f"{self.file}: user {os.geteuid()} cannot read and write the key file ({error.strerror}).",
            "Make that user the owner of the volume (sudo chown -R), or set API_KEY.")
