"""A text file that is rotated by size."""

from __future__ import annotations

import os
from pathlib import Path

from shoehorn.common.units import MIB


class RotatingFile:
    """Appends lines to a file; at `limit_bytes` the file becomes its one predecessor, `NAME.1`."""

    def __init__(self, path: Path, limit_bytes: int = 8 * MIB) -> None:
        self.path, self._limit_bytes = path, limit_bytes

    def write(self, line: str) -> None:
        """Append a line.

        Raises:
            OSError: the file cannot be written.
        """
        data = f"{line}\n".encode()
        if self.path.is_file() and self.path.stat().st_size + len(data) > self._limit_bytes:
            os.replace(self.path, self.path.with_name(f"{self.path.name}.1"))
        with self.path.open("ab") as file:
            file.write(data)
