"""Download of selected files from Hugging Face with `huggingface_hub`.

Rules:
- the library's `http_get` writes each file to `*.incomplete`, from which the next start resumes; the complete file is
  renamed. `hf_hub_download` is not used: it names partial files differently in every process, so that a killed pull
  could not resume;
- every file is requested at the listed commit;
- a failed connection is retried while bytes arrive between failures, with growing delays;
- the library's home is a private folder under RUN_DIR; error messages contain neither token nor signed URL.
"""

from __future__ import annotations

import io
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from shoehorn.common import disk
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.config.settings import Settings
from shoehorn.hub.files import ModelFile
from shoehorn.hub.huggingface import HuggingFaceRepository
from shoehorn.hub.repository import RemoteRepository
from shoehorn.hub.transfer import (
    interrupted_error,
    missing_file_error,
    partial_path,
    permission_error,
    private_home,
    receive_callback,
    size_mismatch_error,
)

log = logging.getLogger("store")

_PARALLEL_FILES = 4
_MAX_ATTEMPTS = 4
_CHUNK_BYTES = 256 << 10
_RANGE_BYTES = 32 << 30  # the hub's storage rejects requests above 50 GB


def download(settings: Settings, hub: RemoteRepository, directory: Path, needed: Sequence[ModelFile]) -> None:
    """Fetch `needed` into `directory`.

    Raises:
        ModelUnavailableError: a file is unavailable; other and partial files are kept.
    """
    library, receive = _library(settings, hub), receive_callback(settings, directory, needed)
    headers = library.build_hf_headers(token=settings.hf_token or False) | {"Accept-Encoding": "identity"}

    def fetch(file: ModelFile) -> Exception | None:
        try:
            url = library.hf_hub_url(hub.model, file.path, revision=hub.commit, endpoint=hub.endpoint)
            _fetch(library, url, headers, directory / file.path, file.size_bytes, receive)
        except (library.httpx2.HTTPError, OSError, ValueError) as error:
            return error
        return None

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        results = zip(needed, pool.map(fetch, needed), strict=True)
        failures = {file.path: error for file, error in results if error}
    if failures:
        raise _convert_error(failures, settings) from next(iter(failures.values()))


def _fetch(library: ModuleType, url: str, headers: dict[str, str], path: Path, size_bytes: int,
           receive: Callable[[int], None]) -> None:
    """Download one file, resuming from its partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, attempts = partial_path(path), 0
    while True:
        size_before = _size(partial)
        try:
            _resume(library, url, headers, partial, size_bytes, receive)
            break
        except library.httpx2.HTTPError as error:
            status = _status(error)
            if status == 416:
                partial.unlink(missing_ok=True)  # longer than the file on the hub
            attempts = 1 if _size(partial) > size_before else attempts + 1
            if attempts >= _MAX_ATTEMPTS or (status is not None and status < 500):
                raise
            delay = secrets.SystemRandom().uniform(0.5, 1.5) * 2 ** (attempts - 1)
            log.warning("Connection failed, retrying file=%s error=%s delay=%.1f s", path.name,
                        status or type(error).__name__, delay)
            time.sleep(delay)
        except OSError as error:
            if not error.errno:
                partial.unlink()  # the library's error for an unexpected size
            raise
    partial.replace(path)


def _resume(library: ModuleType, url: str, headers: dict[str, str], partial: Path, size_bytes: int,
            receive: Callable[[int], None]) -> None:
    with _ReceivingFile(partial, receive) as opened:
        while (position := opened.seek(0, os.SEEK_END)) < size_bytes:
            start = position - position % _RANGE_BYTES
            end = min(start + _RANGE_BYTES, size_bytes)
            span = {} if end - start == size_bytes else {"Range": f"bytes={start}-{end - 1}"}
            library.http_get(url, opened, resume_size=position - start, headers=headers | span,
                             expected_size=end - start, displayed_filename=partial.stem)
            opened.flush()


class _ReceivingFile(io.BufferedWriter):
    """A file opened for appending that reports the size of each write."""

    def __init__(self, path: Path, receive: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._receive = receive

    def write(self, content: Any) -> int:
        """Append bytes."""
        self._receive(len(content))
        return super().write(content)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error of the library, if it has one."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _library(settings: Settings, hub: RemoteRepository) -> ModuleType:
    home = private_home(settings, "huggingface")
    os.environ.update({
        "HF_HOME": str(home), "HF_TOKEN_PATH": str(home / "token"), "HF_HUB_CACHE": str(home / "hub"),
        "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_DEBUG": "0",
        "TQDM_DISABLE": "1"})  # the last affects a later download from the other hub
    os.environ.setdefault("HOME", str(home))
    from huggingface_hub import constants, file_download

    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES  # bytes of each file that a killed pull loses; default 10 MiB
    parent = logging.getLogger("huggingface_hub")
    parent.handlers.clear()
    parent.propagate = True
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # its INFO lines contain signed URLs
    for name in ("file_download", "utils._http"):
        child = logging.getLogger(f"huggingface_hub.{name}")
        if _shorten not in child.filters:
            child.addFilter(_shorten)
    return file_download


def _shorten(record: logging.LogRecord) -> bool:
    """Reduce a record to one line without URL queries; reject failures, which Shoehorn reports once."""
    record.msg, record.args = re.sub(r"\?\S+", "", " ".join(record.getMessage().split())), ()
    return record.levelno < logging.ERROR


def _convert_error(failures: dict[str, Exception], settings: Settings) -> ModelUnavailableError:
    for error in failures.values():
        if isinstance(error, OSError) and error.errno and _status(error) is None:
            return disk.volume_error(settings.models_dir, error)
    names, cause = ", ".join(sorted(failures)), next(iter(failures.values()))
    status = _status(cause)
    if status in (401, 403):
        return permission_error(names, HuggingFaceRepository)
    if status == 404:
        return missing_file_error(names)
    if status == 416 or type(cause) is OSError:
        return size_mismatch_error(names, HuggingFaceRepository)
    return interrupted_error(names, status, cause)
