"""Download of selected files from ModelScope with its library.

Rules:
- the library gets the validated listing, so that it requests no other path; `store` verifies the downloaded files;
- on the volume the library writes only the files and `*.incomplete` files, from which it resumes. Its home is a
  private folder under RUN_DIR, because it unpickles files there;
- the library reads the environment on import, so it is imported here, late;
- error messages contain neither token nor signed URL.
This module calls `HubApi.download_repo`, as `modelscope.snapshot_download` does; importing `modelscope` would load
torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from shoehorn.common import disk
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.config.settings import Settings
from shoehorn.hub.files import ModelFile
from shoehorn.hub.modelscope import ModelScopeRepository
from shoehorn.hub.repository import RemoteRepository
from shoehorn.hub.transfer import (
    interrupted_error,
    missing_file_error,
    permission_error,
    private_home,
    receive_callback,
    size_mismatch_error,
)

_CHUNK_BYTES = 1 << 20
_FILE_SECONDS = 7 * 24 * 3600  # per file; the library's default of one hour is too short for a shard on a slow line


def download(settings: Settings, hub: RemoteRepository, directory: Path, needed: Sequence[ModelFile]) -> None:
    """Fetch `needed` into `directory`.

    Raises:
        ModelUnavailableError: a file is unavailable; other and partial files are kept.
    """
    library = _library(settings)
    api = library.HubApi(endpoint=hub.endpoint, token=settings.modelscope_api_token or "")
    listing = [{"Path": file.path, "Type": "blob", "Size": file.size_bytes, "Sha256": file.sha256} for file in needed]
    try:
        api.download_repo(hub.model, "model", revision=hub.commit or hub.revision, local_dir=directory,
                          file_list=listing,
                          progress_callbacks=[_progress_class(library, receive_callback(settings, directory, needed))])
    except (library.HubError, OSError) as error:  # errors of `requests` are OSErrors
        raise _convert_error(library, error, settings) from error


def _progress_class(library: ModuleType, receive: Callable[[int], None]) -> type:
    """Return the class that the library instantiates for each file and calls after each chunk."""
    base: type = library.ProgressCallback

    class Progress(base):  # type: ignore[misc]  # the library is imported late
        def update(self, size: int) -> None:
            if 0 < size <= _CHUNK_BYTES:  # more is the size of an existing partial file
                receive(size)

    return Progress


def _library(settings: Settings) -> ModuleType:
    home = private_home(settings, "modelscope")
    os.environ.update({
        "MODELSCOPE_HOME": str(home), "MODELSCOPE_CACHE": str(home / "cache"),
        "MODELSCOPE_API_TOKEN": settings.modelscope_api_token or "",  # if unset, the library looks for a login
        "MODELSCOPE_DOWNLOAD_INTRA_CLOUD": "false", "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": str(_FILE_SECONDS),
        "MODELSCOPE_DOWNLOAD_FILE_LOCK": "false",  # `store.locks` is the lock; the library's lock can outlive a crash
        "MODELSCOPE_DOWNLOAD_PARALLEL_WORKERS": "1",  # per file: parallel parts would not be counted or removed
        "MODELSCOPE_DOWNLOAD_CHUNK_SIZE_MB": str(_CHUNK_BYTES >> 20), "MODELSCOPE_LOG_LEVEL": "WARNING",
        "TQDM_DISABLE": "1"})
    os.environ.setdefault("HOME", str(home))
    import modelscope_hub

    log = logging.getLogger("modelscope_hub")
    log.handlers.clear()
    log.propagate = True
    logging.getLogger("modelscope_hub.download").addFilter(_below_error)
    return modelscope_hub


def _below_error(record: logging.LogRecord) -> bool:
    """Accept records of retries; failures are reported once, by Shoehorn."""
    return record.levelno < logging.ERROR


def _convert_error(library: ModuleType, error: Exception, settings: Settings) -> ModelUnavailableError:
    """Convert an error of the library, which may contain one for each file."""
    failed: dict[str, BaseException] = getattr(error, "failed_files", None) or {"": error}
    for cause in failed.values():
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, library.HubError):
            return disk.volume_error(settings.models_dir, cause)
    names = ", ".join(sorted(name for name in failed if name)) or settings.model_id
    cause = next(iter(failed.values()))
    if isinstance(cause, library.FileSizeMismatchError):
        return size_mismatch_error(names, ModelScopeRepository)
    if isinstance(cause, library.FileIntegrityError):
        return ModelUnavailableError(f"{names}: SHA-256 mismatch in every attempt.",
                                     "Retry later, or set another MODELSCOPE_ENDPOINT; no invalid file was kept.",
                                     code="hub_checksum_mismatch")
    if isinstance(cause, library.AuthenticationError | library.PermissionDeniedError):
        return permission_error(names, ModelScopeRepository)
    if isinstance(cause, library.NotExistError):
        return missing_file_error(names)
    return interrupted_error(names, getattr(cause, "status_code", None), cause)
