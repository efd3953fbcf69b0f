"""Stamps of files, by which a change is noticed without reading them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileStamp:
    """Properties that change when a file does: identity, size, and the times of its content and of its entry."""

    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


def stamp(path: Path) -> FileStamp | None:
    """The stamp of a file; None where it does not exist or cannot be seen."""
    try:
        status = path.stat()
    except OSError:
        return None
    return FileStamp(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
