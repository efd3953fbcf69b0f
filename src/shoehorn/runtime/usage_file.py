"""Used tokens of API keys in the volume: one JSON file for each month, written by the engine's API server.

Rules:
- a file is replaced as a whole and holds names of keys and models, never a key;
- several containers may share a volume: each adds its own figures to the file under a lock;
- a damaged file is never overwritten;
- days and months are those of UTC.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Literal, NamedTuple

from shoehorn.common import locks
from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.errors import SettingsError

VERSION = 1

Period = Literal["day", "month"]

_MONTH = re.compile(r"[0-9]{4}-[0-9]{2}")


@dataclass(frozen=True)
class Usage:
    """Requests that reached the engine, and their tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.requests + other.requests, self.prompt_tokens + other.prompt_tokens,
                     self.completion_tokens + other.completion_tokens)

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers."""
        return self.prompt_tokens + self.completion_tokens


class Account(NamedTuple):
    """Subject of a count: a day (2026-11-28), the name of a key, and the name of a model."""

    day: str
    key: str
    model: str


class UsageFiles:
    """The files below one folder, which need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def months(self) -> list[str]:
        """List the months that have a file, oldest first."""
        try:
            return sorted(file.stem for file in self._folder.glob("*.json") if _MONTH.fullmatch(file.stem))
        except OSError:
            return []

    def read(self, month: str) -> dict[Account, Usage]:
        """Read the figures of a month (2026-11); none without a file.

        Raises:
            SettingsError: the file is unreadable or damaged.
        """
        file = self._file(month)
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{file}: cannot read the used tokens ({error}).",
                                "Make the user of the server the owner of the volume.") from error
        try:
            return _parse(text, month)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise SettingsError(f"{file}: the usage file is damaged.",
                                "Restore a backup; or move it away, and the month is counted from zero.") from None

    def add(self, figures: Mapping[Account, Usage]) -> dict[str, dict[Account, Usage]]:
        """Add figures to the files; returns the new content of each month that changed.

        Raises:
            SettingsError: a file is damaged.
            OSError: the volume is not writable.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        contents = {}
        with locks.exclusive(self._folder / "usage.lock"):
            for month in sorted({account.day[:7] for account in figures}):
                content = self.read(month)
                for account, usage in figures.items():
                    if account.day.startswith(month):
                        content[account] = content.get(account, Usage()) + usage
                write_atomic(self._file(month), _format(content), 0o600)
                contents[month] = content
        return contents

    def _file(self, month: str) -> Path:
        return self._folder / f"{month}.json"


def _parse(text: str, month: str) -> dict[Account, Usage]:
    document = json.loads(text)
    if document["version"] != VERSION:
        raise ValueError("unsupported version")
    content = {}
    for row in document["usage"]:
        account = Account(*(str(row[name]) for name in Account._fields))
        usage = Usage(row["requests"], row["prompt_tokens"], row["completion_tokens"])
        if not all(type(figure) is int and figure >= 0 for figure in asdict(usage).values()):
            raise ValueError("a figure is not a count")
        if not account.day.startswith(month):
            raise ValueError("a day of another month")
        content[account] = usage
    return content


def _format(content: Mapping[Account, Usage]) -> str:
    rows = [json.dumps({**account._asdict(), **asdict(usage)}) for account, usage in sorted(
        content.items(), key=lambda item: item[0])]
    return f'{{"version": {VERSION}, "usage": [\n' + ",\n".join(rows) + "\n]}\n"


def day_of(moment: float) -> str:
    """The day (UTC) of a Unix time: 2026-11-28."""
    return datetime.fromtimestamp(moment, UTC).date().isoformat()


def renewal(period: Period, moment: float) -> float:
    """The Unix time at which the next day or month (UTC) begins."""
    today = datetime.fromtimestamp(moment, UTC).date()
    if period == "day":
        following = today + timedelta(days=1)
    else:
        following = date(today.year + today.month // 12, today.month % 12 + 1, 1)
    return datetime(following.year, following.month, following.day, tzinfo=UTC).timestamp()


def total(content: Mapping[Account, Usage], period: Period, moment: float) -> dict[tuple[str, str], Usage]:
    """Add up the figures of the day or the month of a Unix time, by key and model."""
    prefix = day_of(moment)[:10 if period == "day" else 7]
    return by_key_and_model((account, usage) for account, usage in content.items() if account.day.startswith(prefix))


def by_key_and_model(items: Iterable[tuple[Account, Usage]]) -> dict[tuple[str, str], Usage]:
    """Add up figures of several days."""
    sums: dict[tuple[str, str], Usage] = {}
    for account, usage in items:
        place = (account.key, account.model)
        sums[place] = sums.get(place, Usage()) + usage
    return sums
