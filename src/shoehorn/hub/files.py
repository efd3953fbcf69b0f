"""Files of a remote repository in the listing of a hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

_LONGEST_NAME_BYTES = 240  # 255 minus the suffix that the hub's library appends to a partial file
_LONGEST_PATH_BYTES = 1024


@dataclass(frozen=True)
class ModelFile:
    """One file of a model.

    Attributes:
        path: relative to the model's folder, with `/`.
        sha256: hexadecimal; of the verified content, before verification from the listing; "" if unknown.
        mtime_ns: modification time of the verified content; None if not verified.
        blob_id: git's SHA-1 of the content, for files that the hub lists without SHA-256; else "".
    """

    path: str
    size_bytes: int
    sha256: str
    mtime_ns: int | None = None
    blob_id: str = ""


def is_plain(path: str) -> bool:
    """Return whether a path is safe: below its folder on every file system, and printable."""
    parts = PurePosixPath(path).parts
    return (path.isprintable() and "\\" not in path and not path.startswith("/") and ".." not in parts
            and "/".join(parts) == path != "" and len(path.encode()) <= _LONGEST_PATH_BYTES
            and all(len(part.encode()) <= _LONGEST_NAME_BYTES and part == part.strip() for part in parts))
