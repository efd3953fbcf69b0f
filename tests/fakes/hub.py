"""Stand-in for ModelScope: its HTTP API over local folders.

As a class in tests, or `python tests/fakes/hub.py --port N --model owner/name=DIR [--bytes-per-second R] [--fault F]`.
API as used by modelscope 1.40.2 / modelscope_hub 0.5.1: listing, files with ranges, errors, the token as bearer and as
cookie. To add a fault, add it to `FAULTS` and check `self.owner.has(NAME)` in `_Handler`.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlparse

FAULTS = {
    "slow": "weights are sent with 200 kB/s, unless set otherwise",
    "flip": "the last byte of weights is wrong",
    "cut": "the connection closes in the middle of weights, once for each file",
    "stall": "sending stops in the middle of weights, once for each file",
    "hang": "like stall, every time", "mute": "no request gets a response",
    "busy": "each weights file gets status 429 once", "down": "each weights file gets status 503 once",
    "reset": "the connection is reset in the middle of a weights file, once",
    "short": "weights are shorter than listed, with a matching Content-Length",
    "traversal": "the listing contains a path outside the folder",
    "nosha": "the listing contains no checksums",
    "linked": "files are sent with their checksum as X-Linked-ETag",
    "norange": "ranges are ignored",
    "absent": "weights are listed but missing",
    **{status: f"every request gets status {status}" for status in ("401", "403", "404", "429", "503")},
}
_PIECE_BYTES = 64 << 10
_SLOW_BYTES_PER_SECOND = 200_000


class Request(NamedTuple):
    """A request: path with query, and headers by lowercase name."""

    path: str
    headers: Mapping[str, str]


class Hub:
    """A running hub; `requests` records all requests in order.

    Args:
        models: folders by OWNER/NAME.
        bytes_per_second: of each connection that sends weights; 0 for no limit.
        fault: one of FAULTS, or several with commas between them.
        token: required for every request, if not empty.
        redirect: base URL to which requests for files are redirected.
        then: folders that replace `models` after the first listing: a moving branch.

    Attributes:
        hold_at_bytes: byte of the weights after which sending stops until the client disconnects; 0 for none.
    """

    def __init__(self, models: Mapping[str, Path], *, bytes_per_second: int = 0, fault: str = "", token: str = "",
                 redirect: str = "", then: Mapping[str, Path] | None = None, address: str = "127.0.0.1",
                 port: int = 0) -> None:
        self.models, self.bytes_per_second, self.token, self.redirect = dict(models), bytes_per_second, token, redirect
        self.then = then or {}
        self.commits = {commit_of(folder): folder for folder in models.values()}
        self.faults = {name for name in fault.split(",") if name}
        if unknown := self.faults - set(FAULTS):
            raise ValueError(f"no such fault: {', '.join(unknown)}; there are {', '.join(FAULTS)}")
        if self.has("slow") and not bytes_per_second:
            self.bytes_per_second = _SLOW_BYTES_PER_SECOND
        self.requests: list[Request] = []
        self.hold_at_bytes = 0
        self.once: set[str] = set()
        hub, base = self, self.handler()

        class Handler(base):  # type: ignore[misc,valid-type]  # binds the hub
            owner = hub

        self.server = _Server((address, port), Handler)
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

    def handler(self) -> type[_Handler]:
        """Handler class of the API."""
        return _Handler

    def has(self, fault: str) -> bool:
        """Return whether the hub has this fault."""
        return fault in self.faults

    def at(self, folder: Path, revision: str) -> Path | None:
        """Return the folder of a revision; None if it does not exist."""
        return self.commits.get(revision) if re.fullmatch("[0-9a-f]{40}", revision) else folder

    def move(self) -> None:
        """Move the branches, if `then` is set."""
        self.models |= self.then

    def downloads(self, name: str) -> list[str]:
        """Return the Range headers ("" for none) of the requests for a file."""
        return [request.headers.get("range", "") for request in list(self.requests)
                if parse_qs(urlparse(request.path).query).get("FilePath") == [name]]


def commit_of(folder: Path) -> str:
    """Return a commit derived from the names and contents of all files."""
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)} {blob_id(path.read_bytes())}\n".encode())
    return digest.hexdigest()


def blob_id(content: bytes) -> str:
    """Return git's blob id of a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore disconnected clients: tests kill them."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    signature = ""  # query that the storage requires
    owner: Hub

    def do_GET(self) -> None:
        """Handle a request."""
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if self._sent_error():
            return
        for name, folder in list(self.owner.models.items()):
            at = self.owner.at(folder, query.get("Revision", "master"))
            if url.path == f"/api/v1/models/{name}/repo/files":
                data: dict[str, Any] = {"Files": None, "LatestCommitter": None}  # response for a missing revision
                if at:
                    commit = commit_of(at)
                    files = self._list(at, recursive=query.get("Recursive") != "False")
                    files[0]["Revision"] = commit  # the other files have earlier commits
                    data = {"Files": files, "LatestCommitter": {"Id": "", "ShortId": commit[:8]}}
                self._json(200, {"Code": 200, "Success": True, "RequestId": "r", "Data": data})
                self.owner.move()
                return
            if url.path == f"/api/v1/models/{name}/repo" and at and (at / query.get("FilePath", "/none")).is_file():
                self._file(at / query["FilePath"])
                return
        self._error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: `requests` records all."""

    def _sent_error(self) -> bool:
        """Record the request; return whether an error response was sent."""
        self.owner.requests.append(Request(self.path, {name.lower(): value for name, value in self.headers.items()}))
        if self.owner.has("mute"):
            self._wait_for_the_end()
            return True
        status = next((int(fault) for fault in self.owner.faults if fault.isdigit()), 200)
        if self.owner.token and not self._has_token():
            status = 401
        if status != 200:
            self._error(status)
        return status != 200

    def _has_token(self) -> bool:
        return (self.headers.get("Authorization") == f"Bearer {self.owner.token}"
                and f"m_session_id={self.owner.token}" in self.headers.get("Cookie", ""))

    def _list(self, folder: Path, *, recursive: bool) -> list[dict[str, Any]]:
        files: list[dict[str, Any]] = []
        for path in sorted(folder.rglob("*") if recursive else folder.glob("*")):
            entry = {"Path": str(path.relative_to(folder)), "Name": path.name, "Revision": "0" * 39 + "1"}
            if path.is_dir():
                files.append({**entry, "Type": "tree", "Size": 0})
                continue
            content = path.read_bytes()
            digest = {} if self.owner.has("nosha") else {"Sha256": hashlib.sha256(content).hexdigest()}
            files.append({**entry, "Type": "blob", "Size": len(content), **digest})
        if self.owner.has("traversal"):
            files.append({"Path": "../../escape.json", "Name": "escape.json", "Type": "blob", "Size": 4, "Sha256": ""})
        return files

    def _file(self, path: Path) -> None:
        weights = path.suffix == ".safetensors"
        if weights and self._sent_error_once(path.name):
            return
        if self.owner.redirect and self._redirects(path):
            target = self.owner.redirect + self.path + self.signature
            more = self._headers_of(path, path.read_bytes())
            self._answer(302, {"Location": target, "Content-Length": "0", **more})
            return
        if weights and self.owner.has("absent"):
            self._error(404)
            return
        content = path.read_bytes()
        headers = {"Content-Type": "application/octet-stream", **self._headers_of(path, content)}
        if weights and self.owner.has("flip"):
            content = content[:-1] + bytes([content[-1] ^ 1])
        if weights and self.owner.has("short"):
            content = content[:-100]
        total, start, end, status = len(content), 0, len(content) - 1, 200
        span = "" if self.owner.has("norange") else self.headers.get("Range", "")
        if span:
            first, last = span.removeprefix("bytes=").split("-")
            start, end, status = int(first), min(int(last) if last else total - 1, total - 1), 206
            if start >= total:
                self._answer(416, {"Content-Range": f"bytes */{total}", "Content-Length": "0"})
                return
            headers["Content-Range"] = f"bytes {start}-{end}/{total}"
        self._answer(status, {**headers, "Content-Length": str(end - start + 1)})
        cut = weights and self.owner.has("cut") and not span
        stall = weights and (self.owner.has("hang") or (self.owner.has("stall") and not span))
        large = end - start >= 1 << 20 and self.command == "GET"
        if large and self.owner.has("reset") and "reset" not in self.owner.once:
            self.owner.once.add("reset")
            self._reset(content)
            return
        if weights and self.owner.hold_at_bytes and self.command == "GET":
            self._send(content[start:self.owner.hold_at_bytes], 0, cut=False, stall=False)
            self._wait_for_the_end()
            return
        self._send(content[start:end + 1], self.owner.bytes_per_second if weights else 0, cut=cut, stall=stall)

    def _sent_error_once(self, name: str) -> bool:
        status = 429 if self.owner.has("busy") else 503 if self.owner.has("down") else 0
        if not status or self.command != "GET" or "Range" in self.headers or name in self.owner.once:
            return False
        self.owner.once.add(name)
        self._error(status, more={"Retry-After": "0"})
        return True

    def _redirects(self, path: Path) -> bool:
        return True

    def _headers_of(self, path: Path, content: bytes) -> dict[str, str]:
        return {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"'} if self.owner.has("linked") else {}

    def _send(self, content: bytes, bytes_per_second: int, *, cut: bool, stall: bool) -> None:
        try:
            for offset in range(0, len(content), _PIECE_BYTES):
                if stall and offset >= len(content) // 2:
                    self.close_connection = True
                    self.connection.recv(1)  # until the client disconnects
                    return
                if cut and offset >= len(content) // 2:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)  # close() alone does not end the response
                    return
                piece = content[offset:offset + _PIECE_BYTES]
                self.wfile.write(piece)
                if bytes_per_second and self.owner.bytes_per_second:  # a test may change it meanwhile
                    time.sleep(len(piece) / bytes_per_second)
        except OSError:
            self.close_connection = True  # the client disconnected

    def _reset(self, content: bytes) -> None:
        self.close_connection = True
        self.wfile.write(content[:len(content) // 2])
        while fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4)) != bytes(4):
            time.sleep(0.01)  # until the client received that half, or the reset would overtake it
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def _wait_for_the_end(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.recv(1)  # until the client disconnects

    def _error(self, status: int, code: str = "", more: Mapping[str, str] | None = None) -> None:
        self._json(status, {"Code": 10010205001, "Message": f"no: {status}", "Success": False, "RequestId": "r"}, more)

    def _json(self, status: int, body: object, more: Mapping[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self._answer(status, {"Content-Type": "application/json", "Content-Length": str(len(content)), **(more or {})})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="A stand-in ModelScope hub.")
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", action="append", default=[], metavar="OWNER/NAME=DIR")
    parser.add_argument("--bytes-per-second", "--delay-bytes-per-second", type=int, default=0, metavar="R")
    parser.add_argument("--fault", default="", help="; ".join(f"{name}: {text}" for name, text in FAULTS.items()))
    parser.add_argument("--token", default="")
    arguments = parser.parse_args()
    models = {name: Path(folder) for name, folder in (pair.split("=", 1) for pair in arguments.model)}
    with Hub(models, bytes_per_second=arguments.bytes_per_second, fault=arguments.fault, token=arguments.token,
             address=arguments.address, port=arguments.port) as hub:
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
