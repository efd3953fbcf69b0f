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

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from shoehorn import hubs, manifest, tensor_files, volume
from shoehorn.download import bytes_there, partial_path
from shoehorn.errors import ModelUnavailableError
from shoehorn.files import sync_directory
from shoehorn.hub_http import HubFailedError, HubFiles
from shoehorn.hubs import download
from shoehorn.manifest import Manifest, ModelFile
from shoehorn.progress import Progress, Report, reported
from shoehorn.settings import Settings
from shoehorn.tensor_files import Files, LocalFiles

__all__ = ["Progress", "choose", "hub_files", "locate", "pull"]

log = logging.getLogger("store")

_WANTED = ("*.json", "*.jinja", "*.tiktoken", "*.model", "tokenizer.model.*", "vocab*.txt", "merges*.txt")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pickle", "*.pkl", "*.ckpt")
_BLOCK_BYTES = 8 << 20
_FETCHES = 2


def locate(settings: Settings) -> Path | None:
    """The complete local folder of the model, or None. Asks no hub.

    Raises:
        ModelUnavailableError: MODEL_SOURCE=local and the folder holds no model, or not what its manifest says.
    """
    if settings.model_source == "local":
        return _local(settings, None)
    directory, found = _directory(settings), _completed(settings)
    if found is None:
        return None
    for file in found.files:
        if not manifest.unchanged(directory, file):
            log.warning("%s changed since it was checked; the model is checked again", file.path)
            return None
    return None if _strangers(directory, found.files) else directory


def hub_files(settings: Settings) -> Files:
    """The model's files, for a look at them: local ones when all are there, else on the hub, read by ranges."""
    directory = Path(settings.model_id).resolve() if settings.model_source == "local" else locate(settings)
    if directory is None and (known := _completed(settings)):  # `pull` settles these without the hub, most likely
        here = _directory(settings)
        directory = here if all(_size(here, file) == file.size_bytes for file in known.files) else None
    if directory is None:
        _require_online(settings)
    return LocalFiles(directory) if directory else hubs.chosen(settings, manifest.read(settings))


def pull(settings: Settings, report: Report) -> Path:
    """Fetch what is missing, check all of it, and return the folder.

    Raises:
        ModelUnavailableError: hub, volume, or a file that fails its check twice.
    """
    try:
        if settings.model_source == "local":
            return _local(settings, report) or _folder_of(settings)
        if found := locate(settings):  # needs no lock, and so no volume that can be written
            return found
        with volume.only_writer(settings):
            if settled := _settle(settings, report):
                return settled
            _require_online(settings)
            return _fetch(settings, report)
    except OSError as error:
        raise volume.trouble(settings.models_dir, error) from error


def verify(settings: Settings, report: Report) -> Path:
    """Read every byte of a complete model again, whatever its times say, and return the folder. Asks no hub.

    Raises:
        ModelUnavailableError: the model is not complete, or a file is not what it was; it is marked for the next pull.
    """
    if settings.model_source == "local":
        return _verified_local(settings, report)
    directory, known = _directory(settings), _completed(settings)
    if known is None:
        raise ModelUnavailableError(f"{settings.model_id} is not complete in {settings.models_dir}.",
                                    f"Type: shoehorn pull {settings.model_id}")
    try:
        with volume.only_writer(settings):
            checked = _check(directory, known.files, (), report)
            if wrong := _wrong(known.files, checked):
                manifest.write(settings, replace(known, complete=False, files=_marked(known.files, checked)))
                names = ", ".join(file.path for file in wrong)
                raise ModelUnavailableError(f"Not what was pulled, by size or SHA-256: {names}.",
                                            f"Type: shoehorn pull {settings.model_id} (only these are fetched again)")
    except OSError as error:
        raise volume.trouble(settings.models_dir, error) from error
    return directory


def _require_online(settings: Settings) -> None:
    if settings.offline:
        raise ModelUnavailableError(
            f"{settings.model_id} is not complete in {settings.models_dir}, and OFFLINE=yes forbids asking a hub.",
            f"On a machine with a network: shoehorn pull {settings.model_id}, then copy its MODELS_DIR here; or unset "
            "OFFLINE.")


def choose(files: Files, listing: Iterable[ModelFile], settings: Settings) -> list[ModelFile]:
    """The files of a listing that serving needs: the weights that the engine would load, configuration, tokenizer.

    Raises:
        ModelUnavailableError: no config.json, or no safetensors weights.
    """
    names = files.names()
    if "config.json" not in names:
        raise ModelUnavailableError(f"{settings.model_id} has no config.json, so it is no model that can be served.",
                                    "Choose another MODEL_ID: one with config.json and *.safetensors.")
    pickled = [name for name in names if _fits(name, _PICKLED)]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise ModelUnavailableError(f"{settings.model_id} has its weights only as {PurePosixPath(pickled[0]).name}; "
                                    "pickled files can run code and are not loaded.",
                                    "Choose another MODEL_ID: one whose files end in .safetensors.")
    shards = set(tensor_files.shards(files, names))
    wanted = (*_WANTED, "*.py") if settings.trust_remote_code else _WANTED
    return [file for file in listing if file.path in shards or _fits(file.path, wanted)]


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(PurePosixPath(path).name, pattern) for pattern in patterns)


def _folder_of(settings: Settings) -> Path:
    """The folder that MODEL_SOURCE=local names, when it holds a model."""
    directory = Path(settings.model_id)
    try:
        names = {path.name for path in directory.iterdir()}
        if "config.json" in names and any(name.endswith(".safetensors") for name in names):
            return directory.resolve()
        reason = "config.json and *.safetensors are needed"
    except OSError as error:
        reason = error.strerror or "it cannot be read"
    raise ModelUnavailableError(f"MODEL_ID={directory} holds no model: {reason}.",
                                "Set MODEL_ID to the model's folder as it is called inside the container.")


def _carried(settings: Settings) -> Settings | None:
    """For a local folder that lies as a pull left it, DIR/OWNER/NAME: the settings by which its manifest is found."""
    directory = Path(settings.model_id).resolve()
    if settings.model_source != "local" or len(directory.parts) < 4:
        return None
    stored = replace(settings, models_dir=directory.parent.parent, model_id="/".join(directory.parts[-2:]))
    return stored if manifest.location(stored).exists() else None


def _verified_local(settings: Settings, report: Report) -> Path:
    if _carried(settings) is None:
        raise ModelUnavailableError(f"Nothing tells what {settings.model_id} should hold: no pull has filled it.",
                                    "Copy a model with its manifest: shoehorn pull OWNER/NAME --to DIR, then all of "
                                    "DIR.")
    return _local(settings, report, every_byte=True) or _folder_of(settings)


def _local(settings: Settings, report: Report | None, *, every_byte: bool = False) -> Path | None:
    """The local folder, held to its manifest where it has one; None when it has to be read first, with a `report`.

    Raises:
        ModelUnavailableError: there is no model, or it is not what was pulled.
    """
    directory, stored = _folder_of(settings), _carried(settings)
    if stored is None:
        return directory
    again = "Copy it again, with its .shoehorn folder; where it comes from: shoehorn pull --verify."
    known = manifest.read(stored)
    if known is None or not known.complete:
        raise ModelUnavailableError(f"{directory} is no complete model: {manifest.location(stored)} says that its pull "
                                    "did not end.", again)
    if strangers := _strangers(directory, known.files):
        raise _foreign(directory, strangers)
    if not every_byte and all(manifest.unchanged(directory, file) for file in known.files):
        return directory
    wrong = [file for file in known.files if _size(directory, file) != file.size_bytes]
    if not wrong and report is None:
        return None
    if not wrong and report:
        checked = _check(directory, known.files, () if every_byte else known.files, report)
        wrong = _wrong(known.files, checked)
    if wrong:
        raise ModelUnavailableError(f"Not what was pulled, by size or SHA-256: "
                                    f"{', '.join(str(directory / file.path) for file in wrong)}.", again)
    try:
        manifest.write(stored, replace(known, files=_marked(known.files, checked)))
    except OSError as error:
        log.info("%s cannot be written (%s), so the model is read again at every start", manifest.location(stored),
                 error.strerror)
    return directory


def _completed(settings: Settings) -> Manifest | None:
    """The manifest, when it says that this model was complete at this revision."""
    found = manifest.read(settings)
    return found if found and found.complete and found.is_of(settings) else None


def _settle(settings: Settings, report: Report) -> Path | None:
    """The folder, when all that speaks against it are times, or a file that is not the model's. Asks no hub."""
    directory, known = _directory(settings), _completed(settings)
    if known is None:
        return None
    checked = _check(directory, known.files, known.files, report)
    if wrong := _wrong(known.files, checked):
        log.warning("not what was checked, and fetched again: %s", ", ".join(file.path for file in wrong))
        manifest.write(settings, replace(known, complete=False, files=_marked(known.files, checked)))
        _remove(directory, wrong)
        return None
    return _complete(settings, directory, known, known.files, checked)


def _fetch(settings: Settings, report: Report) -> Path:
    hub = hubs.chosen(settings, manifest.read(settings))
    try:
        return _fetch_from(hub, settings, report)
    except HubFailedError as error:  # the manifest holds the listing of this hub by now, if it gave one
        return _fetch_from(hubs.fallback(settings, hub, manifest.read(settings), error), settings, report)


def _fetch_from(hub: HubFiles, settings: Settings, report: Report) -> Path:
    directory, known = _directory(settings), manifest.read(settings)
    before = known.files if known else ()
    with hub:
        wanted = choose(hub, hub.listing(), settings)
        _require_no_code(hub, settings)
    directory.mkdir(parents=True, exist_ok=True)
    if known is None or not known.is_of(settings):  # without a checksum nothing tells what is there from what should be
        _remove(directory, [file for file in wanted if not file.sha256 and not file.blob_id], partial=True)
    checked = _check(directory, wanted, before, report)
    paths = {file.path for file in wanted}
    leftovers = [file for file in before if file.path not in paths]
    begun = Manifest(settings.model_id, settings.model_revision, hub.endpoint, False,
                     (*_marked(wanted, checked), *leftovers), hub.commit, settings.model_source)
    manifest.write(settings, begun)
    _remove(directory, leftovers, partial=True)
    for _ in range(_FETCHES):
        wrong = _wrong(wanted, checked)
        if not wrong:
            break
        _remove(directory, wrong)
        volume.require_space(directory, sum(file.size_bytes for file in wrong) - bytes_there(directory, wrong))
        download(settings, hub, directory, wanted, wrong, report)
        checked = _check(directory, wanted, tuple(checked.values()), report)
    if wrong := _wrong(wanted, checked):
        _remove(directory, wrong)
        names = ", ".join(file.path for file in wrong)
        raise ModelUnavailableError(f"These files came twice with a wrong size or checksum: {names}.",
                                    f"Try again later, or another {hub.endpoint_setting}; nothing wrong was kept.")
    if bare := sum(not file.sha256 and not file.blob_id for file in wanted):
        log.warning("the hub gives no checksum for %d of %d files: only the sizes could be checked", bare, len(wanted))
    return _complete(settings, directory, begun, wanted, checked)


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


def _check(directory: Path, files: Iterable[ModelFile], known: Iterable[ModelFile], report: Report,
           ) -> dict[str, ModelFile]:
    """What lies in `directory` of `files` with the right size, each with its true checksums, synced to the disk.

    Args:
        known: files that were checked before; one that did not change since is not read again.
    """
    files = tuple(files)
    by_blob = {file.path for file in files if file.blob_id}
    checked = {file.path: file for file in known
               if manifest.unchanged(directory, file) and (file.blob_id or file.path not in by_blob)}
    present = [file for file in files if file.path not in checked and _size(directory, file) == file.size_bytes]
    hashed = 0
    if not present:
        return checked
    with reported("verifying", sum(file.size_bytes for file in present), lambda: hashed, report):
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


def _wrong(wanted: Iterable[ModelFile], checked: Mapping[str, ModelFile]) -> list[ModelFile]:
    """The files that are absent or are not what they should be."""
    return [file for file in wanted
            if not (there := checked.get(file.path)) or there.size_bytes != file.size_bytes
            or (file.sha256 and there.sha256 != file.sha256) or (file.blob_id and there.blob_id != file.blob_id)]


def _marked(files: Iterable[ModelFile], checked: Mapping[str, ModelFile]) -> tuple[ModelFile, ...]:
    """`files`, the checked ones as checked."""
    files = tuple(files)
    wrong = _wrong(files, checked)
    return tuple(replace(file, mtime_ns=None) if file in wrong else checked[file.path] for file in files)


def _complete(settings: Settings, directory: Path, begun: Manifest, files: Iterable[ModelFile],
              checked: Mapping[str, ModelFile]) -> Path:
    files = tuple(checked[file.path] for file in files)
    if strangers := _strangers(directory, files):
        raise _foreign(directory, strangers)
    for folder in {parent for file in files for parent in (directory / file.path).parents
                   if parent.is_relative_to(settings.models_dir)}:
        sync_directory(folder)
    manifest.write(settings, replace(begun, complete=True, files=files))
    return directory


def _strangers(directory: Path, files: Iterable[ModelFile]) -> list[str]:
    """Weights in the folder that are none of `files`."""
    known = {file.path for file in files}
    return sorted(path.name for path in directory.glob("*.safetensors") if path.name not in known)


def _foreign(directory: Path, strangers: Sequence[str]) -> ModelUnavailableError:
    return ModelUnavailableError(f"{directory} holds weights that are not the model's: {', '.join(strangers)}.",
                                 "Remove them: the engine could load them instead.")


def _remove(directory: Path, files: Iterable[ModelFile], *, partial: bool = False) -> None:
    for file in files:
        (directory / file.path).unlink(missing_ok=True)
        if partial:
            partial_path(directory / file.path).unlink(missing_ok=True)


def _size(directory: Path, file: ModelFile) -> int | None:
    try:
        return (directory / file.path).stat().st_size
    except FileNotFoundError:
        return None


def _directory(settings: Settings) -> Path:
    return settings.models_dir / settings.model_id
