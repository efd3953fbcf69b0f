"""The health check as a process, as Docker runs it, against a gateway that answers, refuses, hangs or sends garbage."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from shoehorn.common.paths import HOME
from shoehorn.runtime.state import Phase, State, unavailable_bodies

pytestmark = pytest.mark.process

SCRIPT = HOME / "healthcheck" / "healthcheck.py"


class Gateway:
    """Answers one connection a call of `serve` with raw bytes; keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self._threads: list[threading.Thread] = []
        self._listeners: list[socket.socket] = []
        self._over = threading.Event()

    def serve(self, answer: bytes, piece: int = 0, pause_seconds: float = 0.0) -> int:
        """Returns the port. The answer goes out in pieces with a pause after each."""
        listener = socket.create_server(("127.0.0.1", 0))
        pieces = [answer[start:start + piece] for start in range(0, len(answer), piece)] if piece else [answer]
        self._listeners.append(listener)
        self._threads.append(threading.Thread(target=self._answer, args=(listener, pieces, pause_seconds)))
        self._threads[-1].start()
        return int(listener.getsockname()[1])

    def end(self) -> None:
        self._over.set()
        for listener in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for thread in self._threads:
            thread.join()

    def _answer(self, listener: socket.socket, pieces: list[bytes], pause_seconds: float) -> None:
        with suppress(OSError):  # the check may give up, or never come
            connection, _ = listener.accept()
            with connection:
                self.requests.append(connection.recv(65536))
                for piece in pieces:
                    connection.sendall(piece)
                    self._over.wait(pause_seconds)


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    running = Gateway()
    yield running
    running.end()


def _check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-I", "-S", str(SCRIPT), *arguments], capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"], **environment}, timeout=60, check=False)
    assert done.returncode in (0, 1)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert len(done.stdout) <= 301
    return done


def _http(body: bytes = b"", status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


@pytest.mark.parametrize(("arguments", "question"), [([], "ready"), (["ready"], "ready"), (["live"], "live")])
def test_yes_is_0_and_the_right_question_is_asked(gateway: Gateway, arguments: list[str], question: str) -> None:
    done = _check(*arguments, PORT=str(gateway.serve(_http(b'{"status":"live"}\n'))))
    assert (done.returncode, done.stdout) == (0, f"{question}\n")
    assert gateway.requests[0].startswith(f"GET /{question}z HTTP/1.1\r\n".encode())


def test_the_port_may_be_an_argument(gateway: Gateway) -> None:
    assert _check("live", "--port", str(gateway.serve(_http())), PORT="1").returncode == 0


def test_the_default_port_is_the_gateways() -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 6333)) == 0:  # an appliance runs here: then its answer is as good
            assert _check("live").stdout
        else:
            assert "refused" in _check("live", PORT="").stdout


def test_not_ready_says_what_the_gateway_says(gateway: Gateway) -> None:
    body = unavailable_bodies(State(phase=Phase.PULLING, progress=0.43))["openai"].encode()
    done = _check(PORT=str(gateway.serve(_http(body, "503 Service Unavailable"))))
    assert (done.returncode, done.stdout) == (1, "not ready: 503 The model is not ready: pulling (43%).\n")


@pytest.mark.parametrize(("answer", "words"), [
    (_http(b"<html>", "502 Bad Gateway"), "not ready: 502"),
    (_http(b'{"error": "x"}', "500 Internal Server Error"), "not ready: 500"),
    (_http(b"[" * 60000, "503 Service Unavailable"), "not ready: 503"),
    (_http(b"", "302 Found"), "not ready: 302"),
    (_http(b'{"error": {"message": "' + "很长 \\u001b[31m\\n".encode() * 500 + b'"}}', "503 X"), "很长"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "not ready:"),
    (b"", "not ready:"),
    (b"HTTP/1.1 " + b"9" * 100_000, "not ready:"),
    (b"\x15\x03\x01\x00\x02\x02\x50", "not ready:"),
])
def test_everything_else_is_1_with_one_line(gateway: Gateway, answer: bytes, words: str) -> None:
    done = _check(PORT=str(gateway.serve(answer)))
    assert done.returncode == 1
    assert words in done.stdout
    assert "\x1b" not in done.stdout


def test_a_refused_connection_is_1(gateway: Gateway) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        done = _check("live", PORT=str(unused.getsockname()[1]))
    assert (done.returncode, "refused" in done.stdout) == (1, True)


@pytest.mark.parametrize("drop", [False, True], ids=["silent", "drop by drop"])
def test_a_slow_answer_is_1_when_the_time_is_up(gateway: Gateway, drop: bool) -> None:
    code = ("import runpy, sys; script = runpy.run_path(sys.argv[1]); main = script['main']; "
            "main.__globals__['LIMIT_SECONDS'] /= 10; sys.exit(main(['live'], {'PORT': sys.argv[2]}))")
    port = gateway.serve(_http(b"x" * 600), 1, 0.1) if drop else gateway.serve(_http(), 1, 60.0)
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT), str(port)], capture_output=True, text=True,
                          timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "not live: no answer in 0.5 s\n")
    assert 0.5 <= time.monotonic() - begun < 30, "the whole answer takes a minute"


@pytest.mark.parametrize(("arguments", "environment", "words"), [
    (["alive"], {}, "alive"), (["live", "ready"], {}, "ready"), (["--port"], {}, "--port"),
    (["--port", "99999"], {}, "no port: '99999'"), (["--port", "0"], {}, "no port: '0'"),
    (["--port", "1" * 5000], {}, "no port: '111"), (["--port", "²"], {}, "no port: '²'"), (["--bad"], {}, "--bad"),
    ([], {"PORT": "high"}, "no port: 'high'")])
def test_wrong_arguments_are_1_with_the_usage(arguments: list[str], environment: dict[str, str], words: str) -> None:
    done = _check(*arguments, **environment)
    assert done.returncode == 1
    assert words in done.stdout
    assert "usage: healthcheck.py [live|ready] [--port N]" in done.stdout


def test_a_closed_output_does_not_change_the_code(gateway: Gateway) -> None:
    command = f'exec "{sys.executable}" "{SCRIPT}" live >&-'
    done = subprocess.run(["sh", "-c", command], env={"PORT": str(gateway.serve(_http()))}, timeout=60, check=False)
    assert done.returncode == 0


def test_it_stands_alone() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names)
