"""nginx and the key service as the appliance runs them, in front of a stand-in engine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx

from fakes.engine import FakeEngine
from fakes.ports import free_port
from shoehorn.common.atomic_file import write_atomic
from shoehorn.config.settings import load
from shoehorn.gateway import nginx_config, tls
from shoehorn.gateway.keys import sources
from shoehorn.runtime import programs
from shoehorn.runtime.state import Phase, StateFile
from support.waiting import wait_until

KEY = "sk-Canary.Key+with/all~kinds_of-Characters="
MODEL = "deepseek-ai/DeepSeek-R1"
BEARER = {"Authorization": f"Bearer {KEY}"}


def authorization(key: str) -> str:
    """Return the line of the header."""
    return f"Authorization: Bearer {key}\r\n"


def request(target: str, headers: str = "", host: str = "x", method: str = "GET") -> bytes:
    """Return the bytes of a request without a body; each header includes its line end."""
    return f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n".encode()


def openai_error(answer: httpx.Response) -> dict[str, object]:
    """Return the error in OpenAI's form; fail on any other."""
    assert answer.headers["content-type"].startswith("application/json"), answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return dict(error)


def anthropic_error(answer: httpx.Response) -> dict[str, object]:
    """Return the error in Anthropic's form; fail on any other."""
    assert answer.headers["content-type"].startswith("application/json"), answer.text
    body = answer.json()
    assert (body["type"], set(body), set(body["error"])) == ("error", {"type", "error"}, {"type", "message"})
    return dict(body["error"])


def error_of(answer: httpx.Response) -> dict[str, object]:
    """Return the error in the form of the requested route."""
    return anthropic_error(answer) if answer.url.path.startswith("/v1/messages") else openai_error(answer)


class Gateway:
    """nginx as the appliance runs it, in a separate run directory."""

    def __init__(self, home: Path, user: str | None = None, **settings: str) -> None:
        self.port = free_port()
        self.run_dir = home / "run"
        self.run_dir.mkdir(parents=True, mode=0o700)
        self.environment = {"RUN_DIR": str(self.run_dir), "MODELS_DIR": str(home), "PORT": str(self.port),
                            "API_KEY": KEY, "MODEL_ID": MODEL, "DRAIN_TIMEOUT": "5", **settings}
        self.settings = load(self.environment)
        self.states = StateFile(self.run_dir)
        self.log = home / "nginx.log"
        self.log.touch()
        self._user = user
        self.made = sources.prepare(self.settings)
        if self.settings.tls_cert_file:
            tls.install(self.settings)
        as_root = "root" if os.geteuid() == 0 and not user else None
        write_atomic(self.run_dir / "nginx.conf", nginx_config.render(self.settings, self.run_dir, as_root), 0o600)
        self.states.update(phase=Phase.STARTING, model=MODEL)
        self.process: subprocess.Popen[bytes] | None = None
        self.keys: subprocess.Popen[bytes] | None = None

    def launch(self) -> subprocess.Popen[bytes]:
        """Start nginx as supervisord does."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(["nginx", "-c", str(self.run_dir / "nginx.conf"), "-e", "stderr"],
                                            stdout=log, stderr=log, start_new_session=True, user=self._user, cwd="/")
        return self.process

    def launch_keys(self) -> subprocess.Popen[bytes]:
        """Start the key service as supervisord does."""
        inherited = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        clean = {name: value for name, value in self.environment.items() if name != "API_KEY"}
        with self.log.open("ab") as log:
            self.keys = subprocess.Popen([sys.executable, "-m", programs.KEYS], env={**inherited, **clean},
                                         stdout=log, stderr=log, start_new_session=True, cwd="/")
        return self.keys

    def keys_listen(self) -> bool:
        """Return True if the key service accepts connections or has exited."""
        if self.keys is not None and self.keys.poll() is not None:
            return True
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.run_dir / "keys.sock")) == 0

    def wait_for_keys(self) -> None:
        """Wait until the key service answers."""
        wait_until(self.keys_listen, 20, f"the key service listens; it said {self.log.read_text()}")
        assert self.keys is not None
        assert self.keys.poll() is None, self.log.read_text()

    @property
    def url(self) -> str:
        """The address at which it listens."""
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def __enter__(self) -> Gateway:
        with ExitStack() as undo:  # what has started ends also when the rest does not start
            self.launch_keys()
            undo.callback(self.stop_keys)
            process = self.launch()
            undo.callback(self.stop)
            wait_until(self.listens, 10, f"nginx listens; it said {self.log.read_text()}")
            assert process.poll() is None, self.log.read_text()
            self.wait_for_keys()
            if self._user:  # the key service runs as ourselves, since our Python may lie where only we may look
                shutil.chown(self.run_dir / "keys.sock", self._user)
            self.client = undo.enter_context(httpx.Client(
                base_url=f"{self.scheme}://127.0.0.1:{self.port}", timeout=30, trust_env=False, verify=self._trust()))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @property
    def pid(self) -> int:
        """Process id of nginx's master."""
        assert self.process is not None
        return self.process.pid

    def _trust(self) -> ssl.SSLContext | bool:
        if not self.settings.tls_cert_file:
            return True
        return ssl.create_default_context(cafile=self.settings.tls_cert_file)

    @property
    def scheme(self) -> str:
        """`http` or `https`."""
        return "https" if self.settings.tls_cert_file else "http"

    def stop_keys(self, number: int = signal.SIGTERM) -> int:
        """Stop the key service and return its exit status."""
        assert self.keys is not None
        self.keys.send_signal(number)
        try:
            return self.keys.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.keys.pid, signal.SIGKILL)
            raise

    def stop(self) -> None:
        """Stop nginx at once."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise

    def engine(self) -> FakeEngine:
        """Set the state to ready and return a stand-in engine on the socket of this run directory."""
        self.states.update(phase=Phase.READY, progress=None)
        return FakeEngine(self.run_dir / "engine.sock")

    def send(self, data: bytes) -> bytes:
        """Send raw bytes and return the answer, until the gateway closes or sends nothing for 10 s."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(data)
            answer = b""
            try:
                while piece := connection.recv(65536):
                    answer += piece
            except (TimeoutError, ConnectionResetError):
                pass
            return answer

    def listens(self) -> bool:
        """Return True if it accepts connections or has exited."""
        if self.process is not None and self.process.poll() is not None:
            return True
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
