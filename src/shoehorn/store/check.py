"""Verification of stored files against size and checksum."""

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


def check_file(directory: Path, files: Iterable[ModelFile], known: Iterable[ModelFile], report: Report,
           ) -> dict[str, ModelFile]:
    """What lies in `directory` of `files` with the right size, each with its true checksums, synced to the disk.

    Args:
        known: files that were checked before; one that did not change since is not read again.
    """
    files = tuple(files)
    by_blob = {file.path for file in files if file.blob_id}
    checked = {file.path: file for file in known
               if manifest.unchanged(directory, file) and (file.blob_id or file.path not in by_blob)}
    present = [file for file in files if file.path not in checked and size(directory, file) == file.size_bytes]
    hashed = 0
    if not present:
        return checked
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
            checked[file.path] = ModelFile(file.path, status.st_size, digest.hexdigest(), status.st_mtime_ns,
                                           blob.hexdigest() if file.blob_id else "")
    return checked


def first_mismatch(wanted: Iterable[ModelFile], checked: Mapping[str, ModelFile]) -> list[ModelFile]:
    """The files that are absent or are not what they should be."""
    return [file for file in wanted
            if not (there := checked.get(file.path)) or there.size_bytes != file.size_bytes
            or (file.sha256 and there.sha256 != file.sha256) or (file.blob_id and there.blob_id != file.blob_id)]


def marked(files: Iterable[ModelFile], checked: Mapping[str, ModelFile]) -> tuple[ModelFile, ...]:
    """`files`, the checked ones as checked."""
    files = tuple(files)
    wrong = first_mismatch(files, checked)
    return tuple(replace(file, mtime_ns=None) if file in wrong else checked[file.path] for file in files)


def unlisted_files(directory: Path, files: Iterable[ModelFile]) -> list[str]:
    """Weights in the folder that are none of `files`."""
    known = {file.path for file in files}
    return sorted(path.name for path in directory.glob("*.safetensors") if path.name not in known)


def foreign(directory: Path, strangers: Sequence[str]) -> ModelUnavailableError:
    return ModelUnavailableError(f"{directory} holds weights that are not the model's: {', '.join(strangers)}.",
                                 "Remove them: the engine could load them instead.")


def size(directory: Path, file: ModelFile) -> int | None:
    try:
        return (directory / file.path).stat().st_size
    except FileNotFoundError:
        return None
