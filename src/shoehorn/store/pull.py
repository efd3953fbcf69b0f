"""The model store: a model id -> a local folder in which every byte was checked.

Rules:
- nothing is served from an incomplete folder: the manifest is completed last, after every size and SHA-256 matched;
- once complete the hub is asked nothing; a start compares sizes and times with the manifest, and where only the times
  differ (a copied volume) the content decides, without the hub;
- a hub's own library fetches, and what it leaves is checked here: it can return success without a file;
- safetensors, configuration and tokenizer only; Python files only with TRUST_REMOTE_CODE, pickled weights never;
- one writer for each model;
- a folder of the user's own (MODEL_SOURCE=local) is taken as it is, unless a pull has filled it: then its manifest,
  carried along, decides as in the volume, and nothing is fetched.
Layout: MODELS_DIR/OWNER/NAME holds the files, MODELS_DIR/.shoehorn the manifests and locks.
"""

from __future__ import annotations

import json
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
from shoehorn.hub.repository import HubFailedError, HubFiles
from shoehorn.hub.transfer import bytes_there, partial_path
from shoehorn.model.files import Files, LocalFiles
from shoehorn.model.reference import ModelRef
from shoehorn.store import locks, manifest, sources
from shoehorn.store.check import check_file, first_mismatch, foreign, marked, size, unlisted_files
from shoehorn.store.local_folder import folder_of, local, verified_local
from shoehorn.store.manifest import Manifest
from shoehorn.store.reference import model_reference
from shoehorn.store.selection import choose
from shoehorn.store.sources import download

log = logging.getLogger("store")

_FETCHES = 2


def locate(models_dir: Path, ref: ModelRef) -> Path | None:
    """The complete local folder of the model, or None. Asks no hub.

    Raises:
        ModelUnavailableError: MODEL_SOURCE=local and the folder holds no model, or not what its manifest says.
    """
    if ref.is_local:
        return local(ref, None)
    directory, found = ref.directory(models_dir), _completed(models_dir, ref)
    if found is None:
        return None
    for file in found.files:
        if not manifest.unchanged(directory, file):
            log.warning("%s changed since it was checked; the model is checked again", file.path)
            return None
    return None if unlisted_files(directory, found.files) else directory


def hub_files(settings: Settings, ref: ModelRef) -> Files:
    """The model's files, for a look at them: local ones when all are there, else on the hub, read by ranges."""
    models_dir = settings.models_dir
    directory = Path(ref.id).resolve() if ref.is_local else locate(models_dir, ref)
    if directory is None and (known := _completed(models_dir, ref)):  # `pull` most likely accepts these without the hub
        here = ref.directory(models_dir)
        directory = here if all(size(here, file) == file.size_bytes for file in known.files) else None
    if directory is None:
        _require_online(settings, ref)
    return LocalFiles(directory) if directory else sources.chosen(settings, ref, manifest.read(models_dir, ref))


def pull(settings: Settings, report: Report) -> Path:
    """Fetch what is missing, check all of it, and return the folder.

    Raises:
        ModelUnavailableError: hub, volume, or a file that fails its check twice.
    """
    ref = model_reference(settings)
    try:
        if ref.is_local:
            return local(ref, report) or folder_of(ref)
        if found := locate(settings.models_dir, ref):  # needs no lock, and so no volume that can be written
            return found
        with locks.only_writer(settings.models_dir, ref.stored_id):
            if accepted := _accept_existing(settings.models_dir, ref, report):
                return accepted
            _require_online(settings, ref)
            return _fetch(settings, ref, report)
    except OSError as error:
        raise disk.volume_error(settings.models_dir, error) from error


def verify(settings: Settings, report: Report) -> Path:
    """Read every byte of a complete model again, whatever its times say, and return the folder. Asks no hub.

    Raises:
        ModelUnavailableError: the model is not complete, or a file is not what it was; it is marked for the next pull.
    """
    ref, models_dir = model_reference(settings), settings.models_dir
    if ref.is_local:
        return verified_local(ref, report)
    directory, known = ref.directory(models_dir), _completed(models_dir, ref)
    if known is None:
        raise ModelUnavailableError(f"{ref.id} is not complete in {models_dir}.",
                                    f"Type: shoehorn pull {ref.id}")
    try:
        with locks.only_writer(models_dir, ref.stored_id):
            checked = check_file(directory, known.files, (), report)
            if wrong := first_mismatch(known.files, checked):
                manifest.write(models_dir, ref, replace(known, complete=False, files=marked(known.files, checked)))
                names = ", ".join(file.path for file in wrong)
                raise ModelUnavailableError(f"Not what was pulled, by size or SHA-256: {names}.",
                                            f"Type: shoehorn pull {ref.id} (only these are fetched again)")
    except OSError as error:
        raise disk.volume_error(settings.models_dir, error) from error
    return directory


def _require_online(settings: Settings, ref: ModelRef) -> None:
    if settings.offline:
        raise ModelUnavailableError(
            f"{ref.id} is not complete in {settings.models_dir}, and OFFLINE=yes forbids asking a hub.",
            f"On a machine with a network: shoehorn pull {ref.id}, then copy its MODELS_DIR here; or unset "
            "OFFLINE.")


def _completed(models_dir: Path, ref: ModelRef) -> Manifest | None:
    """The manifest, when it says that this model was complete at this revision."""
    found = manifest.read(models_dir, ref)
    return found if found and found.complete and found.is_of(ref) else None


def _accept_existing(models_dir: Path, ref: ModelRef, report: Report) -> Path | None:
    """Return the folder when its content is still as recorded, whatever its times say. Asks no hub."""
    directory, known = ref.directory(models_dir), _completed(models_dir, ref)
    if known is None:
        return None
    checked = check_file(directory, known.files, known.files, report)
    if wrong := first_mismatch(known.files, checked):
        log.warning("not what was checked, and fetched again: %s", ", ".join(file.path for file in wrong))
        manifest.write(models_dir, ref, replace(known, complete=False, files=marked(known.files, checked)))
        _remove(directory, wrong)
        return None
    return _complete(models_dir, ref, known, known.files, checked)


def _fetch(settings: Settings, ref: ModelRef, report: Report) -> Path:
    hub = sources.chosen(settings, ref, manifest.read(settings.models_dir, ref))
    try:
        return _fetch_from(hub, settings, ref, report)
    except HubFailedError as error:  # the manifest holds the listing of this hub by now, if it gave one
        known = manifest.read(settings.models_dir, ref)
        return _fetch_from(sources.fallback(settings, ref, hub, known, error), settings, ref, report)


def _fetch_from(hub: HubFiles, settings: Settings, ref: ModelRef, report: Report) -> Path:
    models_dir = settings.models_dir
    directory, known = ref.directory(models_dir), manifest.read(models_dir, ref)
    before = known.files if known else ()
    with hub:
        wanted = choose(hub, hub.listing(), settings)
        _require_no_code(hub, settings)
    directory.mkdir(parents=True, exist_ok=True)
    if known is None or not known.is_of(ref):  # without a checksum nothing tells what is there from what should be
        _remove(directory, [file for file in wanted if not file.sha256 and not file.blob_id], partial=True)
    checked = check_file(directory, wanted, before, report)
    paths = {file.path for file in wanted}
    leftovers = [file for file in before if file.path not in paths]
    begun = Manifest(ref.stored_id, ref.revision, hub.endpoint, False, (*marked(wanted, checked), *leftovers),
                     hub.commit, ref.stored_source)
    manifest.write(models_dir, ref, begun)
    _remove(directory, leftovers, partial=True)
    for _ in range(_FETCHES):
        wrong = first_mismatch(wanted, checked)
        if not wrong:
            break
        _remove(directory, wrong)
        disk.require_space(directory, sum(file.size_bytes for file in wrong) - bytes_there(directory, wrong))
        download(settings, hub, directory, wanted, wrong, report)
        checked = check_file(directory, wanted, tuple(checked.values()), report)
    if wrong := first_mismatch(wanted, checked):
        _remove(directory, wrong)
        names = ", ".join(file.path for file in wrong)
        raise ModelUnavailableError(f"These files came twice with a wrong size or checksum: {names}.",
                                    f"Try again later, or another {hub.endpoint_setting}; nothing wrong was kept.")
    if bare := sum(not file.sha256 and not file.blob_id for file in wanted):
        log.warning("the hub gives no checksum for %d of %d files: only the sizes could be checked", bare, len(wanted))
    return _complete(models_dir, ref, begun, wanted, checked)


def _require_no_code(hub: HubFiles, settings: Settings) -> None:
    if settings.trust_remote_code:
        return
    try:
        config = json.loads(hub.read("config.json"))
    except (ValueError, RecursionError) as error:
        raise ModelUnavailableError("config.json of this model is no JSON.", "Choose another MODEL_ID.") from error
    if isinstance(config, dict) and "auto_map" in config:
        raise ModelUnavailableError(f"{settings.model_id} wants to run its own Python code (auto_map in config.json).",
                                    "Set TRUST_REMOTE_CODE=yes only if you trust its author.")


def _complete(models_dir: Path, ref: ModelRef, begun: Manifest, files: Iterable[ModelFile],
              checked: Mapping[str, ModelFile]) -> Path:
    directory = ref.directory(models_dir)
    files = tuple(checked[file.path] for file in files)
    if strangers := unlisted_files(directory, files):
        raise foreign(directory, strangers)
    for folder in {parent for file in files for parent in (directory / file.path).parents
                   if parent.is_relative_to(models_dir)}:
        sync_directory(folder)
    manifest.write(models_dir, ref, replace(begun, complete=True, files=files))
    return directory


def _remove(directory: Path, files: Iterable[ModelFile], *, partial: bool = False) -> None:
    for file in files:
        (directory / file.path).unlink(missing_ok=True)
        if partial:
            partial_path(directory / file.path).unlink(missing_ok=True)
