"""Stand-in for the engine's `/metrics` on a Unix socket, with a response set by the test."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEXT = b"text/plain; version=0.0.4; charset=utf-8"


def http(body: bytes, status: bytes = b"200 OK", kind: bytes = TEXT) -> bytes:
    """Return a complete HTTP response."""
    return b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (status, kind, len(body), body)


class EngineSocket(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Server of `answer`, raw bytes, in pieces of `piece` bytes with `pause_seconds` between; records the requests.

    With `keep_alive` the connection stays open until the client closes it, which sets `closed`.
    """

    daemon_threads = True

    def __init__(self, path: Path, answer: bytes) -> None:
        self.answer = answer
        self.piece, self.pause_seconds = len(answer) or 1, 0.0
        self.keep_alive = False
        self.closed, self.over = threading.Event(), threading.Event()
        self.requests: list[str] = []
        super().__init__(str(path), _Handler)


class _Handler(socketserver.BaseRequestHandler):
    server: EngineSocket
    request: socket.socket

    def handle(self) -> None:
        self.server.requests.append(self.request.recv(65536).decode())
        with suppress(BrokenPipeError, ConnectionResetError):  # the client may disconnect
            for start in range(0, len(self.server.answer), self.server.piece):
                self.request.sendall(self.server.answer[start:start + self.server.piece])
                if self.server.over.wait(self.server.pause_seconds):
                    return
            if self.server.keep_alive and self.request.recv(1) == b"":
                self.server.closed.set()


@contextmanager
def serving(path: Path, answer: bytes) -> Iterator[EngineSocket]:
    """Run an engine that listens on `path`."""
    with EngineSocket(path, answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()
            path.unlink()
