"""Digest of a complete model: equal on two machines exactly if all of its files are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from shoehorn.common.progress import Report
from shoehorn.hub.files import ModelFile
from shoehorn.model.reference import ModelRef
from shoehorn.store import manifest
from shoehorn.store.check import verify_files
from shoehorn.store.local_folder import pulled_reference


def model_digest(models_dir: Path, ref: ModelRef, directory: Path, report: Report) -> str:
    """Return the SHA-256 over names, sizes and checksums of a model's files.

    The checksums are those of its manifest; a folder of the user without one is read.

    Args:
        directory: the complete folder; report: gets the progress of reading.
    """
    stored = pulled_reference(ref) if ref.is_local else (models_dir, ref)
    known = manifest.read(*stored) if stored else None
    files = known.files if known else tuple(verify_files(directory, _files(directory), (), report).values())
    return digest(files)


_JOURNAL = "conversion.json"
"""Journal of a conversion to INT4: how it was made, not what the engine loads."""


def digest(files: Iterable[ModelFile]) -> str:
    """Return the SHA-256 over names, sizes and checksums."""
    lines = sorted(f"{file.path}\t{file.size_bytes}\t{file.sha256}\n" for file in files if file.path != _JOURNAL)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(directory: Path) -> list[ModelFile]:
    """List the visible files of a folder and of its subfolders."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()
             and not any(part.startswith(".") for part in path.relative_to(directory).parts)]
    return [ModelFile(str(path.relative_to(directory)), path.stat().st_size, "") for path in paths]
