"""nginx as the appliance runs it, for tests of the gateway; the engine behind it is a stand-in."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import httpx
from running import free_port, wait_until

from fakes.engine import FakeEngine
from shoehorn import gateway, keys
from shoehorn.files import write_atomic
from shoehorn.settings import load
from shoehorn.state import Phase, StateFile

KEY = "sk-Canary.Key+with/all~kinds_of-Characters="
MODEL = "deepseek-ai/DeepSeek-R1"
BEARER = {"Authorization": f"Bearer {KEY}"}


def authorization(key: str) -> str:
    """The header's line."""
    return f"Authorization: Bearer {key}\r\n"


def request(target: str, headers: str = "", host: str = "x", method: str = "GET") -> bytes:
    """A request as it goes over the wire, without a body; each header ends its line itself."""
    return f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n".encode()


def openai_error(answer: httpx.Response) -> dict[str, object]:
    """The error in OpenAI's form; fails on any other."""
    assert answer.headers["content-type"].startswith("application/json"), answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return dict(error)


class Gateway:
    """nginx as the appliance runs it, on a run directory of its own."""

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
        if key := keys.in_force(self.settings):
            keys.write_map(self.run_dir, [key.value])
        as_root = "root" if os.geteuid() == 0 and not user else None
        write_atomic(self.run_dir / "nginx.conf", gateway.render(self.settings, self.run_dir, as_root), 0o600)
        self.states.update(phase=Phase.STARTING, model=MODEL)
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self) -> subprocess.Popen[bytes]:
        """Start nginx the way supervisord does."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(["nginx", "-c", str(self.run_dir / "nginx.conf"), "-e", "stderr"],
                                            stdout=log, stderr=log, start_new_session=True, user=self._user, cwd="/")
        return self.process

    def __enter__(self) -> Gateway:
        process = self.launch()
        wait_until(self.listens, 10, f"nginx listens; it said {self.log.read_text()}")
        assert process.poll() is None, self.log.read_text()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=10, trust_env=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.stop()

    @property
    def pid(self) -> int:
        """nginx's master."""
        assert self.process is not None
        return self.process.pid

    def stop(self) -> None:
        """End nginx at once."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise

    def engine(self) -> FakeEngine:
        """A stand-in engine on the socket of this run directory, which is ready then."""
        self.states.update(phase=Phase.READY, progress=None)
        return FakeEngine(self.run_dir / "engine.sock")

    def send(self, data: bytes) -> bytes:
        """All bytes that come back for these raw ones, until the gateway closes or nothing comes for a moment."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=3) as connection:
            connection.sendall(data)
            answer = b""
            try:
                while piece := connection.recv(65536):
                    answer += piece
            except (TimeoutError, ConnectionResetError):
                pass
            return answer

    def listens(self) -> bool:
        """Whether it takes connections, or has ended."""
        if self.process is not None and self.process.poll() is not None:
            return True
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
