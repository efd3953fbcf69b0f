"""API keys: what one is, how it is kept, and who it belongs to.

Rules:
- only a salted hash of a key is kept, so that nobody who reads the file can call the API. A fast keyed hash is enough:
  a generated key has 256 random bits, which no amount of guessing finds (a slow hash protects short passwords, and
  would cost every request its time). A weak key that a user chose as API_KEY is hashed too, but only within RUN_DIR;
- a given key is compared with every kept one in constant time, with no early exit;
- a key, a salt or a hash never stands in `repr`, a log, an argument or an error.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, date, datetime
from typing import Any

from shoehorn.common.units import parse_size
from shoehorn.config.setting_values import parse_key

DEFAULT_NAME = "default"
"""The name of the key from API_KEY, and of the one that is generated at the first start."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DURATION = re.compile(r"([0-9]{1,5})([mhdw])")
_UNIT_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SALT_BYTES = 16


@dataclass(frozen=True)
class Limits:
    """What one key may do; None means no limit.

    Attributes:
        requests_per_minute: requests admitted in any 60 s.
        concurrent: requests at the same time.
        max_tokens: tokens of one request's answer.
        body_bytes: size of one request.
    """

    requests_per_minute: int | None = None
    concurrent: int | None = None
    max_tokens: int | None = None
    body_bytes: int | None = None

    @classmethod
    def parse(cls, words: Mapping[str, str]) -> Limits:
        """Limits as a person writes them; `body_bytes` may be a size such as 1MiB.

        Raises:
            ValueError: an unknown name, or a value that is no whole number from 1 on.
        """
        known = {each.name for each in fields(cls)}
        if unknown := set(words) - known:
            raise ValueError(f"{sorted(unknown)[0]!r} is no limit; there are {', '.join(sorted(known))}")
        return cls(**{name: parse_size(text) if name == "body_bytes" else _count(name, text)
                      for name, text in words.items()})

    def header(self) -> str:
        """The limits for the engine, `requests_per_minute=60;concurrent=4`; absent ones are left out."""
        return ";".join(f"{name}={value}" for name, value in self.given().items())

    def given(self) -> dict[str, int]:
        """The limits that there are, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Key:
    """One key as it is kept. Times are Unix time in seconds; `expires` is None for never."""

    name: str
    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)
    created: float
    expires: float | None = None
    limits: Limits = Limits()

    @classmethod
    def make(cls, name: str, token: str, created: float, expires: float | None = None,
             limits: Limits | None = None) -> Key:
        """Hash `token` with a salt of its own.

        Raises:
            ValueError: no name or no token that a key may have.
        """
        salt = secrets.token_bytes(_SALT_BYTES)
        return cls(parse_name(name), salt, _digest(salt, parse_key(token).encode("ascii")), created, expires,
                   limits or Limits())

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Key:
        """The reverse of `to_json`.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is something else.
        """
        salt, digest = bytes.fromhex(document["salt"]), bytes.fromhex(document["digest"])
        if len(salt) != _SALT_BYTES or len(digest) != len(_digest(b"", b"")):
            raise ValueError("a hash of the wrong length")
        expires = document["expires"]
        limits = {name: str(value) for name, value in document["limits"].items()}
        return cls(parse_name(document["name"]), salt, digest, float(document["created"]),
                   None if expires is None else float(expires), Limits.parse(limits))

    def to_json(self) -> dict[str, object]:
        """The key for a JSON file."""
        return {"name": self.name, "salt": self.salt.hex(), "digest": self.digest.hex(), "created": self.created,
                "expires": self.expires, "limits": self.limits.given()}

    def is_of(self, token: bytes) -> bool:
        """Whether this is the key that `token` opens; takes as long either way."""
        return hmac.compare_digest(_digest(self.salt, token), self.digest)


class Keyring:
    """Keys in force, each name once.

    A token that was found is remembered under a hash with a secret of this process, so that the next request with it
    costs one hash however many keys there are; tokens that open nothing are not remembered.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        self.keys = {key.name: key for key in keys}
        self._secret = secrets.token_bytes(_SALT_BYTES)
        self._found: dict[bytes, Key] = {}

    def find(self, token: bytes) -> Key | None:
        """The key that `token` opens, expired or not."""
        seen = _digest(self._secret, token)
        if key := self._found.get(seen):
            return key
        found = None
        for key in self.keys.values():
            if key.is_of(token):
                found = key
        if found:
            self._found[seen] = found
        return found


def new_token() -> str:
    """A new key: 32 random bytes behind `sk-`."""
    return "sk-" + secrets.token_urlsafe(32)


def parse_name(text: object) -> str:
    """A key's name.

    Raises:
        ValueError: it is none; the text is not shown, since it may be a key in the wrong place.
    """
    if not isinstance(text, str) or not _NAME.fullmatch(text):
        raise ValueError("a name has 1 to 64 characters out of A-Z a-z 0-9 . _ @ - and begins with a letter or digit")
    return text


def parse_expiry(text: str, now: float) -> float:
    """The Unix time of `30d`, `12h`, `90m`, `2w` from `now`, or of the beginning of a day (UTC), `2027-01-31`.

    Raises:
        ValueError: it is none of these.
    """
    if match := _DURATION.fullmatch(text):
        return now + int(match[1]) * _UNIT_SECONDS[match[2]]
    try:
        return parse_day(text)
    except ValueError:
        raise ValueError(f"{text!r} is no time; write 30d, 12h or a day such as 2027-01-31") from None


def parse_day(text: str) -> float:
    """The Unix time at which a day begins (UTC), `2027-01-31`.

    Raises:
        ValueError: it is no day.
    """
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is no day; write it like 2027-01-31") from None
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()


def _count(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise ValueError(f"{name}={text!r} is no whole number from 1 on")
    return int(text)


def _digest(salt: bytes, token: bytes) -> bytes:
    return hmac.digest(salt, token, "sha256")
