"""The engine's log file, rotated by size."""

from __future__ import annotations

import logging.handlers
from contextlib import suppress
from pathlib import Path

from shoehorn.common.units import MIB


class EngineLog(logging.handlers.RotatingFileHandler):
    """The engine's own lines in a file, of which one predecessor is kept, so that they never fill RUN_DIR."""

    def __init__(self, path: Path, most_bytes: int = 8 * MIB) -> None:
        super().__init__(path, maxBytes=most_bytes, backupCount=1, encoding="utf-8", delay=True)
        self.path = path

    def write(self, line: str) -> None:
        """Append a line.

        Raises:
            OSError: the file cannot be written.
        """
        self.handle(logging.makeLogRecord({"msg": line}))

    def handleError(self, record: logging.LogRecord) -> None:
        """Let go of the file, and let the caller have the error."""
        stream, self.stream = self.stream, None
        with suppress(OSError):
            if stream:
                stream.close()
        raise
