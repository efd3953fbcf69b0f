"""The download from Hugging Face, by `huggingface_hub`, of exactly the files that `store` chose.

Rules:
- each file comes by the library's `http_get` into `*.incomplete` beside its place, from which the next start goes on,
  and is renamed when it is whole; the library's `hf_hub_download` is not used, because it gives a partial file a name
  of its own in every process, so that a pull that was killed would begin again;
- every file is asked for at the commit that was listed;
- a failed connection is tried again for as long as bytes arrive in between, with growing pauses;
- the library's home is a private folder under RUN_DIR, and its errors become words that name neither token nor signed
  address.
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
from shoehorn.hub.huggingface import HuggingFaceHub
from shoehorn.hub.repository import HubFiles
from shoehorn.hub.transfer import arrivals, gone, not_let, partial_path, private_home, stopped, wrong_size

log = logging.getLogger("store")

_FILES_AT_ONCE = 4
_MOST_TRIES = 4
_CHUNK_BYTES = 256 << 10
_PIECE_BYTES = 32 << 30  # of a larger file each request asks for no more: the hub's storage answers none above 50 GB


def download(settings: Settings, hub: HubFiles, directory: Path, needed: Sequence[ModelFile]) -> None:
    """Fetch `needed` into `directory`.

    Raises:
        ModelUnavailableError: some file could not be had; the others and partial ones are kept.
    """
    library, arrived = _library(settings, hub), arrivals(settings, directory, needed)
    headers = library.build_hf_headers(token=settings.hf_token or False) | {"Accept-Encoding": "identity"}

    def fetch(file: ModelFile) -> Exception | None:
        try:
            url = library.hf_hub_url(hub.model, file.path, revision=hub.commit, endpoint=hub.endpoint)
            _fetch(library, url, headers, directory / file.path, file.size_bytes, arrived)
        except (library.httpx2.HTTPError, OSError, ValueError) as error:
            return error
        return None

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        outcomes = zip(needed, pool.map(fetch, needed), strict=True)
        failed = {file.path: error for file, error in outcomes if error}
    if failed:
        raise _in_words(failed, settings) from next(iter(failed.values()))


def _fetch(library: ModuleType, url: str, headers: dict[str, str], path: Path, size_bytes: int,
           arrived: Callable[[int], None]) -> None:
    """One file, from where an earlier try ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, tries = partial_path(path), 0
    while True:
        before = _size(partial)
        try:
            _go_on(library, url, headers, partial, size_bytes, arrived)
            break
        except library.httpx2.HTTPError as error:
            status = _status(error)
            if status == 416:
                partial.unlink(missing_ok=True)  # it is longer than what the hub has
            tries = 1 if _size(partial) > before else tries + 1
            if tries >= _MOST_TRIES or (status is not None and status < 500):
                raise
            pause = secrets.SystemRandom().uniform(0.5, 1.5) * 2 ** (tries - 1)
            log.warning("%s: the connection failed (%s); retrying in %.1f s", path.name, status or type(error).__name__,
                        pause)
            time.sleep(pause)
        except OSError as error:
            if not error.errno:
                partial.unlink()  # the library's word for another size than expected
            raise
    partial.replace(path)


def _go_on(library: ModuleType, url: str, headers: dict[str, str], partial: Path, size_bytes: int,
           arrived: Callable[[int], None]) -> None:
    with _ToldFile(partial, arrived) as opened:
        while (there := opened.seek(0, os.SEEK_END)) < size_bytes:
            start = there - there % _PIECE_BYTES
            end = min(start + _PIECE_BYTES, size_bytes)
            span = {} if end - start == size_bytes else {"Range": f"bytes={start}-{end - 1}"}
            library.http_get(url, opened, resume_size=there - start, headers=headers | span, expected_size=end - start,
                             displayed_filename=partial.stem)
            opened.flush()


class _ToldFile(io.BufferedWriter):
    """A file that is appended to, and tells what arrives before it is written."""

    def __init__(self, path: Path, arrived: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._arrived = arrived

    def write(self, content: Any) -> int:
        """Append bytes."""
        self._arrived(len(content))
        return super().write(content)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of the library stands for."""
    answer = getattr(error, "response", None)
    return None if answer is None else int(answer.status_code)


def _library(settings: Settings, hub: HubFiles) -> ModuleType:
    home = private_home(settings, "huggingface")
    os.environ.update({
        "HF_HOME": str(home), "HF_TOKEN_PATH": str(home / "token"), "HF_HUB_CACHE": str(home / "hub"),
        "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_DEBUG": "0",
        "TQDM_DISABLE": "1"})  # the last for a download from the other hub in this process
    os.environ.setdefault("HOME", str(home))
    from huggingface_hub import constants, file_download

    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES  # what of each file a killed pull loses; 10 MiB otherwise
    parent = logging.getLogger("huggingface_hub")
    parent.handlers.clear()
    parent.propagate = True
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # its INFO lines hold signed addresses
    for name in ("file_download", "utils._http"):
        child = logging.getLogger(f"huggingface_hub.{name}")
        if _in_a_line not in child.filters:
            child.addFilter(_in_a_line)
    return file_download


def _in_a_line(record: logging.LogRecord) -> bool:
    """Retries are worth one line, without what an address carries behind `?`; failures are told by us, once."""
    record.msg, record.args = re.sub(r"\?\S+", "", " ".join(record.getMessage().split())), ()
    return record.levelno < logging.ERROR


def _in_words(failed: dict[str, Exception], settings: Settings) -> ModelUnavailableError:
    for error in failed.values():
        if isinstance(error, OSError) and error.errno and _status(error) is None:
            return disk.volume_error(settings.models_dir, error)
    names, cause = ", ".join(sorted(failed)), next(iter(failed.values()))
    status = _status(cause)
    if status in (401, 403):
        return not_let(names, HuggingFaceHub)
    if status == 404:
        return gone(names)
    if status == 416 or type(cause) is OSError:
        return wrong_size(names, HuggingFaceHub)
    return stopped(names, status, cause)
