"""Times of admitted requests in a file, so that limits on requests per minute survive a restart of the engine.

Rules: a time is written before its request is answered; times are of the machine's monotonic clock, which all processes
share; times that have left the window are removed as the file grows; a failure to write is logged once and stops no
request.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from shoehorn.common.atomic_file import write_atomic
from shoehorn_vllm.api.limits import WINDOW_SECONDS
from shoehorn_vllm.protocol import ADMISSIONS_VARIABLE

log = logging.getLogger("vllm.shoehorn.limits")

_MOST_LINES = 4096
"""Lines after which the file is reduced to those that still count."""


class AdmissionLog:
    """The file of one API server; None keeps nothing."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._lines = 0
        self._limit = _MOST_LINES
        self._is_logged = False

    @classmethod
    def from_environment(cls) -> AdmissionLog:
        """Open the file that the engine program names."""
        name = os.environ.get(ADMISSIONS_VARIABLE)
        return cls(Path(name) if name else None)

    def read(self, now: float) -> dict[str, list[float]]:
        """Read the times within the window before `now`, by key, earliest first."""
        times: defaultdict[str, list[float]] = defaultdict(list)
        for moment, key in self._entries():
            if now - WINDOW_SECONDS < moment <= now:
                times[key].append(moment)
        return dict(times)

    def append(self, key: str, now: float) -> None:
        """Record an admitted request."""
        if self._file is None:
            return
        try:
            if self._lines >= self._limit:
                self._reduce(now)
            with self._file.open("a", encoding="ascii") as opened:
                opened.write(f"{now!r} {key}\n")
            self._lines += 1
        except OSError as error:
            if not self._is_logged:
                log.warning("cannot record admitted requests, a restart forgets them: error=%s", error)
            self._is_logged = True

    def _reduce(self, now: float) -> None:
        assert self._file is not None  # noqa: S101  # checked by the caller
        lines = [f"{moment!r} {key}\n" for moment, key in self._entries() if now - WINDOW_SECONDS < moment <= now]
        write_atomic(self._file, "".join(lines), 0o600)
        self._lines, self._limit = len(lines), max(_MOST_LINES, 2 * len(lines))

    def _entries(self) -> Iterator[tuple[float, str]]:
        """Parse the lines; one that was cut off is skipped."""
        try:
            text = self._file.read_text(encoding="ascii", errors="replace") if self._file else ""
        except OSError:
            return
        for line in text.splitlines(keepends=True):
            moment, _, key = line.rstrip("\n").partition(" ")
            try:
                if line.endswith("\n") and key:
                    yield float(moment), key
            except ValueError:
                continue
