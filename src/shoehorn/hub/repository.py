"""Base class of the hub clients: the repository of one model at one revision, over HTTP.

Rules:
- every listed path is validated before use, and one unsafe path rejects the listing;
- the token is sent to the hub's own origin only, never to the target of a redirect;
- no more of a response is read than requested;
- after the hub returned the commit of the revision, all other requests use that commit, so that a moving branch cannot
  mix two versions.
"""

from __future__ import annotations

import json
import os
import re
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Self

import httpx

from shoehorn.common.errors import ModelUnavailableError, SettingsError
from shoehorn.config import network
from shoehorn.hub.files import ModelFile, is_plain

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_JSON_BYTES = 64 << 20
_MAX_REDIRECTS = 5


class HubFailedError(ModelUnavailableError):
    """The hub is unavailable, fails, or lacks the model or file. Another hub may have it."""

    code = "hub_failed"


class RemoteRepository(ABC):
    """The repository of one model at one revision. Implements `model.files.Files`.

    Args:
        model: OWNER/NAME.
        revision: branch, tag or commit.
        endpoint: base URL of the hub; https if it names no scheme, as in the libraries.
        secret: headers with the token.

    Attributes:
        source: value of MODEL_SOURCE for this hub; other_source: for the other one.
        name: of the hub, for messages.
        commit: commit of `revision`, 40 hexadecimal digits; "" before `listing`, or if the hub does not return it.
    """

    source: ClassVar[str]
    name: ClassVar[str]
    other_source: ClassVar[str]
    endpoint_setting: ClassVar[str]
    token_setting: ClassVar[str]

    def __init__(self, model: str, revision: str, endpoint: str, secret: Mapping[str, str]) -> None:
        self.model, self.revision, self.commit = model, revision, ""
        self.endpoint = with_scheme(endpoint)
        self._secret = dict(secret)
        try:
            self._client = httpx.Client(timeout=httpx.Timeout(30, connect=10))
        except (httpx.InvalidURL, ValueError, ImportError, OSError) as error:  # of proxies and certificates
            raise SettingsError(f"HTTPS_PROXY, NO_PROXY or SSL_CERT_FILE: unusable ({type(error).__name__}).",
                                "Correct or unset these variables.", code="invalid_network") from error
        self._close = weakref.finalize(self, self._client.close)
        self._listing: tuple[ModelFile, ...] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:
        self._close()

    def close(self) -> None:
        """Close the connections."""
        self._close()

    def listing(self) -> tuple[ModelFile, ...]:
        """Return every file of the repository; requested once.

        Raises:
            HubFailedError: the hub is unavailable, rejects the request, or lacks the model.
            ModelUnavailableError: the listing is invalid.
        """
        if self._listing is None:
            try:
                files = tuple(self._list_files())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._invalid_listing_error() from error
            if len({file.path for file in files}) != len(files):
                raise ModelUnavailableError(f"{self.model}: duplicate file in the hub listing.", self._retry,
                                            code="hub_invalid_listing")
            self._listing = files
        return self._listing

    def names(self) -> Mapping[str, int]:
        """Return the size in bytes by path."""
        return {file.path: file.size_bytes for file in self.listing()}

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read up to `length` bytes of a listed file from `start`, with a range request.

        Raises:
            ModelUnavailableError: the hub does not return them.
        """
        size = self.names()[name]
        end = size if length is None else min(size, start + length)
        if end <= start:
            return b""
        body = bytearray()
        with self._get(self._file_url(name), {"Range": f"bytes={start}-{end - 1}"}, name) as response:
            skip = start  # a hub that ignores ranges sends the whole file
            if response.status_code == httpx.codes.PARTIAL_CONTENT:
                skip = 0
                if not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
                    raise ModelUnavailableError(f"{name}: the hub returned another range than requested.",
                                                self._retry, code="hub_invalid_response")
            for block in response.iter_bytes():
                body += block[skip:]
                skip = max(0, skip - len(block))
                if len(body) >= end - start:
                    break
        if len(body) < end - start:
            raise ModelUnavailableError(f"{name}: the hub returned fewer bytes than listed.", self._retry,
                                        code="hub_size_mismatch")
        return bytes(body[:end - start])

    @abstractmethod
    def _list_files(self) -> Iterator[ModelFile]:
        """Request the listing and set `commit`; an error of parsing means an invalid listing."""

    @abstractmethod
    def _file_url(self, name: str) -> httpx.URL:
        """Return the URL of a file at `commit`."""

    def _response_error(self, response: httpx.Response, name: str) -> ModelUnavailableError:
        """Return the error for an unsuccessful response."""
        subject = f"{name} of {self.model}" if name else self.model
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            return ModelUnavailableError(f"{subject}: permission denied by the hub.",
                                         f"Set {self.token_setting} to a token with access.",
                                         code="hub_permission_denied")
        if response.status_code == httpx.codes.NOT_FOUND:
            return self._not_found_error(name)
        return HubFailedError(f"Hub {self.endpoint}: returned status {response.status_code}.", "Retry later.",
                              code="hub_error")

    def _not_found_error(self, name: str = "") -> HubFailedError:
        subject = f"File {name} of {self.model}" if name else f"Model {self.model}"
        return HubFailedError(f"{subject}: not found on {self.name} ({self.endpoint}) at revision {self.revision}.",
                              "Check MODEL_ID and MODEL_REVISION, including upper and lower case. If the model is on "
                              f"the other hub, set MODEL_SOURCE={self.other_source}.", code="hub_not_found")

    def _invalid_listing_error(self) -> ModelUnavailableError:
        return ModelUnavailableError(f"{self.model}: invalid hub listing.", self._retry, code="hub_invalid_listing")

    @property
    def _retry(self) -> str:
        return f"Retry; if {self.endpoint_setting} is set, check it."

    def _url(self, path: str, **query: str) -> httpx.URL:
        """Return the URL of `path` below the endpoint."""
        try:
            origin = httpx.URL(self.endpoint)
            url = origin.join(f"{origin.path.rstrip('/')}/{path}")
        except httpx.InvalidURL as error:
            raise self._unavailable_error(error) from error
        return url.copy_merge_params(query) if query else url

    def _get_json(self, url: httpx.URL) -> tuple[Any, httpx.Response]:
        """Return the JSON at a URL, and the response for its headers.

        Raises:
            ModelUnavailableError: invalid or too large.
        """
        body = bytearray()
        with self._get(url, {}, "") as response:
            for block in response.iter_bytes():
                body += block
                if len(body) > _MAX_JSON_BYTES:
                    raise self._invalid_listing_error()
        try:
            return json.loads(body), response
        except (ValueError, RecursionError) as error:
            raise self._invalid_listing_error() from error

    @contextmanager
    def _get(self, url: httpx.URL, headers: Mapping[str, str], name: str) -> Iterator[httpx.Response]:
        """Send a GET request, follow redirects, and yield the open response."""
        try:
            origin = _origin(httpx.URL(self.endpoint))
            for _ in range(_MAX_REDIRECTS):
                secret = self._secret if _origin(url) == origin else {}
                with self._client.stream("GET", url, headers={**headers, **secret, "Accept-Encoding": "identity"},
                                         ) as response:
                    if response.has_redirect_location:
                        url = self._redirected(url, response.headers["location"])
                        continue
                    if not response.is_success:
                        raise self._response_error(response, name)
                    yield response
                    return
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unavailable_error(error) from error
        raise ModelUnavailableError(f"Hub {self.endpoint}: too many redirects.", self._retry,
                                    code="hub_invalid_response")

    def _redirected(self, url: httpx.URL, location: str) -> httpx.URL:
        target = url.join(location)
        if target.scheme not in ("https", url.scheme):
            raise ModelUnavailableError(f"Hub {self.endpoint}: redirect to an insecure URL.", self._retry,
                                        code="hub_invalid_response")
        return target

    def _unavailable_error(self, error: Exception) -> HubFailedError:
        return HubFailedError(
            f"Hub {self.endpoint}: unavailable: {error or type(error).__name__}.",
            f"Check the network and the clock; set {self.endpoint_setting} for a mirror, or MODEL_SOURCE=local for a "
            f"folder.{_proxy_hint()}", code="hub_unavailable")


def _proxy_hint() -> str:
    """Name the proxy variables in use, without their values."""
    names = network.proxies_in_use(os.environ)
    return f" Check the proxy of {names}; in a container 127.0.0.1 is the container itself." if names else ""


def with_scheme(address: str) -> str:
    """Normalize a base URL: no trailing slash; https if it names no scheme."""
    address = address.rstrip("/")
    return address if "://" in address else f"https://{address}"


def listed_file(path: object, size_bytes: int, sha256: str = "", blob_id: str = "") -> ModelFile:
    """Validate one entry of a listing.

    Raises:
        ModelUnavailableError: unsafe path or invalid checksum.
    """
    if type(path) is not str or not is_plain(path) or size_bytes < 0:
        raise ModelUnavailableError(f"Unsafe path in hub listing: {path!r}. Download aborted.",
                                    "Choose another model, and report this one to the hub.", code="hub_unsafe_path")
    if (sha256 and not _SHA256.fullmatch(sha256)) or (blob_id and not COMMIT.fullmatch(blob_id)):
        raise ModelUnavailableError(f"Invalid checksum in hub listing for {path!r}.", "Retry later.",
                                    code="hub_invalid_listing")
    return ModelFile(path, size_bytes, sha256, blob_id=blob_id)


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
