"""A stand-in ModelScope hub: the true HTTP API over folders of this machine.

As a class in tests, or `python -m fakes.hub --port N --model owner/name=DIR [--bytes-per-second R] [--fault NAME]`.
API as asked by modelscope 1.40.2 / modelscope_hub 0.5.1. A fault is one branch in `_Handler`:
flip (a byte of the weights), cut (the connection, in the middle), traversal (a listed `../`), nosha (no checksums).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import socket
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlparse

_PIECE_BYTES = 64 << 10


class Hub:
    """A running hub; `requests` records (path with query, Range header) in the order of arrival."""

    def __init__(self, models: Mapping[str, Path], *, bytes_per_second: int = 0, fault: str = "", token: str = "",
                 address: str = "127.0.0.1", port: int = 0) -> None:
        self.models, self.bytes_per_second, self.fault, self.token = dict(models), bytes_per_second, fault, token
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(_Handler):
            owner = hub

        self.server = ThreadingHTTPServer((address, port), Handler)
        self.server.daemon_threads = True
        self.port = int(self.server.server_address[1])
        self.url = f"http://{address}:{self.port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def downloads(self, name: str) -> list[str]:
        """The Range headers with which a file was asked for."""
        return [span for path, span in self.requests if parse_qs(urlparse(path).query).get("FilePath") == [name]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Hub

    def do_GET(self) -> None:
        """Every request that the client makes is a GET."""
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.owner.requests.append((self.path, self.headers.get("Range", "")))
        if self.owner.token and not self._has_token():
            self._json(401, {"Code": 401, "Message": "unauthorized", "Success": False, "RequestId": "r"})
            return
        for name, folder in self.owner.models.items():
            if url.path == f"/api/v1/models/{name}/repo/files":
                self._json(200, {"Code": 200, "Success": True, "RequestId": "r", "Data": {"Files": self._list(folder)}})
                return
            if url.path == f"/api/v1/models/{name}/repo" and (folder / query.get("FilePath", "/none")).is_file():
                self._file((folder / query["FilePath"]).read_bytes(), query["FilePath"])
                return
        self._json(404, {"Code": 10010205001, "Message": "not found", "Success": False, "RequestId": "r"})

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: `requests` holds it all."""

    def _has_token(self) -> bool:
        return (self.headers.get("Authorization") == f"Bearer {self.owner.token}"
                and f"m_session_id={self.owner.token}" in self.headers.get("Cookie", ""))

    def _list(self, folder: Path) -> list[dict[str, Any]]:
        files: list[dict[str, Any]] = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            content = path.read_bytes()
            digest = {} if self.owner.fault == "nosha" else {"Sha256": hashlib.sha256(content).hexdigest()}
            files.append({"Path": str(path.relative_to(folder)), "Name": path.name, "Type": "blob",
                          "Size": len(content), **digest})
        if self.owner.fault == "traversal":
            files.append({"Path": "../../escape.json", "Name": "escape.json", "Type": "blob", "Size": 4, "Sha256": ""})
        return files

    def _file(self, content: bytes, name: str) -> None:
        if self.owner.fault == "flip" and name.endswith(".safetensors"):
            content = content[:-1] + bytes([content[-1] ^ 1])
        total, start, end, status = len(content), 0, len(content) - 1, 200
        if span := self.headers.get("Range"):
            first, last = span.removeprefix("bytes=").split("-")
            start, end, status = int(first), min(int(last) if last else total - 1, total - 1), 206
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - start + 1))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end}/{total}")
        self.end_headers()
        self._send(content[start:end + 1], name)

    def _send(self, content: bytes, name: str) -> None:
        weights = name.endswith(".safetensors")
        try:
            for offset in range(0, len(content), _PIECE_BYTES):
                if self.owner.fault == "cut" and weights and offset >= len(content) // 2:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.wfile.write(content[offset:offset + _PIECE_BYTES])
                if self.owner.bytes_per_second and weights:
                    time.sleep(_PIECE_BYTES / self.owner.bytes_per_second)
        except OSError:
            pass  # the client left, as tests that kill it intend

    def _json(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="A stand-in ModelScope hub.")
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", action="append", default=[], metavar="OWNER/NAME=DIR")
    parser.add_argument("--bytes-per-second", type=int, default=0)
    parser.add_argument("--fault", default="")
    arguments = parser.parse_args()
    models = {name: Path(folder) for name, folder in (pair.split("=", 1) for pair in arguments.model)}
    with Hub(models, bytes_per_second=arguments.bytes_per_second, fault=arguments.fault, address=arguments.address,
             port=arguments.port) as hub:
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
