"""The HTTP API of huggingface.co and its mirrors: what a repository holds, and parts of its files.

The rules stand in `hub_http`. Only what git LFS or Xet holds is listed with a SHA-256; small files have their git blob
id, which is the SHA-1 of their content behind a short header.
API as asked by huggingface_hub 2.4.0: `/api/models/{id}/revision/{revision}`, `/api/models/{id}/tree/{commit}` (in
pages, the next one in the header `Link`) and `/{id}/resolve/{commit}/{path}`.
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import httpx

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.config.settings import Settings
from shoehorn.hub.files import ModelFile
from shoehorn.hub.repository import COMMIT, HubFailedError, HubFiles, checked

DEFAULT_ENDPOINT = "https://huggingface.co"
_MOST_PAGES = 100  # of 1000 entries each


class HuggingFaceHub(HubFiles):
    """A repository on Hugging Face."""

    source = "huggingface"
    endpoint_setting = "HF_ENDPOINT"
    token_setting = "HF_TOKEN"  # noqa: S105  # the name of a setting

    def __init__(self, settings: Settings, model: str, revision: str) -> None:
        secret = {"Authorization": f"Bearer {settings.hf_token}"} if settings.hf_token else {}
        super().__init__(model, revision, settings.hf_endpoint or DEFAULT_ENDPOINT, secret)

    def _listed(self) -> Iterator[ModelFile]:
        document, _ = self._document(self._url(f"api/models/{self.model}/revision/{self.revision}"))
        commit = document["sha"]
        if not COMMIT.fullmatch(commit):
            raise self._unreadable()
        self.commit = commit
        url = self._url(f"api/models/{self.model}/tree/{commit}", recursive="true", expand="false")
        for _ in range(_MOST_PAGES):
            entries, answer = self._document(url)
            for entry in entries:
                if entry["type"] == "file":
                    lfs = entry.get("lfs")
                    yield (checked(entry["path"], int(lfs["size"]), str(lfs["oid"]).lower()) if lfs
                           else checked(entry["path"], int(entry["size"]), blob_id=str(entry["oid"]).lower()))
            following = answer.links.get("next", {}).get("url")
            if not following:
                return
            url = url.copy_merge_params(httpx.URL(following).params)  # a mirror may name another host there
        raise ModelUnavailableError(f"{self.model} has more files than any model.", "Choose another.")

    def _address(self, name: str) -> httpx.URL:
        return self._url(f"{self.model}/resolve/{self.commit}/{quote(name)}")

    def _refusal(self, answer: httpx.Response, name: str) -> ModelUnavailableError:
        wrong_token = answer.headers.get("x-error-message") == "Invalid credentials in Authorization header"
        if answer.status_code == httpx.codes.UNAUTHORIZED and not name and not wrong_token:  # so for absent models too
            return HubFailedError(f"The hub has no model {self.model}, or does not let us read it.",
                                  "Check MODEL_ID; for a private one set HF_TOKEN to a token that may.")
        return super()._refusal(answer, name)
