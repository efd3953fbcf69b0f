"""Models in a folder of the user (MODEL_SOURCE=local)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.common.progress import Report
from shoehorn.model.reference import ModelRef
from shoehorn.store import manifest
from shoehorn.store.check import (
    file_size,
    mismatches,
    unlisted_weights,
    unlisted_weights_error,
    verify_files,
    with_results,
)

log = logging.getLogger("store")


def require_local_folder(ref: ModelRef) -> Path:
    """Return the folder of the model.

    Raises:
        ModelUnavailableError: the folder does not contain a model.
    """
    directory = Path(ref.id)
    try:
        names = {path.name for path in directory.iterdir()}
        if "config.json" in names and any(name.endswith(".safetensors") for name in names):
            return directory.resolve()
    except OSError as error:
        names = {directory.name}
        reason, remedy = error.strerror or "cannot be read", _FOLDER
    else:
        reason, remedy = "config.json or *.safetensors missing", _FOLDER
    other = _other_format(names)
    if other:
        reason, remedy = other
    raise ModelUnavailableError(f"MODEL_ID={directory}: not a model: {reason}.", remedy, code="invalid_model_folder")


_FOLDER = "Set MODEL_ID to the path of the model's folder inside the container."


def _other_format(names: Iterable[str]) -> tuple[str, str] | None:
    """Recognize files that other programs load: (what is wrong, remedy); None without any."""
    first = {suffix: min(name for name in names if name.endswith(suffix))
             for suffix in (".gguf", ".bin", ".pt", ".pth") if any(name.endswith(suffix) for name in names)}
    if ".gguf" in first:
        return (f"GGUF files are unsupported ({first['.gguf']})",
                "Set MODEL_ID to the repository or folder that it was made from, with config.json and *.safetensors.")
    if "adapter_config.json" in names:
        return ("it is a LoRA adapter",
                "Set MODEL_ID to its base model, and VLLM_EXTRA_ARGS=--enable-lora --lora-modules NAME=FOLDER.")
    if first:
        return (f"its weights are pickled ({min(first.values())}), and loading them would execute code",
                "Convert them to safetensors, or choose a repository with *.safetensors.")
    return None


def pulled_reference(ref: ModelRef) -> tuple[Path, ModelRef] | None:
    """Return (DIR, reference of the manifest) for a folder DIR/OWNER/NAME that a pull created; else None."""
    directory = Path(ref.id).resolve()
    if not ref.is_local or len(directory.parts) < 4:
        return None
    stored = directory.parent.parent, replace(ref, id="/".join(directory.parts[-2:]))
    return stored if manifest.location(*stored).exists() else None


def verify_local(ref: ModelRef, report: Report) -> Path:
    """Verify every byte of a folder that a pull created.

    Raises:
        ModelUnavailableError: no manifest, or a mismatch.
    """
    if pulled_reference(ref) is None:
        raise ModelUnavailableError(f"{ref.id}: no manifest, so it cannot be verified.",
                                    "Copy a model with its manifest: shoehorn pull OWNER/NAME --to DIR, then copy all "
                                    "of DIR.", code="no_manifest")
    return locate_local(ref, report, every_byte=True) or require_local_folder(ref)


def locate_local(ref: ModelRef, report: Report | None, *, every_byte: bool = False) -> Path | None:
    """Return the folder after a check against its manifest, if it has one.

    Args:
        report: None if files may not be read; the result is then None if they would have to be.

    Raises:
        ModelUnavailableError: no model, or a mismatch.
    """
    directory, stored = require_local_folder(ref), pulled_reference(ref)
    if stored is None:
        return directory
    remedy = "Copy it again, with its .shoehorn folder; verify the source with: shoehorn pull --verify."
    known = manifest.read(*stored)
    if known is None or not known.complete:
        raise ModelUnavailableError(f"{directory}: incomplete; its pull did not finish ({manifest.location(*stored)}).",
                                    remedy, code="incomplete_model")
    if unlisted := unlisted_weights(directory, known.files):
        raise unlisted_weights_error(directory, unlisted)
    if not every_byte and all(manifest.is_unchanged(directory, file) for file in known.files):
        return directory
    failed = [file for file in known.files if file_size(directory, file) != file.size_bytes]
    if not failed and report is None:
        return None
    if not failed and report:
        verified = verify_files(directory, known.files, () if every_byte else known.files, report)
        failed = mismatches(known.files, verified)
    if failed:
        names = ", ".join(str(directory / file.path) for file in failed)
        raise ModelUnavailableError(f"{names}: size or SHA-256 mismatch.", remedy, code="checksum_mismatch")
    try:
        manifest.write(*stored, replace(known, files=with_results(known.files, verified)))
    except OSError as error:
        log.info("Cannot update the manifest, verifying at every start path=%s error=%s", manifest.location(*stored),
                 error.strerror)
    return directory
