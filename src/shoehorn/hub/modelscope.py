"""HTTP API of ModelScope: listing of a repository, and ranges of its files. The rules of `repository` apply.

The token is sent as by the library: as bearer token and as cookie.
API as used by modelscope_hub 0.5.1: `/api/v1/models/{id}/repo/files` and `/api/v1/models/{id}/repo`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.config.settings import Settings
from shoehorn.hub.files import ModelFile
from shoehorn.hub.repository import COMMIT, RemoteRepository, listed_file, with_scheme

DEFAULT_ENDPOINT = "https://modelscope.cn"
_MAX_ENTRIES = 3000  # the hub truncates a listing here without notice


class ModelScopeRepository(RemoteRepository):
    """A repository on ModelScope. Of 3000 entries or more, only the files of the top folder are listed."""

    source, other_source, name = "modelscope", "huggingface", "ModelScope"
    endpoint_setting = "MODELSCOPE_ENDPOINT"
    token_setting = "MODELSCOPE_API_TOKEN"  # noqa: S105  # the name of a setting

    def __init__(self, settings: Settings, model: str, revision: str) -> None:
        token = settings.modelscope_api_token
        secret = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
        super().__init__(model, revision, endpoint(settings), secret)

    def _list_files(self) -> Iterator[ModelFile]:
        entries = self._entries(recursive=True)
        if len(entries) >= _MAX_ENTRIES:
            entries = self._entries(recursive=False)
        if len(entries) >= _MAX_ENTRIES:
            raise ModelUnavailableError(f"{self.model}: more files than the hub lists.", "Choose another model.",
                                        code="hub_invalid_listing")
        for entry in entries:
            if entry.get("Type") != "tree":
                yield listed_file(entry["Path"], int(entry["Size"]), str(entry.get("Sha256") or "").lower())

    def _entries(self, *, recursive: bool) -> list[Any]:
        document, _ = self._get_json(self._url(f"api/v1/models/{self.model}/repo/files",
                                               Revision=self.commit or self.revision, Recursive=str(recursive)))
        data = document["Data"]
        entries = data if isinstance(data, list) else data["Files"]
        if entries is None:  # the response for a missing revision
            raise self._not_found_error()
        if not isinstance(entries, list):
            raise self._invalid_listing_error()
        if isinstance(data, dict):
            self.commit = _commit(data.get("LatestCommitter"), entries)
        return entries

    def _file_url(self, name: str) -> httpx.URL:
        return self._url(f"api/v1/models/{self.model}/repo", Revision=self.commit or self.revision, FilePath=name)


def endpoint(settings: Settings) -> str:
    """Return the base URL of the hub."""
    return with_scheme(settings.modelscope_endpoint or DEFAULT_ENDPOINT)


def _commit(latest: Any, entries: list[Any]) -> str:
    """Return the commit of a listing, or "" if unknown.

    The hub lists the last commit of each file, and of the repository the commit or only its first digits. The digits
    are completed from the commits of the files, if the last commit changed a file that still exists.
    """
    if not isinstance(latest, dict):
        return ""
    commit, prefix = str(latest.get("Id") or ""), str(latest.get("ShortId") or "")
    if COMMIT.fullmatch(commit):
        return commit
    revisions = {str(entry.get("Revision") or "") for entry in entries if isinstance(entry, dict)}
    matches = [each for each in revisions if len(prefix) >= 7 and each.startswith(prefix) and COMMIT.fullmatch(each)]
    return matches[0] if len(matches) == 1 else ""
