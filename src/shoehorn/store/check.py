"""Verification of stored files by size and checksum."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.common.progress import Report, report_progress
from shoehorn.hub.files import ModelFile
from shoehorn.store import manifest

_BLOCK_BYTES = 8 << 20


def verify_files(directory: Path, files: Iterable[ModelFile], known: Iterable[ModelFile], report: Report,
                 ) -> dict[str, ModelFile]:
    """Hash and sync the files of the expected size; return them with their actual checksums, by path.

    Args:
        known: files verified earlier; unchanged ones are not read.
    """
    files = tuple(files)
    by_blob = {file.path for file in files if file.blob_id}
    verified = {file.path: file for file in known
                if manifest.is_unchanged(directory, file) and (file.blob_id or file.path not in by_blob)}
    present = [file for file in files if file.path not in verified and file_size(directory, file) == file.size_bytes]
    hashed = 0
    if not present:
        return verified
    with report_progress("verifying", sum(file.size_bytes for file in present), lambda: hashed, report):
        for file in present:
            digest = hashlib.sha256()
            blob = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
            with (directory / file.path).open("rb") as opened:
                while block := opened.read(_BLOCK_BYTES):
                    digest.update(block)
                    if file.blob_id:
                        blob.update(block)
                    hashed += len(block)
                os.fsync(opened.fileno())
                status = os.fstat(opened.fileno())
            verified[file.path] = ModelFile(file.path, status.st_size, digest.hexdigest(), status.st_mtime_ns,
                                            blob.hexdigest() if file.blob_id else "")
    return verified


def mismatches(expected: Iterable[ModelFile], verified: Mapping[str, ModelFile]) -> list[ModelFile]:
    """Return the files that are missing or differ in size or checksum."""
    return [file for file in expected
            if not (actual := verified.get(file.path)) or actual.size_bytes != file.size_bytes
            or (file.sha256 and actual.sha256 != file.sha256) or (file.blob_id and actual.blob_id != file.blob_id)]


def with_results(files: Iterable[ModelFile], verified: Mapping[str, ModelFile]) -> tuple[ModelFile, ...]:
    """Return the files with the results of their verification."""
    files = tuple(files)
    failed = mismatches(files, verified)
    return tuple(replace(file, mtime_ns=None) if file in failed else verified[file.path] for file in files)


def unlisted_weights(directory: Path, files: Iterable[ModelFile]) -> list[str]:
    """Return the names of weights files in the folder that are not in `files`."""
    known = {file.path for file in files}
    return sorted(path.name for path in directory.glob("*.safetensors") if path.name not in known)


def unlisted_weights_error(directory: Path, names: Sequence[str]) -> ModelUnavailableError:
    """Return the error for weights files that are not part of the model."""
    return ModelUnavailableError(f"{directory}: contains weights that are not the model's: {', '.join(names)}.",
                                 "Delete them: the engine could load them instead.", code="unlisted_weights")


def file_size(directory: Path, file: ModelFile) -> int | None:
    """Return the size of a stored file; None if it does not exist."""
    try:
        return (directory / file.path).stat().st_size
    except FileNotFoundError:
        return None
