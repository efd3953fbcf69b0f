"""Stand-in for the engine's API server on a Unix socket, for tests of the gateway.

It returns 200 for every path, so that `requests` shows what the gateway forwards. A body can control it:
`{"stream": true, "events": N}` sends N server-sent events, each after a call of `allow`; `{"slow": true}` waits for
`allow` before a plain response; `{"status": N}` and `{"headers": {...}}` set those of the response.
For clients with a fixed body, `answers` contains complete responses by path, and `script` the events of a stream.
"""

from __future__ import annotations

import json
import select
import socket
import socketserver
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Received:
    """One received request."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """A complete response."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


class FakeEngine:
    """The running stand-in; a context manager."""

    def __init__(self, path: Path) -> None:
        self.requests: list[Received] = []
        self.health_status = 200
        self.answer_status = 200
        self.hung = False
        self.absent: set[str] = set()
        self.answers: dict[str, Answer] = {}
        self.script: list[str] = []
        self.left = threading.Event()
        self.started = threading.Event()
        self.closing = threading.Event()
        self._leave = threading.Semaphore(0)
        self._connections: set[socket.socket] = set()
        self._server = _Server(str(path), _Handler)
        self._server.engine = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> FakeEngine:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.closing.set()
        for connection in list(self._connections):
            with suppress(OSError):  # its handler has closed it
                connection.shutdown(socket.SHUT_RDWR)
        self._server.shutdown()
        self._server.server_close()  # joins the handlers' threads
        self._thread.join()

    def allow(self, events: int = 1) -> None:
        """Permit that many events or slow responses."""
        self._leave.release(events)

    def wait_for_leave(self, connection: socket.socket) -> bool:
        """Return True if permitted, False if the client disconnected or the test ended first."""
        while not self._leave.acquire(timeout=0.02):
            readable, _, _ = select.select([connection], [], [], 0)
            if readable and not connection.recv(1, socket.MSG_PEEK):
                self.left.set()
                return False
            if self.closing.is_set():
                return False
        return True

    def note(self, connection: socket.socket, open_: bool) -> None:
        """Record connections, which close with the engine."""
        (self._connections.add if open_ else self._connections.discard)(connection)


class _Server(socketserver.ThreadingUnixStreamServer):
    engine: FakeEngine
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.engine.note(self.connection, True)

    def finish(self) -> None:
        self.server.engine.note(self.connection, False)
        super().finish()

    def handle(self) -> None:
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):
            self.server.engine.left.set()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def address_string(self) -> str:
        return "unix"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _answer(self) -> None:
        engine = self.server.engine
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        if path == "/health":
            if engine.hung:
                engine.wait_for_leave(self.connection)
            return self._send(engine.health_status, b"")
        engine.requests.append(Received(self.command, self.path, dict(self.headers.items()), body))
        if path in engine.absent:
            return self._send(404, b'{"detail":"Not Found"}')
        if answer := engine.answers.get(path):
            return self._send(answer.status, json.dumps(answer.body).encode(), answer.headers)
        try:
            steer = json.loads(body)
        except ValueError:
            steer = {}
        if steer.get("stream"):
            return self._stream(engine.script or [
                *(json.dumps({"number": number}) for number in range(int(steer.get("events", 3)))), "[DONE]"])
        if steer.get("slow"):
            engine.started.set()
            if not engine.wait_for_leave(self.connection):
                self.close_connection = True
                return None
        return self._send(int(steer.get("status", engine.answer_status)), json.dumps({"engine": path}).encode(),
                          steer.get("headers", {}))

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _stream(self, events: list[str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.server.engine.started.set()
        for event in events:
            if event != "[DONE]" and not self.server.engine.wait_for_leave(self.connection):
                self.close_connection = True
                return
            self._chunk(f"data: {event}\n\n".encode())
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
