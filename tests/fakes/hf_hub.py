"""Stand-in for huggingface.co: its HTTP API over local folders.

API as used by huggingface_hub 2.4.0: commit of a revision, tree in pages, files by HEAD and GET with ranges, redirects
to storage for git LFS, errors with their codes. Faults of `fakes.hub` and of `MORE_FAULTS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from fakes.hub import FAULTS, Hub, _Handler, blob_id, commit_of

MORE_FAULTS = {
    "pages": "the tree comes in pages of two entries",
    "mislabelled": "small files are listed with another blob id",
}
FAULTS |= MORE_FAULTS
_LFS = (".safetensors", ".bin")


class HuggingFaceHub(Hub):
    """A running hub; see `fakes.hub.Hub`. `redirect` is the base URL of the storage for git LFS."""

    def handler(self) -> type[_Handler]:
        """Handler class of the API."""
        return _HuggingFaceHandler

    def downloads(self, name: str) -> list[str]:
        """Return the Range headers ("" for none) of the requests for a file."""
        return [request.headers.get("range", "") for request in list(self.requests)
                if urlparse(request.path).path.endswith(f"/{name}") and "/resolve/" in request.path]


class _HuggingFaceHandler(_Handler):
    signature = "?X-Amz-Signature=signed"
    owner: HuggingFaceHub

    def do_GET(self) -> None:
        if self._sent_error():
            return
        url = urlparse(self.path)
        for name, folder in list(self.owner.models.items()):
            for start in (f"/api/models/{name}/revision/", f"/api/models/{name}/tree/", f"/{name}/resolve/"):
                if not url.path.startswith(start):
                    continue
                revision, _, rest = unquote(url.path.removeprefix(start)).partition("/")
                at = self.owner.at(folder, revision)
                if at is None:
                    self._error(404, "RevisionNotFound")
                elif "/revision/" in start:
                    self._json(200, {"id": name, "sha": commit_of(at), "siblings": [], "private": False, "tags": []})
                    self.owner.move()
                elif "/tree/" in start:
                    self._tree(at, int(parse_qs(url.query).get("cursor", ["0"])[0]))
                elif (at / rest).is_file():
                    self._resolve(at / rest, commit_of(at))
                else:
                    self._error(404, "EntryNotFound")
                return
        self._error(401, "RepoNotFound")  # the hub does not distinguish private from missing

    do_HEAD = do_GET

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.owner.token}"

    def _tree(self, folder: Path, start: int) -> None:
        entries: list[dict[str, Any]] = []
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_dir():
                entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": name})
                continue
            content = path.read_bytes()
            entry = {"type": "file", "oid": blob_id(content), "size": len(content), "path": name}
            if path.suffix in _LFS:
                digest = hashlib.sha256(content).hexdigest()
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n"
                entry |= {"oid": blob_id(pointer.encode()), "xetHash": digest,
                          "lfs": {"oid": digest, "size": len(content), "pointerSize": len(pointer)}}
            elif self.owner.has("mislabelled"):
                entry["oid"] = blob_id(b"another")
            entries.append(entry)
        if self.owner.has("traversal"):
            entries.append({"type": "file", "oid": blob_id(b"{}"), "size": 2, "path": "../../escape.json"})
        length = 2 if self.owner.has("pages") else 1000
        more = {}
        if start + length < len(entries):  # the real hub returns its own URL, also through a mirror
            more["Link"] = f'<https://huggingface.co{urlparse(self.path).path}?cursor={start + length}>; rel="next"'
        self._json(200, entries[start:start + length], more)

    def _resolve(self, path: Path, commit: str) -> None:
        self._commit = commit
        self._file(path)

    def _redirects(self, path: Path) -> bool:
        return path.suffix in _LFS

    def _headers_of(self, path: Path, content: bytes) -> dict[str, str]:
        headers = {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": self._commit}
        if path.suffix in _LFS:
            digest = hashlib.sha256(content).hexdigest()
            headers |= {"ETag": f'"{digest}"', "X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return headers

    def _send(self, content: bytes, bytes_per_second: int, *, cut: bool, stall: bool) -> None:
        if self.command == "HEAD":
            return
        super()._send(content, bytes_per_second, cut=cut, stall=stall)

    def _error(self, status: int, code: str = "", more: Mapping[str, str] | None = None) -> None:
        words = {"RepoNotFound": "Repository not found", "EntryNotFound": "Entry not found"}
        headers = {"X-Error-Code": code, "X-Error-Message": words.get(code, code)} if code else {}
        self._json(status, {"error": words.get(code, f"no: {status}")}, {**headers, **(more or {})})
