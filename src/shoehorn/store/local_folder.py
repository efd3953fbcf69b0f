"""Models in a local folder."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.common.progress import Report
from shoehorn.model.reference import ModelRef
from shoehorn.store import manifest
from shoehorn.store.check import check_file, first_mismatch, foreign, marked, size, unlisted_files

log = logging.getLogger("store")


def folder_of(ref: ModelRef) -> Path:
    """The folder that MODEL_SOURCE=local names, when it holds a model."""
    directory = Path(ref.id)
    try:
        names = {path.name for path in directory.iterdir()}
        if "config.json" in names and any(name.endswith(".safetensors") for name in names):
            return directory.resolve()
        reason = "config.json and *.safetensors are needed"
    except OSError as error:
        reason = error.strerror or "it cannot be read"
    raise ModelUnavailableError(f"MODEL_ID={directory} holds no model: {reason}.",
                                "Set MODEL_ID to the model's folder as it is called inside the container.")


def _carried(ref: ModelRef) -> tuple[Path, ModelRef] | None:
    """For a local folder that a pull has filled, DIR/OWNER/NAME: (DIR, reference of its manifest)."""
    directory = Path(ref.id).resolve()
    if not ref.is_local or len(directory.parts) < 4:
        return None
    stored = directory.parent.parent, replace(ref, id="/".join(directory.parts[-2:]))
    return stored if manifest.location(*stored).exists() else None


def verified_local(ref: ModelRef, report: Report) -> Path:
    if _carried(ref) is None:
        raise ModelUnavailableError(f"Nothing tells what {ref.id} should hold: no pull has filled it.",
                                    "Copy a model with its manifest: shoehorn pull OWNER/NAME --to DIR, then all of "
                                    "DIR.")
    return local(ref, report, every_byte=True) or folder_of(ref)


def local(ref: ModelRef, report: Report | None, *, every_byte: bool = False) -> Path | None:
    """The local folder, held to its manifest where it has one; None when it has to be read first, with a `report`.

    Raises:
        ModelUnavailableError: there is no model, or it is not what was pulled.
    """
    directory, stored = folder_of(ref), _carried(ref)
    if stored is None:
        return directory
    again = "Copy it again, with its .shoehorn folder; where it comes from: shoehorn pull --verify."
    known = manifest.read(*stored)
    if known is None or not known.complete:
        raise ModelUnavailableError(f"{directory} is no complete model: {manifest.location(*stored)} says that its "
                                    "pull did not end.", again)
    if strangers := unlisted_files(directory, known.files):
        raise foreign(directory, strangers)
    if not every_byte and all(manifest.unchanged(directory, file) for file in known.files):
        return directory
    wrong = [file for file in known.files if size(directory, file) != file.size_bytes]
    if not wrong and report is None:
        return None
    if not wrong and report:
        checked = check_file(directory, known.files, () if every_byte else known.files, report)
        wrong = first_mismatch(known.files, checked)
    if wrong:
        raise ModelUnavailableError(f"Not what was pulled, by size or SHA-256: "
                                    f"{', '.join(str(directory / file.path) for file in wrong)}.", again)
    try:
        manifest.write(*stored, replace(known, files=marked(known.files, checked)))
    except OSError as error:
        log.info("%s cannot be written (%s), so the model is read again at every start", manifest.location(*stored),
                 error.strerror)
    return directory
