"""Files of a remote repository as a hub lists them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

_LONGEST_NAME_BYTES = 240  # 255 less what the hub's library appends to a partial file
_LONGEST_PATH_BYTES = 1024


@dataclass(frozen=True)
class ModelFile:
    """One file of a model.

    Attributes:
        path: below the model's folder, with `/`.
        sha256: hexadecimal, of the content once it was checked, before that as the hub lists it; "" where it does not.
        mtime_ns: modification time at which the content was checked; None while it was not.
        blob_id: git's SHA-1 of the content, for files that the hub lists with that and no SHA-256; else "".
    """

    path: str
    size_bytes: int
    sha256: str
    mtime_ns: int | None = None
    blob_id: str = ""


def is_plain(path: str) -> bool:
    """Whether a path stays below its folder, on every filesystem and in every log."""
    parts = PurePosixPath(path).parts
    return (path.isprintable() and "\\" not in path and not path.startswith("/") and ".." not in parts
            and "/".join(parts) == path != "" and len(path.encode()) <= _LONGEST_PATH_BYTES
            and all(len(part.encode()) <= _LONGEST_NAME_BYTES and part == part.strip() for part in parts))
