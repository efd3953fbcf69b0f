"""Restart budget: the failures after which the container gives up.

Rules: five failures within an hour exhaust it; the times are stored in the run directory, so that a killed or crashed
engine program counts too; they are monotonic, so that a clock change neither removes nor adds a failure.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.errors import EngineFailedError

LIMIT = 5
WINDOW_SECONDS = 3600.0


class RestartBudget:
    """The failures of this container's engine, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def record(self) -> int:
        """Record a failure; return the number of failures within the window."""
        recent = [*self._recent(), time.monotonic()]
        write_atomic(self._path, json.dumps(recent))
        return len(recent)

    @property
    def is_exhausted(self) -> bool:
        """True if no further start is allowed."""
        return len(self._recent()) >= LIMIT

    def require(self) -> None:
        """Check that a start is allowed.

        Raises:
            EngineFailedError: the budget is exhausted.
        """
        if self.is_exhausted:
            raise EngineFailedError(f"Engine: failed {LIMIT} times within an hour.",
                                    "Correct the first failure in the log above, then restart the container.",
                                    code="restart_budget_exhausted")

    def _recent(self) -> list[float]:
        try:
            times = [float(moment) for moment in json.loads(self._path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            return []
        return [moment for moment in times if 0 <= time.monotonic() - moment < WINDOW_SECONDS]
