"""The volume's keys: `MODELS_DIR/.shoehorn/keys.json`, changed by `shoehorn keys` and read by the key service.

Rules:
- the file is private (0600), replaced as a whole, and changed by one process at a time, also across containers;
- a key is shown to the one who made it and never again; what is kept is its hash;
- when each key was last used stands in a file of its own, `keys-used.json`, so that the key service, which writes that,
  never touches the keys.
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
    """A key just made: the only moment at which its token is known."""

    key: Key
    token: str = field(repr=False)


def dump(keys: Iterable[Key]) -> str:
    """Keys as the text of a key file."""
    return json.dumps({"version": VERSION, "keys": [key.to_json() for key in keys]}, indent=1) + "\n"


def parse(text: str, file: Path) -> tuple[Key, ...]:
    """The keys of a key file; `file` is named in the error.

    Raises:
        SettingsError: the text is damaged: half-written, empty, or something else.
    """
    try:
        document = json.loads(text)
        if document["version"] != VERSION:
            raise ValueError("another version")
        keys = tuple(Key.from_json(each) for each in document["keys"])
        if len({key.name for key in keys}) != len(keys):
            raise ValueError("a name twice")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise SettingsError(f"The key file {file} is damaged.", "Put a copy of it back; or delete it, restart, and "
                            "give everybody a new key.") from None
    return keys


class KeyStore:
    """The key file below a models directory, which need not exist yet."""

    def __init__(self, models_dir: Path) -> None:
        self.file = ModelsDir(models_dir).keys
        self._used = self.file.with_name("keys-used.json")

    def read(self) -> tuple[Key, ...]:
        """The keys; none when there is no file. A file that others could read is made private first.

        Raises:
            SettingsError: it cannot be read, or is damaged.
        """
        try:
            with self.file.open(encoding="utf-8", errors="replace") as opened:
                self._make_private(opened.fileno())
                return parse(opened.read(), self.file)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise self._unusable(error) from error

    def first(self, now: float) -> NewKey | None:
        """Generate the key `default` when there is no key file yet; None when there is one.

        Raises:
            SettingsError: the volume's keys cannot be read or written, or are damaged.
        """
        with self._locked():
            if self.file.exists():
                self.read()
                return None
            return self._put((), Key.make(DEFAULT_NAME, token := new_token(), now), token)

    def add(self, template: Key) -> NewKey:
        """Put a new key with the name, times and limits of `template`.

        Raises:
            SettingsError: the name is taken, or as `first`.
        """
        with self._locked():
            keys = self.read()
            if any(key.name == template.name for key in keys):
                raise SettingsError(f"There is a key {template.name!r} already.",
                                    f"Choose another name, or type: shoehorn keys rotate {template.name}")
            token = new_token()
            made = Key.make(template.name, token, template.created, template.expires, template.limits)
            return self._put(keys, made, token)

    def rotate(self, name: str, now: float) -> NewKey:
        """Give a key a new token; its limits and expiry stay. The old one opens nothing from then on.

        Raises:
            SettingsError: there is none of that name, or as `first`.
        """
        with self._locked():
            keys = self.read()
            old = self._named(keys, name)
            token = new_token()
            made = replace(Key.make(name, token, now), expires=old.expires, limits=old.limits)
            return self._put([key for key in keys if key is not old], made, token)

    def revoke(self, name: str) -> None:
        """Take a key away.

        Raises:
            SettingsError: there is none of that name, or as `first`.
        """
        with self._locked():
            keys = self.read()
            old = self._named(keys, name)
            self._write([key for key in keys if key is not old])

    def used(self) -> dict[str, float]:
        """When each key, from whatever source, was last used (Unix time); empty when nobody knows."""
        try:
            document = json.loads(self._used.read_text(encoding="utf-8"))
            return {str(name): float(when) for name, when in document.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def note_used(self, used: Mapping[str, float], known: Iterable[str]) -> None:
        """Merge uses into what is noted, of the `known` names only.

        Raises:
            OSError: the volume cannot be written.
            SettingsError: its lock cannot be had.
        """
        with self._locked():
            noted = self.used()
            merged = {name: max(used.get(name, 0.0), noted.get(name, 0.0)) for name in known
                      if name in used or name in noted}
            write_atomic(self._used, json.dumps(merged) + "\n", 0o600)

    @staticmethod
    def _named(keys: Iterable[Key], name: str) -> Key:
        for key in keys:
            if key.name == name:
                return key
        raise SettingsError(f"There is no key {name!r} in the volume.", "Type: shoehorn keys list")

    def _put(self, others: Iterable[Key], made: Key, token: str) -> NewKey:
        self._write([*others, made])
        return NewKey(made, token)

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
            log.warning("%s can be read by others, and its volume keeps no file modes", self.file)
        else:
            log.warning("%s could be read by others; now only by its owner", self.file)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time, also from other containers on the same volume."""
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
            f"The key file {self.file} cannot be read or written by user {os.geteuid()}: {error.strerror}.",
            "Give that user the volume (sudo chown -R), or set API_KEY.")
