"""ModelScope's HTTP API: what a repository holds, and parts of its files. No file is stored here; `store` does that.

Rules: every listed path is checked before anybody uses it; the token travels as the library sends it and is in no
message. API as asked by modelscope_hub 0.5.1: `/api/v1/models/{id}/repo/files` and `/api/v1/models/{id}/repo`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import httpx

from shoehorn.errors import ModelUnavailableError
from shoehorn.settings import Settings

DEFAULT_ENDPOINT = "https://www.modelscope.cn"
_HASH = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(r"[^\x00-\x1f\x7f\\]{1,512}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of the listing; `sha256` is "" where the hub gives none."""

    path: str
    size_bytes: int
    sha256: str


class Hub:
    """One model's repository at one revision. Implements `checkpoint.Files`."""

    def __init__(self, settings: Settings) -> None:
        self._model, self._revision = settings.model_id, settings.model_revision
        self.endpoint = (settings.modelscope_endpoint or DEFAULT_ENDPOINT).rstrip("/")
        self._token = settings.modelscope_api_token
        self._listing: tuple[RemoteFile, ...] | None = None

    def listing(self) -> tuple[RemoteFile, ...]:
        """Every file of the repository; asked once.

        Raises:
            ModelUnavailableError: the hub cannot be reached, refuses, or lists a path that is none.
        """
        if self._listing is None:
            answer = self._get(f"/api/v1/models/{self._model}/repo/files",
                               {"Revision": self._revision, "Recursive": "True"}, {})
            try:
                data = answer.json()["Data"]
                entries = data if isinstance(data, list) else data["Files"]
                self._listing = tuple(_checked(entry) for entry in entries if entry.get("Type") != "tree")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelUnavailableError(f"The hub's list of files of {self._model} cannot be read.",
                                            "Try again; if MODELSCOPE_ENDPOINT is set, check it.") from error
        return self._listing

    def names(self) -> Mapping[str, int]:
        """Size in bytes by path."""
        return {file.path: file.size_bytes for file in self.listing()}

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Up to `length` bytes from `start`, by a range request."""
        if length == 0:
            return b""
        end = "" if length is None else str(start + length - 1)
        answer = self._get(f"/api/v1/models/{self._model}/repo", {"Revision": self._revision, "FilePath": name},
                           {"Range": f"bytes={start}-{end}", "Accept-Encoding": "identity"})
        if answer.status_code == httpx.codes.PARTIAL_CONTENT:
            return answer.content
        return answer.content[start:None if length is None else start + length]  # a hub that ignores ranges

    def _get(self, path: str, query: dict[str, str], headers: dict[str, str]) -> httpx.Response:
        try:
            answer = httpx.get(
                self.endpoint + path, params=query, follow_redirects=True, timeout=httpx.Timeout(30, connect=10),
                headers={**headers, **({"Authorization": f"Bearer {self._token}"} if self._token else {})},
                cookies={"m_session_id": self._token} if self._token else None)
        except httpx.HTTPError as error:
            raise ModelUnavailableError(
                f"The hub {self.endpoint} cannot be reached: {type(error).__name__}.",
                "Check the network; set MODELSCOPE_ENDPOINT for a mirror, or MODEL_SOURCE=local for a folder.",
            ) from error
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise ModelUnavailableError(f"The hub does not let us read {self._model}.",
                                        "Set MODELSCOPE_API_TOKEN to a token that may.")
        if answer.status_code == httpx.codes.NOT_FOUND:
            raise ModelUnavailableError(f"The hub has no model {self._model} at revision {self._revision}.",
                                        "Check MODEL_ID and MODEL_REVISION; letters count in their case.")
        if answer.is_error:
            raise ModelUnavailableError(f"The hub {self.endpoint} answered {answer.status_code}.", "Try again later.")
        return answer


def _checked(entry: Mapping[str, Any]) -> RemoteFile:
    path, size, digest = str(entry["Path"]), int(entry["Size"]), str(entry.get("Sha256") or "").lower()
    parts = PurePosixPath(path).parts
    if not _PATH.fullmatch(path) or path.startswith("/") or ".." in parts or ".shoehorn" in parts or size < 0:
        raise ModelUnavailableError(f"The hub lists a path that no model has: {path!r}. Nothing was fetched.",
                                    "Choose another model, and tell the hub about this one.")
    if digest and not _HASH.fullmatch(digest):
        raise ModelUnavailableError(f"The hub lists a checksum that is none for {path!r}.", "Try again later.")
    return RemoteFile(path, size, digest)
