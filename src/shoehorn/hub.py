"""ModelScope's HTTP API: what a repository holds, and parts of its files. No file is stored here; `store` does that.

Rules:
- every listed path is checked before anybody uses it, and one bad path refuses the whole listing;
- the token travels as the library sends it, to the hub's own address only: a redirect elsewhere goes without it;
- no more is read of an answer than was asked for.
API as asked by modelscope_hub 0.5.1: `/api/v1/models/{id}/repo/files` and `/api/v1/models/{id}/repo`.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import httpx

from shoehorn.errors import ModelUnavailableError
from shoehorn.manifest import ModelFile, is_plain
from shoehorn.settings import Settings

DEFAULT_ENDPOINT = "https://modelscope.cn"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_LISTED = 3000  # the hub cuts a listing here, and does not say so
_MOST_LISTING_BYTES = 64 << 20
_MOST_REDIRECTS = 5
_TRY_AGAIN = "Try again; if MODELSCOPE_ENDPOINT is set, check it."


class Hub:
    """One model's repository at one revision. Implements `tensor_files.Files`."""

    def __init__(self, settings: Settings) -> None:
        self._model, self._revision = settings.model_id, settings.model_revision
        self.endpoint = endpoint(settings)
        token = settings.modelscope_api_token
        self._secret = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
        self._client = httpx.Client(timeout=httpx.Timeout(30, connect=10))
        self._close = weakref.finalize(self, self._client.close)
        self._listing: tuple[ModelFile, ...] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:
        self._close()

    def listing(self) -> tuple[ModelFile, ...]:
        """Every file of the repository; asked once. Of one with 3000 entries or more, the files outside folders.

        Raises:
            ModelUnavailableError: the hub cannot be reached, refuses, or lists a path that is none.
        """
        if self._listing is None:
            entries = self._entries(recursive=True)
            if len(entries) >= _MOST_LISTED:
                entries = self._entries(recursive=False)
            if len(entries) >= _MOST_LISTED:
                raise ModelUnavailableError(f"{self._model} has more files than the hub lists.", "Choose another.")
            try:
                files = tuple(_checked(entry) for entry in entries if entry.get("Type") != "tree")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._unreadable() from error
            if len({file.path for file in files}) != len(files):
                raise ModelUnavailableError(f"The hub lists a file of {self._model} twice.", _TRY_AGAIN)
            self._listing = files
        return self._listing

    def names(self) -> Mapping[str, int]:
        """Size in bytes by path."""
        return {file.path: file.size_bytes for file in self.listing()}

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Up to `length` bytes of a listed file from `start`, by a range request.

        Raises:
            ModelUnavailableError: the hub does not give them.
        """
        size = self.names()[name]
        end = size if length is None else min(size, start + length)
        if end <= start:
            return b""
        body = bytearray()
        with self._answer("repo", {"FilePath": name}, {"Range": f"bytes={start}-{end - 1}"}) as answer:
            skip = start  # a hub that ignores ranges sends the file from its beginning
            if answer.status_code == httpx.codes.PARTIAL_CONTENT:
                skip = 0
                if not answer.headers.get("content-range", "").startswith(f"bytes {start}-"):
                    raise ModelUnavailableError(f"The hub answers with another part of {name} than asked for.",
                                                _TRY_AGAIN)
            for block in answer.iter_bytes():
                body += block[skip:]
                skip = max(0, skip - len(block))
                if len(body) >= end - start:
                    break
        if len(body) < end - start:
            raise ModelUnavailableError(f"The hub sends less of {name} than it lists.", _TRY_AGAIN)
        return bytes(body[:end - start])

    def _entries(self, *, recursive: bool) -> list[Any]:
        body = bytearray()
        with self._answer("repo/files", {"Recursive": str(recursive)}, {}) as answer:
            for block in answer.iter_bytes():
                body += block
                if len(body) > _MOST_LISTING_BYTES:
                    raise self._unreadable()
        try:
            data = json.loads(body)["Data"]
            entries = data if isinstance(data, list) else data["Files"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._unreadable() from error
        return entries if isinstance(entries, list) else []

    @contextmanager
    def _answer(self, what: str, query: dict[str, str], headers: dict[str, str]) -> Iterator[httpx.Response]:
        """The open answer to a GET, redirects followed."""
        try:
            origin = httpx.URL(self.endpoint)
            url = origin.join(f"{origin.path.rstrip('/')}/api/v1/models/{self._model}/{what}")
            url = url.copy_merge_params({"Revision": self._revision, **query})
            for _ in range(_MOST_REDIRECTS):
                secret = self._secret if _place(url) == _place(origin) else {}
                with self._client.stream("GET", url, headers={**headers, **secret, "Accept-Encoding": "identity"},
                                         ) as answer:
                    if answer.has_redirect_location:
                        url = self._redirected(url, answer.headers["location"])
                        continue
                    self._require_good(answer, query.get("FilePath", ""))
                    yield answer
                    return
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ModelUnavailableError(
                f"The hub {self.endpoint} cannot be reached: {error or type(error).__name__}.",
                "Check the network and the clock; set MODELSCOPE_ENDPOINT for a mirror, or MODEL_SOURCE=local for a "
                "folder.") from error
        raise ModelUnavailableError(f"The hub {self.endpoint} redirects without end.", _TRY_AGAIN)

    def _redirected(self, url: httpx.URL, location: str) -> httpx.URL:
        target = url.join(location)
        if target.scheme not in ("https", url.scheme):
            raise ModelUnavailableError(f"The hub {self.endpoint} redirects to an unsafe address.", _TRY_AGAIN)
        return target

    def _require_good(self, answer: httpx.Response, name: str) -> None:
        what = f"{name} of {self._model}" if name else self._model
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise ModelUnavailableError(f"The hub does not let us read {what}.",
                                        "Set MODELSCOPE_API_TOKEN to a token that may.")
        if answer.status_code == httpx.codes.NOT_FOUND:
            raise ModelUnavailableError(f"The hub has no {'file' if name else 'model'} {what} at revision "
                                        f"{self._revision}.",
                                        "Check MODEL_ID and MODEL_REVISION; letters count in their case.")
        if not answer.is_success:
            raise ModelUnavailableError(f"The hub {self.endpoint} answered {answer.status_code}.", "Try again later.")

    def _unreadable(self) -> ModelUnavailableError:
        return ModelUnavailableError(f"The hub's list of files of {self._model} cannot be read.", _TRY_AGAIN)


def endpoint(settings: Settings) -> str:
    """The hub's address, without a slash at its end; https where the setting names no scheme, as the library does."""
    address = (settings.modelscope_endpoint or DEFAULT_ENDPOINT).rstrip("/")
    return address if "://" in address else f"https://{address}"


def _place(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _checked(entry: Mapping[str, Any]) -> ModelFile:
    path, size, digest = entry["Path"], int(entry["Size"]), str(entry.get("Sha256") or "").lower()
    if type(path) is not str or not is_plain(path) or size < 0:
        raise ModelUnavailableError(f"The hub lists a path that no model has: {path!r}. Nothing was fetched.",
                                    "Choose another model, and tell the hub about this one.")
    if digest and not _SHA256.fullmatch(digest):
        raise ModelUnavailableError(f"The hub lists a checksum that is none for {path!r}.", "Try again later.")
    return ModelFile(path, size, digest)
