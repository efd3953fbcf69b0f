"""API keys: names, limits, expiry, and salted hashes.

Rules:
- only a salted hash of a key is stored, so that reading the file does not give access to the API. A fast keyed hash is
  enough: a generated key has 256 random bits, which no search finds (a slow hash protects short passwords, and would
  delay every request). A weak key that a user chose as API_KEY is hashed too, but only within RUN_DIR;
- a token is compared with every stored key in constant time, with no early exit;
- no key, salt or hash appears in `repr`, a log, an argument or an error.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime
from typing import Any

from shoehorn.common.units import parse_size
from shoehorn.config.setting_values import parse_key
from shoehorn_vllm.protocol import KeyLimits

DEFAULT_NAME = "default"
"""The name of API_KEY, and of the key that is generated at the first start."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DURATION = re.compile(r"([0-9]{1,5})([mhdw])")
_UNIT_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SALT_BYTES = 16


def parse_limits(words: Mapping[str, str]) -> KeyLimits:
    """Parse limits as a person writes them; `body_bytes` may be a size such as 1MiB.

    Raises:
        ValueError: a name is unknown, or a value is not an integer from 1 on.
    """
    names = {each.name for each in fields(KeyLimits)}
    if unknown := set(words) - names:
        raise ValueError(f"unknown limit {sorted(unknown)[0]!r}; valid limits are {', '.join(sorted(names))}")
    return KeyLimits(**{name: parse_size(text) if name == "body_bytes" else _count(name, text)
                        for name, text in words.items()})


@dataclass(frozen=True)
class Key:
    """One stored key. Times are Unix time in seconds; `expires` None means never."""

    name: str
    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)
    created: float
    expires: float | None = None
    limits: KeyLimits = field(default_factory=KeyLimits)

    @classmethod
    def make(cls, name: str, token: str, created: float, expires: float | None = None,
             limits: KeyLimits | None = None) -> Key:
        """Hash `token` with a new salt.

        Raises:
            ValueError: the name or the token is invalid.
        """
        salt = secrets.token_bytes(_SALT_BYTES)
        return cls(parse_name(name), salt, _digest(salt, parse_key(token).encode("ascii")), created, expires,
                   limits or KeyLimits())

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Key:
        """Parse the result of `to_json`.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: the document is invalid.
        """
        salt, digest = bytes.fromhex(document["salt"]), bytes.fromhex(document["digest"])
        if len(salt) != _SALT_BYTES or len(digest) != len(_digest(b"", b"")):
            raise ValueError("invalid length of a hash")
        expires = document["expires"]
        limits = {name: str(value) for name, value in document["limits"].items()}
        return cls(parse_name(document["name"]), salt, digest, float(document["created"]),
                   None if expires is None else float(expires), parse_limits(limits))

    def to_json(self) -> dict[str, object]:
        """Convert the key for a JSON file."""
        return {"name": self.name, "salt": self.salt.hex(), "digest": self.digest.hex(), "created": self.created,
                "expires": self.expires, "limits": self.limits.as_dict()}

    def matches(self, token: bytes) -> bool:
        """Check whether `token` is this key, in constant time."""
        return hmac.compare_digest(_digest(self.salt, token), self.digest)


class Keyring:
    """The valid keys, each name once.

    A valid token is cached under a hash with a secret of this process, so that its next request costs one hash however
    many keys there are; invalid tokens are not cached.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        self.keys = {key.name: key for key in keys}
        self._secret = secrets.token_bytes(_SALT_BYTES)
        self._cache: dict[bytes, Key] = {}

    def find(self, token: bytes) -> Key | None:
        """Find the key of `token`, expired or not."""
        cached = _digest(self._secret, token)
        if key := self._cache.get(cached):
            return key
        match = None
        for key in self.keys.values():
            if key.matches(token):
                match = key
        if match:
            self._cache[cached] = match
        return match


def new_token() -> str:
    """Generate a key: `sk-` and 32 random bytes."""
    return "sk-" + secrets.token_urlsafe(32)


def parse_name(text: object) -> str:
    """Check the name of a key.

    Raises:
        ValueError: it is invalid; the text is not shown, since it may be a key in the wrong place.
    """
    if not isinstance(text, str) or not _NAME.fullmatch(text):
        raise ValueError("invalid name: expected 1 to 64 of the characters A-Z a-z 0-9 . _ @ -, the first a letter or "
                         "digit")
    return text


def parse_expiry(text: str, now: float) -> float:
    """Parse `30d`, `12h`, `90m` or `2w` from `now`, or the beginning of a day (UTC), `2027-01-31`, to Unix time.

    Raises:
        ValueError: the text has another form.
    """
    if match := _DURATION.fullmatch(text):
        return now + int(match[1]) * _UNIT_SECONDS[match[2]]
    try:
        return parse_day(text)
    except ValueError:
        raise ValueError(f"invalid time {text!r}: expected 30d, 12h or a day such as 2027-01-31") from None


def parse_day(text: str) -> float:
    """Parse a day, `2027-01-31`, to the Unix time at which it begins (UTC).

    Raises:
        ValueError: the text has another form.
    """
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"invalid day {text!r}: expected a form such as 2027-01-31") from None
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()


def _count(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,15}", text) or int(text) < 1:
        raise ValueError(f"{name}={text!r}: expected an integer from 1 on")
    return int(text)


def _digest(salt: bytes, token: bytes) -> bytes:
    return hmac.digest(salt, token, "sha256")
