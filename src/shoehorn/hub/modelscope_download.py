"""The download from ModelScope, by its own library, of exactly the files that `store` chose.

Rules:
- the library gets the checked listing, so that it asks for no other path, and what it leaves is checked by `store`;
- nothing of it lies on the volume but the files and, beside them, `*.incomplete` ones from which it resumes: its home
  is a private folder under RUN_DIR, because it unpickles what it finds there;
- it reads its environment when it is imported, so that happens here and late;
- its errors become words that name neither token nor signed address.
`modelscope.snapshot_download` ends in the `HubApi.download_repo` that is called here; importing `modelscope` itself
would load torch first.
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
from shoehorn.hub.modelscope import Hub
from shoehorn.hub.repository import HubFiles
from shoehorn.hub.transfer import arrivals, gone, not_let, private_home, stopped, wrong_size

_CHUNK_BYTES = 1 << 20
_FILE_SECONDS = 7 * 24 * 3600  # for one file in all; its own limit of an hour ends a shard on a slow line


def download(settings: Settings, hub: HubFiles, directory: Path, needed: Sequence[ModelFile]) -> None:
    """Fetch `needed` into `directory`.

    Raises:
        ModelUnavailableError: some file could not be had; the others and partial ones are kept.
    """
    library = _library(settings)
    api = library.HubApi(endpoint=hub.endpoint, token=settings.modelscope_api_token or "")
    listing = [{"Path": file.path, "Type": "blob", "Size": file.size_bytes, "Sha256": file.sha256} for file in needed]
    try:
        api.download_repo(hub.model, "model", revision=hub.commit or hub.revision, local_dir=directory,
                          file_list=listing, progress_callbacks=[_told(library, arrivals(settings, directory, needed))])
    except (library.HubError, OSError) as error:  # the errors of `requests` are OSErrors too
        raise _in_words(library, error, settings) from error


def _told(library: ModuleType, arrived: Callable[[int], None]) -> type:
    """What the library is to call after each piece of a file, one object for each file."""
    base: type = library.ProgressCallback

    class Told(base):  # type: ignore[misc]  # the library is loaded late
        def update(self, size: int) -> None:
            if 0 < size <= _CHUNK_BYTES:  # more at once is what an earlier try left
                arrived(size)

    return Told


def _library(settings: Settings) -> ModuleType:
    home = private_home(settings, "modelscope")
    os.environ.update({
        "MODELSCOPE_HOME": str(home), "MODELSCOPE_CACHE": str(home / "cache"),
        "MODELSCOPE_API_TOKEN": settings.modelscope_api_token or "",  # also when empty: else it looks for a login
        "MODELSCOPE_DOWNLOAD_INTRA_CLOUD": "false", "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": str(_FILE_SECONDS),
        "MODELSCOPE_DOWNLOAD_FILE_LOCK": "false",  # `volume.only_writer` is the lock; theirs can outlive a crash
        "MODELSCOPE_DOWNLOAD_PARALLEL_WORKERS": "1",  # for one file: its parts nobody would count or clear away
        "MODELSCOPE_DOWNLOAD_CHUNK_SIZE_MB": str(_CHUNK_BYTES >> 20), "MODELSCOPE_LOG_LEVEL": "WARNING",
        "TQDM_DISABLE": "1"})
    os.environ.setdefault("HOME", str(home))
    import modelscope_hub

    log = logging.getLogger("modelscope_hub")
    log.handlers.clear()
    log.propagate = True
    logging.getLogger("modelscope_hub.download").addFilter(_is_no_error)
    return modelscope_hub


def _is_no_error(record: logging.LogRecord) -> bool:
    """Retries are worth a line; failures are told by us, once."""
    return record.levelno < logging.ERROR


def _in_words(library: ModuleType, error: Exception, settings: Settings) -> ModelUnavailableError:
    """The library's error, which may hold one for each file."""
    failed: dict[str, BaseException] = getattr(error, "failed_files", None) or {"": error}
    for cause in failed.values():
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, library.HubError):
            return disk.volume_error(settings.models_dir, cause)
    names = ", ".join(sorted(name for name in failed if name)) or settings.model_id
    cause = next(iter(failed.values()))
    if isinstance(cause, library.FileSizeMismatchError):
        return wrong_size(names, Hub)
    if isinstance(cause, library.FileIntegrityError):
        return ModelUnavailableError(f"The hub sent wrong bytes in every try, by their SHA-256: {names}.",
                                     "Try again later, or another MODELSCOPE_ENDPOINT; nothing wrong was kept.")
    if isinstance(cause, library.AuthenticationError | library.PermissionDeniedError):
        return not_let(names, Hub)
    if isinstance(cause, library.NotExistError):
        return gone(names)
    return stopped(names, getattr(cause, "status_code", None), cause)
