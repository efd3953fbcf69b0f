"""What all hubs have in common: one model's repository at one revision, asked over HTTP.

Rules:
- every listed path is checked before anybody uses it, and one bad path refuses the whole listing;
- the token travels to the hub's own address only: a redirect elsewhere goes without it;
- no more is read of an answer than was asked for;
- once the hub has told the commit of the revision, everything else is read at that commit: a branch that moves
  meanwhile cannot mix two versions.
No file is stored here; `store` does that.
"""

from __future__ import annotations

import json
import re
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Self

import httpx

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.hub.files import ModelFile, is_plain

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_JSON_BYTES = 64 << 20
_MOST_REDIRECTS = 5


class HubFailedError(ModelUnavailableError):
    """The hub cannot be reached, is not well, or does not have what was asked for. Another hub might."""


class HubFiles(ABC):
    """One model's repository at one revision. Implements `tensor_files.Files`.

    Args:
        model: OWNER/NAME.
        revision: as asked for: a branch, tag or commit.
        endpoint: the hub's address; https where it names no scheme, as the libraries do.
        secret: headers that carry the token.

    Attributes:
        source: the value of MODEL_SOURCE that stands for this hub.
        commit: which `revision` is, 40 hexadecimal digits; "" until `listing` was called, or where the hub tells none.
    """

    source: ClassVar[str]
    endpoint_setting: ClassVar[str]
    token_setting: ClassVar[str]

    def __init__(self, model: str, revision: str, endpoint: str, secret: Mapping[str, str]) -> None:
        self.model, self.revision, self.commit = model, revision, ""
        self.endpoint = with_scheme(endpoint)
        self._secret = dict(secret)
        self._client = httpx.Client(timeout=httpx.Timeout(30, connect=10))
        self._close = weakref.finalize(self, self._client.close)
        self._listing: tuple[ModelFile, ...] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:
        self._close()

    def close(self) -> None:
        """Close its connections."""
        self._close()

    def listing(self) -> tuple[ModelFile, ...]:
        """Every file of the repository; asked once.

        Raises:
            HubFailedError: the hub cannot be reached, refuses, or has no such model.
            ModelUnavailableError: it lists a path that is none, or a checksum that is none.
        """
        if self._listing is None:
            try:
                files = tuple(self._listed())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._unreadable() from error
            if len({file.path for file in files}) != len(files):
                raise ModelUnavailableError(f"The hub lists a file of {self.model} twice.", self._try_again)
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
        with self._answer(self._address(name), {"Range": f"bytes={start}-{end - 1}"}, name) as answer:
            skip = start  # a hub that ignores ranges sends the file from its beginning
            if answer.status_code == httpx.codes.PARTIAL_CONTENT:
                skip = 0
                if not answer.headers.get("content-range", "").startswith(f"bytes {start}-"):
                    raise ModelUnavailableError(f"The hub answers with another part of {name} than asked for.",
                                                self._try_again)
            for block in answer.iter_bytes():
                body += block[skip:]
                skip = max(0, skip - len(block))
                if len(body) >= end - start:
                    break
        if len(body) < end - start:
            raise ModelUnavailableError(f"The hub sends less of {name} than it lists.", self._try_again)
        return bytes(body[:end - start])

    @abstractmethod
    def _listed(self) -> Iterator[ModelFile]:
        """The listing as the hub gives it; sets `commit`. An error of parsing means that it cannot be read."""

    @abstractmethod
    def _address(self, name: str) -> httpx.URL:
        """Where a file is, at `commit`."""

    def _refusal(self, answer: httpx.Response, name: str) -> ModelUnavailableError:
        """What an answer that is no success means."""
        what = f"{name} of {self.model}" if name else self.model
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            return ModelUnavailableError(f"The hub does not let us read {what}.",
                                         f"Set {self.token_setting} to a token that may.")
        if answer.status_code == httpx.codes.NOT_FOUND:
            return self._absent(name)
        return HubFailedError(f"The hub {self.endpoint} answered {answer.status_code}.", "Try again later.")

    def _absent(self, name: str = "") -> HubFailedError:
        what = f"file {name} of {self.model}" if name else f"model {self.model}"
        return HubFailedError(f"The hub has no {what} at revision {self.revision}.",
                              "Check MODEL_ID and MODEL_REVISION; letters count in their case.")

    def _unreadable(self) -> ModelUnavailableError:
        return ModelUnavailableError(f"The hub's list of files of {self.model} cannot be read.", self._try_again)

    @property
    def _try_again(self) -> str:
        return f"Try again; if {self.endpoint_setting} is set, check it."

    def _url(self, path: str, **query: str) -> httpx.URL:
        """An address of the hub: `path` below its endpoint."""
        try:
            origin = httpx.URL(self.endpoint)
            url = origin.join(f"{origin.path.rstrip('/')}/{path}")
        except httpx.InvalidURL as error:
            raise self._unreachable(error) from error
        return url.copy_merge_params(query) if query else url

    def _document(self, url: httpx.URL) -> tuple[Any, httpx.Response]:
        """The JSON at an address, and the answer for its headers.

        Raises:
            ModelUnavailableError: it is none, or too large.
        """
        body = bytearray()
        with self._answer(url, {}, "") as answer:
            for block in answer.iter_bytes():
                body += block
                if len(body) > _MOST_JSON_BYTES:
                    raise self._unreadable()
        try:
            return json.loads(body), answer
        except (ValueError, RecursionError) as error:
            raise self._unreadable() from error

    @contextmanager
    def _answer(self, url: httpx.URL, headers: Mapping[str, str], name: str) -> Iterator[httpx.Response]:
        """The open answer to a GET, redirects followed."""
        try:
            origin = _place(httpx.URL(self.endpoint))
            for _ in range(_MOST_REDIRECTS):
                secret = self._secret if _place(url) == origin else {}
                with self._client.stream("GET", url, headers={**headers, **secret, "Accept-Encoding": "identity"},
                                         ) as answer:
                    if answer.has_redirect_location:
                        url = self._redirected(url, answer.headers["location"])
                        continue
                    if not answer.is_success:
                        raise self._refusal(answer, name)
                    yield answer
                    return
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        raise ModelUnavailableError(f"The hub {self.endpoint} redirects without end.", self._try_again)

    def _redirected(self, url: httpx.URL, location: str) -> httpx.URL:
        target = url.join(location)
        if target.scheme not in ("https", url.scheme):
            raise ModelUnavailableError(f"The hub {self.endpoint} redirects to an unsafe address.", self._try_again)
        return target

    def _unreachable(self, error: Exception) -> HubFailedError:
        return HubFailedError(
            f"The hub {self.endpoint} cannot be reached: {error or type(error).__name__}.",
            f"Check the network and the clock; set {self.endpoint_setting} for a mirror, or MODEL_SOURCE=local for a "
            "folder.")


def with_scheme(address: str) -> str:
    """A hub's address without a slash at its end; https where it names no scheme."""
    address = address.rstrip("/")
    return address if "://" in address else f"https://{address}"


def checked(path: object, size_bytes: int, sha256: str = "", blob_id: str = "") -> ModelFile:
    """A listed file.

    Raises:
        ModelUnavailableError: its path leaves the folder or its checksum is none.
    """
    if type(path) is not str or not is_plain(path) or size_bytes < 0:
        raise ModelUnavailableError(f"The hub lists a path that no model has: {path!r}. Nothing was fetched.",
                                    "Choose another model, and tell the hub about this one.")
    if (sha256 and not _SHA256.fullmatch(sha256)) or (blob_id and not COMMIT.fullmatch(blob_id)):
        raise ModelUnavailableError(f"The hub lists a checksum that is none for {path!r}.", "Try again later.")
    return ModelFile(path, size_bytes, sha256, blob_id=blob_id)


def _place(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
