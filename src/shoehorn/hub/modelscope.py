"""ModelScope's HTTP API: what a repository holds, and parts of its files. The rules stand in `hub_http`.

The token travels as the library sends it: as bearer and as cookie.
API as asked by modelscope_hub 0.5.1: `/api/v1/models/{id}/repo/files` and `/api/v1/models/{id}/repo`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.config.settings import Settings
from shoehorn.hub.files import ModelFile
from shoehorn.hub.repository import COMMIT, HubFiles, checked, with_scheme

DEFAULT_ENDPOINT = "https://modelscope.cn"
_MOST_LISTED = 3000  # the hub cuts a listing here, and does not say so


class Hub(HubFiles):
    """A repository on ModelScope. Of one with 3000 entries or more, only the files outside folders are listed."""

    source = "modelscope"
    endpoint_setting = "MODELSCOPE_ENDPOINT"
    token_setting = "MODELSCOPE_API_TOKEN"  # noqa: S105  # the name of a setting

    def __init__(self, settings: Settings, model: str, revision: str) -> None:
        token = settings.modelscope_api_token
        secret = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
        super().__init__(model, revision, endpoint(settings), secret)

    def _listed(self) -> Iterator[ModelFile]:
        entries = self._entries(recursive=True)
        if len(entries) >= _MOST_LISTED:
            entries = self._entries(recursive=False)
        if len(entries) >= _MOST_LISTED:
            raise ModelUnavailableError(f"{self.model} has more files than the hub lists.", "Choose another.")
        for entry in entries:
            if entry.get("Type") != "tree":
                yield checked(entry["Path"], int(entry["Size"]), str(entry.get("Sha256") or "").lower())

    def _entries(self, *, recursive: bool) -> list[Any]:
        document, _ = self._document(self._url(f"api/v1/models/{self.model}/repo/files",
                                               Revision=self.commit or self.revision, Recursive=str(recursive)))
        data = document["Data"]
        entries = data if isinstance(data, list) else data["Files"]
        if entries is None:  # how this hub answers for a revision that it does not have
            raise self._absent()
        if not isinstance(entries, list):
            raise self._unreadable()
        if isinstance(data, dict):
            self.commit = _commit(data.get("LatestCommitter"), entries)
        return entries

    def _address(self, name: str) -> httpx.URL:
        return self._url(f"api/v1/models/{self.model}/repo", Revision=self.commit or self.revision, FilePath=name)


def endpoint(settings: Settings) -> str:
    """The hub's address."""
    return with_scheme(settings.modelscope_endpoint or DEFAULT_ENDPOINT)


def _commit(latest: Any, entries: list[Any]) -> str:
    """The commit of a listing, or "".

    The hub gives the last commit of each file, and of the whole either the commit or its first digits only: then it is
    the file's commit that begins so, where the last commit changed a file that is still there.
    """
    if not isinstance(latest, dict):
        return ""
    whole, short = str(latest.get("Id") or ""), str(latest.get("ShortId") or "")
    if COMMIT.fullmatch(whole):
        return whole
    ends = {str(entry.get("Revision") or "") for entry in entries if isinstance(entry, dict)}
    found = [commit for commit in ends if len(short) >= 7 and commit.startswith(short) and COMMIT.fullmatch(commit)]
    return found[0] if len(found) == 1 else ""
