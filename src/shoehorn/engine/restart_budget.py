"""How often the engine may fail before the container gives up.

Rules: five failures within an hour; the times are kept in the run directory, so that a killed engine program counts as
well; times are monotonic, so that a clock that jumps neither forgives nor forges a failure.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from shoehorn.common.atomic_file import write_atomic

LIMIT = 5
WINDOW_SECONDS = 3600.0


class Restarts:
    """The failures of this container's engine, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def record(self) -> int:
        """Note a failure now; returns how many lie within the window."""
        recent = [*self._recent(), time.monotonic()]
        write_atomic(self._path, json.dumps(recent))
        return len(recent)

    @property
    def exhausted(self) -> bool:
        """No further start is allowed."""
        return len(self._recent()) >= LIMIT

    def _recent(self) -> list[float]:
        try:
            times = [float(moment) for moment in json.loads(self._path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            return []
        return [moment for moment in times if 0 <= time.monotonic() - moment < WINDOW_SECONDS]
