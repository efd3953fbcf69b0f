"""Selection of the hub, and fallback to the other hub.

Rules:
- the other hub is used only with MODEL_FALLBACK=yes, if the selected one is unavailable or lacks the model;
- it is used only if the SHA-256 of every weights file to load is known from the selected hub's listing or an earlier
  pull, and matches.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.common.progress import Report, report_progress
from shoehorn.config.settings import Settings, default_revision
from shoehorn.hub import huggingface_download, modelscope_download
from shoehorn.hub.files import ModelFile
from shoehorn.hub.huggingface import HuggingFaceRepository
from shoehorn.hub.modelscope import ModelScopeRepository
from shoehorn.hub.repository import HubFailedError, RemoteRepository
from shoehorn.hub.transfer import stored_bytes
from shoehorn.model import safetensors
from shoehorn.model.reference import ModelRef
from shoehorn.store.manifest import Manifest

log = logging.getLogger("store")

_HUBS: dict[str, type[ModelScopeRepository] | type[HuggingFaceRepository]] = {
    "modelscope": ModelScopeRepository, "huggingface": HuggingFaceRepository}
_DOWNLOADS = {"modelscope": modelscope_download.download, "huggingface": huggingface_download.download}
_OTHER = {"modelscope": "huggingface", "huggingface": "modelscope"}


def open_repository(settings: Settings, ref: ModelRef, known: Manifest | None) -> RemoteRepository:
    """Return the repository on the hub of MODEL_SOURCE, or on its fallback.

    Args:
        known: manifest of an earlier pull.

    Raises:
        ModelUnavailableError: the fallback is required but not permitted.
    """
    hub = _HUBS[ref.source](settings, ref.id, ref.revision)
    if settings.model_fallback:
        try:
            hub.listing()
        except HubFailedError as error:
            return open_fallback(settings, ref, hub, known, error)
    return hub


def open_fallback(settings: Settings, ref: ModelRef, hub: RemoteRepository, known: Manifest | None,
                  cause: HubFailedError) -> RemoteRepository:
    """Return the repository on the other hub, after `hub` failed with `cause`.

    Raises:
        HubFailedError: `cause`, if no fallback is permitted.
        ModelUnavailableError: the weights on the other hub are not known to be identical.
    """
    if not settings.model_fallback or hub.source != ref.source:
        raise cause
    hub.close()
    source = _OTHER[hub.source]
    revision = default_revision(source) if ref.revision == default_revision(ref.source) else ref.revision
    weights = {file.path: file.sha256 for file in known.files if file.path.endswith(".safetensors")
               } if known and known.matches(ref) else {}
    if not weights or not all(weights.values()):
        raise ModelUnavailableError(
            f"{cause.cause} MODEL_FALLBACK: the SHA-256 of the weights of {ref.id} is unknown, so the weights on "
            f"{source} cannot be compared.",
            f"Retry later, or trust the other hub: MODEL_SOURCE={source}", code="fallback_unverified")
    other = _HUBS[source](settings, ref.id, revision)
    try:
        hashes = {file.path: file.sha256 for file in other.listing()}
    except HubFailedError as error:
        raise HubFailedError(f"{cause.cause} MODEL_FALLBACK: {error.cause}", cause.remedy,
                             code="fallback_failed") from error
    needed = safetensors.shards(other, other.names())
    different = sorted({path for path in {*needed, *weights} if not hashes.get(path)
                        or hashes[path] != weights.get(path) or path not in needed})
    if different:
        other.close()
        raise ModelUnavailableError(
            f"{cause.cause} MODEL_FALLBACK: SHA-256 mismatch on {source} of {ref.id} at revision {revision}: "
            f"{', '.join(different)}.",
            f"Retry later, or use the weights of that hub: MODEL_SOURCE={source}", code="fallback_mismatch")
    log.warning("Falling back to the other hub, weights are identical endpoint=%s cause=%s", other.endpoint,
                cause.cause.rstrip("."))
    return other


def download(settings: Settings, hub: RemoteRepository, directory: Path, selected: Sequence[ModelFile],
             needed: Sequence[ModelFile], report: Report) -> None:
    """Download `needed` to `directory`, and report the stored bytes of `selected`.

    Raises:
        ModelUnavailableError: a file is unavailable; other and partial files are kept.
    """
    total_bytes = sum(file.size_bytes for file in selected)
    with report_progress("pulling", total_bytes, lambda: stored_bytes(directory, selected), report):
        _DOWNLOADS[hub.source](settings, hub, directory, needed)
