"""Model store: a model reference -> a local folder in which every byte is verified.

Rules:
- an incomplete folder is never served: the manifest is completed last, after every size and SHA-256 matched;
- a complete model needs no hub. A start compares sizes and times with the manifest; if only times differ (a copied
  volume), the content is verified;
- the hub's library downloads, and this module verifies its files: it can return success without a file;
- only safetensors, configuration and tokenizer; Python files only with TRUST_REMOTE_CODE, pickled weights never;
- one writer for each model;
- a folder of the user (MODEL_SOURCE=local) is used unverified, unless a pull created it: then its manifest applies as
  in the volume, and nothing is downloaded.
Layout: see `config.models_dir`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from shoehorn.common import disk
from shoehorn.common.atomic_file import sync_directory
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.common.progress import Report
from shoehorn.config.settings import Settings
from shoehorn.hub.files import ModelFile
from shoehorn.hub.repository import HubFailedError, RemoteRepository
from shoehorn.hub.transfer import partial_path, stored_bytes
from shoehorn.model.files import Files, LocalFiles
from shoehorn.model.reference import ModelRef
from shoehorn.store import locks, manifest, sources
from shoehorn.store.check import (
    file_size,
    mismatches,
    unlisted_weights,
    unlisted_weights_error,
    verify_files,
    with_results,
)
from shoehorn.store.local_folder import locate_local, require_local_folder, verify_local
from shoehorn.store.manifest import Manifest
from shoehorn.store.model_check import check_model
from shoehorn.store.reference import model_reference
from shoehorn.store.selection import select_files
from shoehorn.store.sources import download

log = logging.getLogger("store")

_MAX_DOWNLOADS = 2


def locate(models_dir: Path, ref: ModelRef) -> Path | None:
    """Return the folder of the complete model, or None. Contacts no hub.

    Raises:
        ModelUnavailableError: MODEL_SOURCE=local and the folder contains no model, or contradicts its manifest.
    """
    if ref.is_local:
        return locate_local(ref, None)
    directory, known = ref.directory(models_dir), _complete_manifest(models_dir, ref)
    if known is None:
        return None
    for file in known.files:
        if not manifest.is_unchanged(directory, file):
            log.warning("File changed since its verification, verifying the model again file=%s", file.path)
            return None
    return None if unlisted_weights(directory, known.files) else directory


def hub_files(settings: Settings, ref: ModelRef) -> Files:
    """Return the model's files for inspection: local ones if complete, else those on the hub, read by ranges."""
    models_dir = settings.models_dir
    directory = Path(ref.id).resolve() if ref.is_local else locate(models_dir, ref)
    if directory is None and (known := _complete_manifest(models_dir, ref)):  # `pull` accepts these unless damaged
        stored = ref.directory(models_dir)
        directory = stored if all(file_size(stored, file) == file.size_bytes for file in known.files) else None
    if directory is None:
        _require_online(settings, ref)
    if directory:
        return LocalFiles(directory)
    return sources.open_repository(settings, ref, manifest.read(models_dir, ref))


def pull(settings: Settings, report: Report) -> Path:
    """Download missing files, verify all, and return the folder.

    Raises:
        ModelUnavailableError: hub or volume failed, a file failed verification twice, or the engine cannot serve the
            model.
    """
    ref = model_reference(settings)
    try:
        if ref.is_local:
            return _checked(locate_local(ref, report) or require_local_folder(ref), settings)
        if directory := locate(settings.models_dir, ref):  # needs no lock: the volume may be read-only
            return _checked(directory, settings)
        with locks.write_lock(settings.models_dir, ref.stored_id):
            if accepted := _accept_existing(settings.models_dir, ref, report):
                return _checked(accepted, settings)
            _require_online(settings, ref)
            return _fetch(settings, ref, report)
    except OSError as error:
        raise disk.volume_error(settings.models_dir, error) from error


def verify(settings: Settings, report: Report) -> Path:
    """Verify every byte of a complete model, and return the folder. Contacts no hub.

    Raises:
        ModelUnavailableError: the model is incomplete, or a file does not match; the next pull downloads it again.
    """
    ref, models_dir = model_reference(settings), settings.models_dir
    if ref.is_local:
        return verify_local(ref, report)
    directory, known = ref.directory(models_dir), _complete_manifest(models_dir, ref)
    if known is None:
        raise ModelUnavailableError(f"{ref.id}: not complete in {models_dir}.",
                                    f"Run: shoehorn pull {ref.id}", code="incomplete_model")
    try:
        with locks.write_lock(models_dir, ref.stored_id):
            verified = verify_files(directory, known.files, (), report)
            if failed := mismatches(known.files, verified):
                files = with_results(known.files, verified)
                manifest.write(models_dir, ref, replace(known, complete=False, files=files))
                names = ", ".join(file.path for file in failed)
                raise ModelUnavailableError(f"{names}: size or SHA-256 mismatch.",
                                            f"Run: shoehorn pull {ref.id} (downloads only these files)",
                                            code="checksum_mismatch")
    except OSError as error:
        raise disk.volume_error(settings.models_dir, error) from error
    return directory


def _require_online(settings: Settings, ref: ModelRef) -> None:
    if settings.offline:
        raise ModelUnavailableError(
            f"{ref.id}: not complete in {settings.models_dir}, and OFFLINE=yes forbids a download.",
            f"On a machine with a network: shoehorn pull {ref.id}, then copy its MODELS_DIR here; or unset "
            "OFFLINE.", code="offline")


def _complete_manifest(models_dir: Path, ref: ModelRef) -> Manifest | None:
    """Return the manifest if this model is complete at this revision."""
    known = manifest.read(models_dir, ref)
    return known if known and known.complete and known.matches(ref) else None


def _accept_existing(models_dir: Path, ref: ModelRef, report: Report) -> Path | None:
    """Return the folder if its content matches the manifest, whatever its times. Contacts no hub."""
    directory, known = ref.directory(models_dir), _complete_manifest(models_dir, ref)
    if known is None:
        return None
    verified = verify_files(directory, known.files, known.files, report)
    if failed := mismatches(known.files, verified):
        log.warning("Checksum mismatch, downloading again files=%s", ",".join(file.path for file in failed))
        manifest.write(models_dir, ref, replace(known, complete=False, files=with_results(known.files, verified)))
        _remove(directory, failed)
        return None
    return _complete(models_dir, ref, known, known.files, verified)


def _fetch(settings: Settings, ref: ModelRef, report: Report) -> Path:
    hub = sources.open_repository(settings, ref, manifest.read(settings.models_dir, ref))
    try:
        return _fetch_from(hub, settings, ref, report)
    except HubFailedError as error:  # the manifest now contains the listing of this hub, if it returned one
        known = manifest.read(settings.models_dir, ref)
        return _fetch_from(sources.open_fallback(settings, ref, hub, known, error), settings, ref, report)


def _fetch_from(hub: RemoteRepository, settings: Settings, ref: ModelRef, report: Report) -> Path:
    models_dir = settings.models_dir
    directory, known = ref.directory(models_dir), manifest.read(models_dir, ref)
    recorded = known.files if known else ()
    with hub:
        selected = select_files(hub, hub.listing(), settings)
        check_model(hub, settings)
    directory.mkdir(parents=True, exist_ok=True)
    if known is None or not known.matches(ref):  # without a checksum these cannot be verified
        _remove(directory, [file for file in selected if not file.sha256 and not file.blob_id], partial=True)
    verified = verify_files(directory, selected, recorded, report)
    paths = {file.path for file in selected}
    obsolete = [file for file in recorded if file.path not in paths]
    incomplete = Manifest(ref.stored_id, ref.revision, hub.endpoint, False,
                          (*with_results(selected, verified), *obsolete), hub.commit, ref.stored_source)
    manifest.write(models_dir, ref, incomplete)
    _remove(directory, obsolete, partial=True)
    for _ in range(_MAX_DOWNLOADS):
        missing = mismatches(selected, verified)
        if not missing:
            break
        _remove(directory, missing)
        disk.require_space(directory, sum(file.size_bytes for file in missing) - stored_bytes(directory, missing))
        download(settings, hub, directory, selected, missing, report)
        verified = verify_files(directory, selected, tuple(verified.values()), report)
    if failed := mismatches(selected, verified):
        _remove(directory, failed)
        names = ", ".join(file.path for file in failed)
        raise ModelUnavailableError(f"{names}: size or checksum mismatch in two downloads.",
                                    f"Retry later, or set another {hub.endpoint_setting}; no invalid file was kept.",
                                    code="hub_checksum_mismatch")
    if unverifiable := sum(not file.sha256 and not file.blob_id for file in selected):
        log.warning("Hub lists no checksum, verified the size only files=%d total=%d", unverifiable, len(selected))
    return _complete(models_dir, ref, incomplete, selected, verified)


def _checked(directory: Path, settings: Settings) -> Path:
    """Return the folder of a model that the engine can serve."""
    check_model(LocalFiles(directory), settings)
    return directory


def _complete(models_dir: Path, ref: ModelRef, incomplete: Manifest, files: Iterable[ModelFile],
              verified: Mapping[str, ModelFile]) -> Path:
    directory = ref.directory(models_dir)
    files = tuple(verified[file.path] for file in files)
    if unlisted := unlisted_weights(directory, files):
        raise unlisted_weights_error(directory, unlisted)
    for folder in {parent for file in files for parent in (directory / file.path).parents
                   if parent.is_relative_to(models_dir)}:
        sync_directory(folder)
    manifest.write(models_dir, ref, replace(incomplete, complete=True, files=files))
    return directory


def _remove(directory: Path, files: Iterable[ModelFile], *, partial: bool = False) -> None:
    for file in files:
        (directory / file.path).unlink(missing_ok=True)
        if partial:
            partial_path(directory / file.path).unlink(missing_ok=True)
