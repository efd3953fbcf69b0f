"""Replicas with the real nginx configuration and middleware, and a stand-in for the engine."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from fakes.ports import free_port
from shoehorn.common.paths import HOME
from shoehorn.config.settings import load
from shoehorn.gateway import nginx_config
from shoehorn.runtime.child_process import kill_group
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.shutdown import LEAVING_SECONDS
from shoehorn.runtime.state import Phase, StateFile
from support.waiting import wait_until

MODEL = "shoehorn-demo"


def write_secret(folder: Path, name: str = "secret") -> Path:
    """Write a new secret of a cluster; return its path."""
    path = folder / name
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return path


class StandinReplica:
    """One replica; a context manager."""

    def __init__(self, home: Path, name: str, secret: Path) -> None:
        self.name, self.port = name, free_port()
        home.mkdir(parents=True, exist_ok=True)
        self.paths = RunDir(home)
        self._log = home / "log"
        self._settings = load({
            "RUN_DIR": str(home), "MODELS_DIR": str(home), "MODEL_ID": "a/b", "SERVED_MODEL_NAME": MODEL,
            "PORT": str(free_port()), "REPLICA_PORT": str(self.port), "CLUSTER_SECRET_FILE": str(secret)})
        self.public_port = self._settings.port
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        """Its address in REPLICAS."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> StandinReplica:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start nginx and the stand-in engine."""
        self.paths.leaving_mark.unlink(missing_ok=True)
        nginx_config.write(self._settings, "root" if os.geteuid() == 0 else None)
        environment = {**os.environ, "PYTHONPATH": str(HOME / "tests")}
        with self._log.open("ab") as log:
            for command in (["nginx", "-c", str(self.paths.nginx_config), "-e", "stderr"],
                            [sys.executable, "-m", "fakes.replica_engine", str(self.paths.path), self.name]):
                self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True,
                                                        env=environment))
        StateFile(self.paths.path).update(phase=Phase.READY)

    def wait(self) -> None:
        """Wait until the engine answers."""
        wait_until(self._answers, 20, lambda: f"replica {self.name} answers; it said {self._log.read_text()}")

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.paths.engine_socket)) == 0

    def client(self) -> httpx.Client:
        """Return a client of the stand-in engine itself."""
        return httpx.Client(transport=httpx.HTTPTransport(uds=str(self.paths.engine_socket)), timeout=30)

    def kill(self) -> None:
        """Kill all processes, as a lost machine."""
        for process in self._processes:
            kill_group(process.pid)
            process.wait()
        self._processes.clear()

    @property
    def engine_is_dead(self) -> bool:
        """The process of the engine has ended."""
        return self._processes[1].poll() is not None

    def stop(self, drain_seconds: int = 20) -> dict[str, int]:
        """Stop as the engine program does (`engine.drain`): announce, refuse, finish what runs; then end."""
        self.paths.leaving_mark.touch()
        time.sleep(LEAVING_SECONDS)
        StateFile(self.paths.path).update(phase=Phase.STOPPING)
        with self.client() as client:
            result: dict[str, int] = client.post(f"http://engine/-/drain?seconds={drain_seconds}").json()
        self._processes[0].send_signal(signal.SIGQUIT)
        self._processes[0].wait(30)
        self.kill()
        return result
