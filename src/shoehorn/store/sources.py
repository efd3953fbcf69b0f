"""The hubs that a model can come from: which one is asked, and when the other may take its place.

Rules:
- the other hub is asked only with MODEL_FALLBACK=yes, when the chosen one cannot be reached or lacks something;
- it may give a model only where the SHA-256 of every weights file that would be loaded from it is known, from the
  chosen hub's listing or an earlier pull that recorded one, and agrees.
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
from shoehorn.hub.huggingface import HuggingFaceHub
from shoehorn.hub.modelscope import Hub
from shoehorn.hub.repository import HubFailedError, HubFiles
from shoehorn.hub.transfer import bytes_there
from shoehorn.model import safetensors
from shoehorn.model.reference import ModelRef
from shoehorn.store.manifest import Manifest

log = logging.getLogger("store")

_HUBS: dict[str, type[Hub] | type[HuggingFaceHub]] = {"modelscope": Hub, "huggingface": HuggingFaceHub}
_DOWNLOADS = {"modelscope": modelscope_download.download, "huggingface": huggingface_download.download}
_OTHER = {"modelscope": "huggingface", "huggingface": "modelscope"}


def chosen(settings: Settings, ref: ModelRef, known: Manifest | None) -> HubFiles:
    """The hub to read the model from: the one of MODEL_SOURCE, or in its place the other.

    Args:
        known: what an earlier pull recorded.

    Raises:
        ModelUnavailableError: the fallback was needed, and refused.
    """
    hub = _HUBS[ref.source](settings, ref.id, ref.revision)
    if settings.model_fallback:
        try:
            hub.listing()
        except HubFailedError as error:
            return fallback(settings, ref, hub, known, error)
    return hub


def fallback(settings: Settings, ref: ModelRef, hub: HubFiles, known: Manifest | None,
             cause: HubFailedError) -> HubFiles:
    """The other hub, in place of `hub` that failed with `cause`.

    Raises:
        HubFailedError: `cause`, when no other hub may be asked.
        ModelUnavailableError: the other hub's weights are not known to be the same.
    """
    if not settings.model_fallback or hub.source != ref.source:
        raise cause
    hub.close()
    source = _OTHER[hub.source]
    revision = default_revision(source) if ref.revision == default_revision(ref.source) else ref.revision
    weights = {file.path: file.sha256 for file in known.files if file.path.endswith(".safetensors")
               } if known and known.is_of(ref) else {}
    if not weights or not all(weights.values()):
        raise ModelUnavailableError(
            f"{cause.cause} MODEL_FALLBACK does not help: no SHA-256 of the weights of {ref.id} is known, "
            f"and so nothing tells whether {source} has the same.",
            f"Try again later, or trust the other hub as it is: MODEL_SOURCE={source}")
    other = _HUBS[source](settings, ref.id, revision)
    try:
        there = {file.path: file.sha256 for file in other.listing()}
    except HubFailedError as error:
        raise HubFailedError(f"{cause.cause} Nor does the other hub help: {error.cause}", cause.remedy) from error
    needed = safetensors.shards(other, other.names())
    different = sorted({path for path in {*needed, *weights} if not there.get(path) or there[path] != weights.get(path)
                        or path not in needed})
    if different:
        other.close()
        raise ModelUnavailableError(
            f"{cause.cause} {source} has other weights of {ref.id} at revision {revision}, by their "
            f"SHA-256: {', '.join(different)}.",
            f"Try again later, or take what that hub has: MODEL_SOURCE={source}")
    log.warning("%s; the weights at %s are the same, and it is used instead", cause.cause.rstrip("."), other.endpoint)
    return other


def download(settings: Settings, hub: HubFiles, directory: Path, wanted: Sequence[ModelFile],
             needed: Sequence[ModelFile], report: Report) -> None:
    """Fetch `needed` into `directory`, reporting how much of `wanted` is there.

    Raises:
        ModelUnavailableError: some file could not be had; the others and partial ones are kept.
    """
    with report_progress("pulling", sum(file.size_bytes for file in wanted), lambda: bytes_there(directory, wanted),
                         report):
        _DOWNLOADS[hub.source](settings, hub, directory, needed)
