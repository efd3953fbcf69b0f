"""The model store: a model id -> a local folder in which every byte was checked.

Rules:
- nothing is served from an incomplete folder: the manifest is written last, after every size and SHA-256 matched;
- once complete the hub is asked nothing; a start compares sizes and times with the manifest;
- the hub's own library fetches, and what it leaves is checked here: it can return success without a file;
- safetensors, configuration and tokenizer only; Python files only with TRUST_REMOTE_CODE, pickled weights never;
- one writer for each model, by a lock that the kernel drops when its holder dies.
Layout: MODELS_DIR/OWNER/NAME holds the files, MODELS_DIR/.shoehorn manifests and locks.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from shoehorn.checkpoint import Files, LocalFiles
from shoehorn.errors import ModelUnavailableError
from shoehorn.files import sync_directory, write_atomic
from shoehorn.hub import Hub, RemoteFile
from shoehorn.settings import Settings
from shoehorn.units import format_size

log = logging.getLogger("store")

_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.tiktoken", "tokenizer.model", "vocab*.txt", "merges.txt")
_BLOCK_BYTES = 8 << 20
_SPARE = 1.02
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Progress:
    """A moment of a pull. `rate_bytes_per_second` is 0 while unknown."""

    phase: str
    bytes_done: int
    bytes_total: int
    rate_bytes_per_second: float


def locate(settings: Settings) -> Path | None:
    """The complete local folder of the model, or None. Asks no hub.

    Raises:
        ModelUnavailableError: MODEL_SOURCE=local and the folder holds no model.
    """
    if settings.model_source == "local":
        return _local(Path(settings.model_id))
    directory = _directory(settings)
    try:
        manifest = json.loads(_manifest(settings).read_text(encoding="utf-8"))
        if manifest["version"] != MANIFEST_VERSION or manifest["revision"] != settings.model_revision:
            return None
        for file in manifest["files"]:
            status = (directory / file["path"]).stat()
            if (status.st_size, status.st_mtime_ns) != (file["size_bytes"], file["mtime_ns"]):
                log.warning("%s changed since it was checked; the model is checked again", file["path"])
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return directory


def hub_files(settings: Settings) -> Files:
    """The model's files where they are: local when complete, else on the hub, read by ranges."""
    directory = locate(settings)
    return LocalFiles(directory) if directory else Hub(settings)


def pull(settings: Settings, report: Callable[[Progress], None]) -> Path:
    """Fetch what is missing, check all of it, and return the folder.

    Raises:
        ModelUnavailableError: hub, disk or a file that fails its check twice.
    """
    with _locked(settings):
        if found := locate(settings):
            return found
        directory = _directory(settings)
        hub = Hub(settings)
        wanted = choose(hub.listing(), settings)
        _require_trust(hub, wanted, settings)
        _require_disk(directory, wanted)
        bad = list(wanted)
        for _attempt in range(2):
            _fetch(settings, directory, wanted, bad, report)
            bad = _verify(directory, wanted, report)
            if not bad:
                return _complete(settings, directory, wanted)
            for file in bad:
                (directory / file.path).unlink(missing_ok=True)
        names = ", ".join(file.path for file in bad)
        raise ModelUnavailableError(f"These files came twice with a wrong size or checksum: {names}.",
                                    "Try again later, or another MODELSCOPE_ENDPOINT; nothing of them was kept.")


def choose(listing: tuple[RemoteFile, ...], settings: Settings) -> list[RemoteFile]:
    """The files of a listing that serving needs.

    Raises:
        ModelUnavailableError: no safetensors weights among them.
    """
    patterns = (*_WANTED, "*.py") if settings.trust_remote_code else _WANTED
    wanted = [file for file in listing if any(fnmatch(Path(file.path).name, pattern) for pattern in patterns)]
    if not any(file.path.endswith(".safetensors") for file in wanted):
        raise ModelUnavailableError(f"{settings.model_id} has no weights in safetensors format.",
                                    "Choose another MODEL_ID; pickled weights are not loaded, they can run code.")
    return wanted


def _local(directory: Path) -> Path:
    if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
        raise ModelUnavailableError(f"MODEL_ID={directory} holds no model: config.json and *.safetensors are needed.",
                                    "Set MODEL_ID to the model's folder as it is called inside the container.")
    return directory.resolve()


def _require_trust(hub: Hub, wanted: list[RemoteFile], settings: Settings) -> None:
    if settings.trust_remote_code or not any(file.path == "config.json" for file in wanted):
        return
    try:
        remote_code = "auto_map" in json.loads(hub.read("config.json"))
    except ValueError as error:
        raise ModelUnavailableError("config.json of this model is no JSON.", "Choose another MODEL_ID.") from error
    if remote_code:
        raise ModelUnavailableError(f"{settings.model_id} wants to run its own Python code (auto_map).",
                                    "Set TRUST_REMOTE_CODE=yes only if you trust its author.")


def _require_disk(directory: Path, wanted: list[RemoteFile]) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelUnavailableError(f"{directory} cannot be written: {error.strerror}.",
                                    f"Give the volume to user {os.geteuid()}: sudo chown -R {os.geteuid()} FOLDER"
                                    ) from error
    missing = sum(file.size_bytes for file in wanted) - _bytes_there(directory, wanted)
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if missing * _SPARE > free:
        raise ModelUnavailableError(
            f"The volume is too small: {format_size(round(missing * _SPARE))} are still needed, "
            f"{format_size(free)} are free.", "Free space there, or mount a larger volume at MODELS_DIR.")


def _fetch(settings: Settings, directory: Path, wanted: list[RemoteFile], needed: list[RemoteFile],
           report: Callable[[Progress], None]) -> None:
    """Let the library fetch `needed`, reporting what arrives."""
    home = settings.run_dir / "modelscope"  # its credentials folder is unpickled: never one that others may write
    os.environ.update({
        "MODELSCOPE_HOME": str(home), "MODELSCOPE_CREDENTIALS_PATH": str(home / "credentials"),
        "MODELSCOPE_CACHE": str(settings.models_dir / ".shoehorn" / "modelscope"),
        "MODELSCOPE_API_TOKEN": settings.modelscope_api_token or "", "MODELSCOPE_DOWNLOAD_INTRA_CLOUD": "false",
        "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": "86400", "MODELSCOPE_LOG_LEVEL": "40", "TQDM_DISABLE": "1",
        **({"MODELSCOPE_ENDPOINT": settings.modelscope_endpoint} if settings.modelscope_endpoint else {})})
    from modelscope.hub.snapshot_download import snapshot_download  # reads its environment at import
    from modelscope_hub.errors import HubError

    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(directory, wanted, report, done), daemon=True)
    watcher.start()
    try:
        snapshot_download(settings.model_id, revision=settings.model_revision, local_dir=str(directory),
                          allow_patterns=[file.path for file in needed])
    except (HubError, OSError) as error:  # requests' errors are OSErrors too
        raise ModelUnavailableError(f"The download stopped: {error}",
                                    "Start again; it goes on where it stopped.") from error
    finally:
        done.set()
        watcher.join()


def _watch(directory: Path, wanted: list[RemoteFile], report: Callable[[Progress], None],
           done: threading.Event) -> None:
    total = sum(file.size_bytes for file in wanted)
    begun, most = time.monotonic(), 0
    first = _bytes_there(directory, wanted)
    while not done.wait(0.5):
        most = max(most, _bytes_there(directory, wanted))
        report(Progress("pulling", most, total, max(0.0, (most - first) / (time.monotonic() - begun))))


def _bytes_there(directory: Path, wanted: list[RemoteFile]) -> int:
    """Bytes of `wanted` on disk, whole files and the library's partial ones."""
    there = 0
    for file in wanted:
        path = directory / file.path
        sizes = [candidate.stat().st_size for candidate in (path, *path.parent.glob(f"{path.name}.incomplete*"))
                 if candidate.is_file()]
        there += min(file.size_bytes, max(sizes, default=0))
    return there


def _verify(directory: Path, wanted: list[RemoteFile], report: Callable[[Progress], None]) -> list[RemoteFile]:
    """The files that are absent or wrong."""
    total, done, bad, begun = sum(file.size_bytes for file in wanted), 0, [], time.monotonic()
    for file in wanted:
        digest = hashlib.sha256()
        try:
            with (directory / file.path).open("rb") as opened:
                while block := opened.read(_BLOCK_BYTES):
                    digest.update(block)
                    done += len(block)
                    report(Progress("verifying", min(done, total), total, done / (time.monotonic() - begun + 1e-9)))
                whole = opened.tell() == file.size_bytes
                os.fsync(opened.fileno())
        except FileNotFoundError:
            whole = False
        if not whole or (file.sha256 and digest.hexdigest() != file.sha256):
            bad.append(file)
    return bad


def _complete(settings: Settings, directory: Path, wanted: list[RemoteFile]) -> Path:
    for folder in {(directory / file.path).parent for file in wanted}:
        sync_directory(folder)
    files = [{**asdict(file), "mtime_ns": (directory / file.path).stat().st_mtime_ns} for file in wanted]
    _manifest(settings).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(_manifest(settings), json.dumps({
        "version": MANIFEST_VERSION, "model": settings.model_id, "revision": settings.model_revision,
        "files": files}, indent=1) + "\n")
    return directory


def _directory(settings: Settings) -> Path:
    return settings.models_dir / settings.model_id


def _manifest(settings: Settings) -> Path:
    return settings.models_dir / ".shoehorn" / "manifests" / f"{settings.model_id.replace('/', '--')}.json"


@contextmanager
def _locked(settings: Settings) -> Iterator[None]:
    path = settings.models_dir / ".shoehorn" / "locks" / f"{settings.model_id.replace('/', '--')}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise ModelUnavailableError(f"{path.parent} cannot be written: {error.strerror}.",
                                    f"Give the volume to user {os.geteuid()}: sudo chown -R {os.geteuid()} FOLDER"
                                    ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process pulls %s; waiting for it", settings.model_id)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
