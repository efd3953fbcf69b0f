"""The download itself, by ModelScope's own library, of exactly the files that `store` chose.

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
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from shoehorn import volume
from shoehorn.errors import ModelUnavailableError
from shoehorn.manifest import ModelFile
from shoehorn.progress import Report, reported
from shoehorn.settings import Settings

_FILE_SECONDS = 7 * 24 * 3600  # for one file in all; its own limit of an hour ends a shard on a slow line
_RESUME = "Start again: what has arrived is kept and gone on with."


def download(settings: Settings, endpoint: str, directory: Path, wanted: Sequence[ModelFile],
             needed: Sequence[ModelFile], report: Report) -> None:
    """Fetch `needed` into `directory`, reporting how much of `wanted` is there.

    Raises:
        ModelUnavailableError: some file could not be had; the others and partial ones are kept.
    """
    library = _library(settings)
    api = library.HubApi(endpoint=endpoint, token=settings.modelscope_api_token or "")
    listing = [{"Path": file.path, "Type": "blob", "Size": file.size_bytes, "Sha256": file.sha256} for file in needed]
    with reported("pulling", sum(file.size_bytes for file in wanted), lambda: bytes_there(directory, wanted), report):
        try:
            api.download_repo(settings.model_id, "model", revision=settings.model_revision, local_dir=directory,
                              file_list=listing)
        except (library.HubError, OSError) as error:  # the errors of `requests` are OSErrors too
            raise _in_words(library, error, settings) from error


def bytes_there(directory: Path, files: Sequence[ModelFile]) -> int:
    """How many bytes of `files` lie in `directory`, those of partial files with them."""
    there = 0
    for file in files:
        path = directory / file.path
        for candidate in (path, partial_path(path)):
            try:
                there += min(file.size_bytes, candidate.stat().st_size)
                break
            except OSError:
                continue  # not there, or just renamed
    return there


def partial_path(path: Path) -> Path:
    """Where the library keeps what it has of a file."""
    return path.with_name(f"{path.name}.incomplete")


def _library(settings: Settings) -> ModuleType:
    home = settings.run_dir / "modelscope"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.chmod(0o700)  # fails where it belongs to another user
    except OSError as error:
        raise ModelUnavailableError(f"{home} cannot be made or kept private: {error.strerror}.",
                                    "Set RUN_DIR to a folder that this user may write.") from error
    os.environ.update({
        "MODELSCOPE_HOME": str(home), "MODELSCOPE_CACHE": str(home / "cache"),
        "MODELSCOPE_API_TOKEN": settings.modelscope_api_token or "",  # also when empty: else it looks for a login
        "MODELSCOPE_DOWNLOAD_INTRA_CLOUD": "false", "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": str(_FILE_SECONDS),
        "MODELSCOPE_DOWNLOAD_FILE_LOCK": "false",  # `volume.only_writer` is the lock; theirs can outlive a crash
        "MODELSCOPE_LOG_LEVEL": "WARNING", "TQDM_DISABLE": "1"})
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
            return volume.trouble(settings.models_dir, cause)
    names = ", ".join(sorted(name for name in failed if name)) or settings.model_id
    cause = next(iter(failed.values()))
    if isinstance(cause, library.FileSizeMismatchError):
        return ModelUnavailableError(f"The hub sends another size than it lists: {names}.",
                                     "Try again later, or another MODELSCOPE_ENDPOINT.")
    if isinstance(cause, library.FileIntegrityError):
        return ModelUnavailableError(f"The hub sent wrong bytes in every try, by their SHA-256: {names}.",
                                     "Try again later, or another MODELSCOPE_ENDPOINT; nothing wrong was kept.")
    if isinstance(cause, library.AuthenticationError | library.PermissionDeniedError):
        return ModelUnavailableError(f"The hub does not let us read {names}.",
                                     "Set MODELSCOPE_API_TOKEN to a token that may.")
    if isinstance(cause, library.NotExistError):
        return ModelUnavailableError(f"The hub lists but does not have {names}.",
                                     "Try again later, or another MODEL_REVISION.")
    status = getattr(cause, "status_code", None)
    what = f"the hub answered {status}" if status else f"the connection failed ({type(cause).__name__})"
    return ModelUnavailableError(f"The download of {names} stopped: {what}.", _RESUME)
