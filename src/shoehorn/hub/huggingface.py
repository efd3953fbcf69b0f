"""HTTP API of huggingface.co and its mirrors: listing of a repository, and ranges of its files.

The rules of `repository` apply. Files in git LFS or Xet are listed with a SHA-256; small files have a git blob id, the
SHA-1 of a short header and the content.
API as used by huggingface_hub 2.4.0: `/api/models/{id}/revision/{revision}`, `/api/models/{id}/tree/{commit}` (in
pages, the next one in the header `Link`) and `/{id}/resolve/{commit}/{path}`.
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import httpx

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.config.settings import Settings
from shoehorn.hub.files import ModelFile
from shoehorn.hub.repository import COMMIT, HubFailedError, RemoteRepository, listed_file

DEFAULT_ENDPOINT = "https://huggingface.co"
_MAX_PAGES = 100  # of 1000 entries each


class HuggingFaceRepository(RemoteRepository):
    """A repository on Hugging Face."""

    source, other_source, name = "huggingface", "modelscope", "Hugging Face"
    endpoint_setting = "HF_ENDPOINT"
    token_setting = "HF_TOKEN"  # noqa: S105  # the name of a setting

    def __init__(self, settings: Settings, model: str, revision: str) -> None:
        secret = {"Authorization": f"Bearer {settings.hf_token}"} if settings.hf_token else {}
        super().__init__(model, revision, settings.hf_endpoint or DEFAULT_ENDPOINT, secret)

    def _list_files(self) -> Iterator[ModelFile]:
        document, _ = self._get_json(self._url(f"api/models/{self.model}/revision/{quote(self.revision, safe='')}"))
        commit = document["sha"]
        if not COMMIT.fullmatch(commit):
            raise self._invalid_listing_error()
        self.commit = commit
        url = self._url(f"api/models/{self.model}/tree/{commit}", recursive="true", expand="false")
        for _ in range(_MAX_PAGES):
            entries, response = self._get_json(url)
            for entry in entries:
                if entry["type"] == "file":
                    lfs = entry.get("lfs")
                    yield (listed_file(entry["path"], int(lfs["size"]), str(lfs["oid"]).lower()) if lfs
                           else listed_file(entry["path"], int(entry["size"]), blob_id=str(entry["oid"]).lower()))
            following = response.links.get("next", {}).get("url")
            if not following:
                return
            url = url.copy_merge_params(httpx.URL(following).params)  # a mirror may return the URL of another host
        raise ModelUnavailableError(f"{self.model}: too many files in the listing.", "Choose another model.",
                                    code="hub_invalid_listing")

    def _file_url(self, name: str) -> httpx.URL:
        return self._url(f"{self.model}/resolve/{self.commit}/{quote(name)}")

    def _response_error(self, response: httpx.Response, name: str) -> ModelUnavailableError:
        wrong_token = response.headers.get("x-error-message") == "Invalid credentials in Authorization header"
        if response.status_code == httpx.codes.UNAUTHORIZED and not name and not wrong_token:  # also for missing models
            return HubFailedError(f"{self.model}: not found on {self.name} ({self.endpoint}), or permission denied.",
                                  "Check MODEL_ID; for a private model set HF_TOKEN to a token with access. If the "
                                  f"model is on the other hub, set MODEL_SOURCE={self.other_source}.",
                                  code="hub_not_found")
        return super()._response_error(response, name)
