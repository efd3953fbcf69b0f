"""Used tokens of API keys: counted at once, saved in the volume every few seconds.

Rules:
- what is not saved yet is lost only if the process is killed; a failed save is repeated with the next one;
- a volume that does not answer delays no request: files are read and written by a thread;
- the figures of a budget are those of the volume, which other containers may share, and the own ones since.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from shoehorn.common.errors import SettingsError
from shoehorn.runtime.usage_file import Account, Period, Usage, UsageFiles, day_of
from shoehorn_vllm.protocol import USAGE_DIR_VARIABLE

log = logging.getLogger("vllm.shoehorn.usage")
"""Below vLLM's logger, which prints it."""

SAVE_SECONDS = 15.0


class UsageLedger:
    """The figures of one API server; thread-safe.

    Args:
        files: where they are kept; None keeps them in memory.
        clock: Unix time in seconds.
    """

    def __init__(self, files: UsageFiles | None = None, clock: Callable[[], float] = time.time) -> None:
        self._files, self._clock = files, clock
        self._lock, self._saving = threading.Lock(), threading.Lock()
        self._unsaved: dict[Account, Usage] = {}
        self._used: dict[tuple[str, str], int] = {}
        self._month = ""
        self._problem = ""

    @classmethod
    def from_environment(cls) -> UsageLedger:
        """Open the folder that the engine program names, and save to it from then on."""
        folder = os.environ.get(USAGE_DIR_VARIABLE)
        if not folder:
            return cls()
        ledger = cls(UsageFiles(Path(folder)))
        ledger.save()
        threading.Thread(target=ledger._save_repeatedly, name="usage", daemon=True).start()
        atexit.register(ledger.save)
        return ledger

    def add(self, key: str, model: str, usage: Usage) -> None:
        """Count usage of now."""
        self.add_to(Account(day_of(self._clock()), key, model), usage)

    def add_to(self, account: Account, usage: Usage) -> None:
        """Count usage of an account."""
        with self._lock:
            self._unsaved[account] = self._unsaved.get(account, Usage()) + usage
            self._count(account, usage)

    def unsaved(self) -> dict[Account, Usage]:
        """Figures that are not saved yet; without files, all since the start."""
        with self._lock:
            return dict(self._unsaved)

    def used(self, key: str, period: Period) -> int:
        """Tokens of a key in the current day or month (UTC)."""
        today = day_of(self._clock())
        with self._lock:
            return self._used.get((key, today if period == "day" else today[:7]), 0)

    def save(self) -> bool:
        """Add the unsaved figures to the volume, and read what others have added; returns whether that succeeded."""
        if self._files is None:
            return True
        with self._saving:
            with self._lock:
                figures, self._unsaved = self._unsaved, {}
            month = day_of(self._clock())[:7]
            try:
                contents = self._files.add(figures) if figures else {}
                content = contents[month] if month in contents else self._files.read(month)
            except (OSError, SettingsError) as error:
                self._log_change(str(error))
                content = None
            else:
                self._log_change("")
            with self._lock:
                if content is None:
                    for account, usage in figures.items():
                        self._unsaved[account] = self._unsaved.get(account, Usage()) + usage
                else:
                    self._replace(month, content)
            return content is not None

    def _count(self, account: Account, usage: Usage) -> None:
        for period in (account.day, account.day[:7]):
            place = (account.key, period)
            self._used[place] = self._used.get(place, 0) + usage.tokens

    def _replace(self, month: str, content: dict[Account, Usage]) -> None:
        """Take the volume's figures of this month, and the own ones that are not saved yet."""
        self._used = {}
        for account, usage in [*content.items(), *self._unsaved.items()]:
            self._count(account, usage)

    def _save_repeatedly(self) -> None:
        while True:
            time.sleep(SAVE_SECONDS)
            self.save()

    def _log_change(self, problem: str) -> None:
        """Log once when saving fails, and once when it succeeds again."""
        if problem and not self._problem:
            log.error("cannot save the used tokens of API keys, they are kept in memory: error=%s", problem)
        elif self._problem and not problem:
            log.info("used tokens of API keys saved again")
        self._problem = problem
