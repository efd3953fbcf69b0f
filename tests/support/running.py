"""A running appliance for tests: entrypoint.py as `make demo` starts it, on ports of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from fakes.ports import free_port
from shoehorn.common.paths import HOME
from shoehorn.runtime.state import Phase, State, StateFile
from support.waiting import SLACK, wait_until

DEMO_MODEL = HOME / "demo" / "model"
TEST_KEY = "sk-test-key-of-the-appliance"
STANDIN_ENGINE = HOME / "tests" / "fakes" / "standin_engine"
INHERITED = ("PATH", "HOME", "LANG", "TMPDIR")
_GENERATED_KEY = re.compile(r"sk-[\w-]{43}")


def standin(hold: Path | None = None, **timing: float) -> dict[str, str]:
    """Return the settings that replace vLLM by the stand-in, which loads as long as the file `hold` exists."""
    limits = {"hold": str(hold)} if hold else {}
    return {"PYTHONPATH": str(STANDIN_ENGINE), "STANDIN_ENGINE": json.dumps(limits),
            "SHOEHORN_TIMING": json.dumps({"tick": 0.1, "backoff": 0.1, **timing})}


def is_gone(process: psutil.Process) -> bool:
    """Return True if a process has exited; a zombie has."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class DiskFiller(threading.Thread):
    """Thread that takes all free space of a disk, and whatever becomes free again."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.full, self._stopped, self._path = threading.Event(), threading.Event(), path
        self.start()

    def run(self) -> None:
        """Write until the disk is full, again and again."""
        with self._path.open("wb", buffering=0) as file:
            while not self._stopped.wait(0.0005):
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    self.full.set()

    def stop(self) -> None:
        """Free the space."""
        self._stopped.set()
        self.join()
        self._path.unlink()


class Appliance:
    """One start of the appliance, with the demo model unless settings say otherwise.

    Args:
        within: a command that starts it, such as one that gives it a network of its own.
    """

    def __init__(self, home: Path, within: Sequence[str] = (), **settings: str) -> None:
        self.port, self.metrics_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.run_dir, self.models_dir = home / "run", home / "models"
        self.models_dir.mkdir(parents=True, exist_ok=True)
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        environment |= {
            "MODEL_ID": str(DEMO_MODEL), "MODEL_SOURCE": "local", "SERVED_MODEL_NAME": "shoehorn-demo",
            "VRAM_PROFILE": "cpu", "MODELS_DIR": str(self.models_dir), "RUN_DIR": str(self.run_dir),
            "PORT": str(self.port), "METRICS_PORT": str(self.metrics_port), "DRAIN_TIMEOUT": "3",
            "API_KEY": TEST_KEY, **settings}
        self._key = environment["API_KEY"]
        self.process = subprocess.Popen([*within, sys.executable, str(HOME / "entrypoint.py")], env=environment,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        start_new_session=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._known: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        """All output so far."""
        return "\n".join(self.lines)

    @property
    def key(self) -> str:
        """The given key, or the one that this start generated and printed."""
        if not self._key:
            wait_until(lambda: _GENERATED_KEY.search(self.output), 30, "the generated key in the output")
            match = _GENERATED_KEY.search(self.output)
            assert match
            self._key = match[0]
        return self._key

    @key.setter
    def key(self, key: str) -> None:
        self._key = key

    @property
    def state(self) -> State:
        """The published state."""
        return StateFile(self.run_dir).read()

    @property
    def phase(self) -> Phase:
        """The published phase."""
        return self.state.phase

    def headers(self) -> dict[str, str]:
        """Return the bearer header."""
        return {"Authorization": f"Bearer {self.key}"}

    def descendants(self) -> list[psutil.Process]:
        """Return every living process that it ever started, including those whose parent is gone."""
        try:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self._known.setdefault(process.pid, process)
        except psutil.NoSuchProcess:
            pass
        return [process for process in self._known.values() if not is_gone(process)]

    def find(self, word: str) -> psutil.Process:
        """Return the first descendant whose name or command line contains `word`."""
        names = []
        for process in self.descendants():
            with suppress(psutil.NoSuchProcess):
                names.append(process.name())
                if word in " ".join(process.cmdline()) or word in names[-1]:
                    return process
        raise AssertionError(f"no process {word!r} among {names}")

    def runs(self, word: str) -> bool:
        """Return True if `find` finds a process."""
        try:
            return self.find(word) is not None
        except AssertionError:
            return False

    def wait_for(self, phase: Phase, seconds: float = 150) -> None:
        """Wait for a phase; fail at once if the appliance exits first."""
        def reached() -> bool:
            if self.process.poll() is not None and self.phase is not phase:
                pytest.fail(f"exited with {self.process.returncode} before {phase}:\n{self.output}")
            return self.phase is phase

        wait_until(reached, seconds, lambda: f"phase {phase}, is {self.phase}\n{self.output[-3000:]}")

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Send a signal, wait for the exit and return the exit code."""
        self.descendants()
        self.process.send_signal(number)
        return self.wait(seconds)

    def kill(self) -> None:
        """Send SIGKILL to all processes at once, as `docker kill` or a power cut does."""
        self.process.send_signal(signal.SIGSTOP)  # otherwise it could restart one of them meanwhile
        for process in [*self.descendants(), psutil.Process(self.process.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(60)

    def wait(self, seconds: float) -> int:
        """Wait for the exit and return the exit code; fail if a process outlives the appliance."""
        try:
            self.process.wait(SLACK * seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {SLACK * seconds} s:\n{self.output[-3000:]}")
        wait_until(lambda: not self.descendants(), 5, lambda: f"the exit of {self.descendants()}")
        self._reader.join(60)
        return self.process.returncode

    def discard(self) -> None:
        """Remove all its processes, whatever the test did."""
        remaining = self.descendants()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for process in remaining:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(remaining, timeout=30)
        self._reader.join(60)
        if self.process.stdout:
            self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
