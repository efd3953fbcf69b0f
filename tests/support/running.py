"""A running appliance for tests: entrypoint.py as `make demo` starts it, on ports of its own."""

from __future__ import annotations

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
from shoehorn.runtime.state import Phase, StateFile
from support.waiting import SLACK, wait_until

DEMO_MODEL = HOME / "demo" / "model"
TEST_KEY = "sk-test-key-of-the-appliance"
_MADE = re.compile(r"which only this start shows: (\S+)")
KEPT = ("PATH", "HOME", "LANG", "TMPDIR")


def gone(process: psutil.Process) -> bool:
    """Whether it has ended; a zombie has."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Filling(threading.Thread):
    """Takes all the room on a disk, and whatever becomes free again."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.full, self._ended, self._path = threading.Event(), threading.Event(), path
        self.start()

    def run(self) -> None:
        """Write until nothing goes any more, over and over."""
        with self._path.open("wb", buffering=0) as file:
            while not self._ended.wait(0.0005):
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    self.full.set()

    def end(self) -> None:
        """Give the room back."""
        self._ended.set()
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
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment |= {
            "MODEL_ID": str(DEMO_MODEL), "MODEL_SOURCE": "local", "SERVED_MODEL_NAME": "shoehorn-demo",
            "VRAM_PROFILE": "cpu", "MODELS_DIR": str(self.models_dir), "RUN_DIR": str(self.run_dir),
            "PORT": str(self.port), "METRICS_PORT": str(self.metrics_port), "DRAIN_TIMEOUT": "3",
            "API_KEY": TEST_KEY, **settings}
        self._given_key = environment["API_KEY"]
        self.process = subprocess.Popen([*within, sys.executable, str(HOME / "entrypoint.py")], env=environment,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        start_new_session=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._known: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        """All that it printed so far."""
        return "\n".join(self.lines)

    @property
    def key(self) -> str:
        """The key that was given, or the one that the start made and printed."""
        if self._given_key:
            return self._given_key
        wait_until(lambda: _MADE.search(self.output), 30, "the key is printed")
        found = _MADE.search(self.output)
        assert found
        return found[1]

    @property
    def phase(self) -> Phase:
        """The published phase."""
        return StateFile(self.run_dir).read().phase

    def headers(self) -> dict[str, str]:
        """The bearer header."""
        return {"Authorization": f"Bearer {self.key}"}

    def descendants(self) -> list[psutil.Process]:
        """Every process that it ever started and that lives, also those whose parent is gone."""
        try:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self._known.setdefault(process.pid, process)
        except psutil.NoSuchProcess:
            pass
        return [process for process in self._known.values() if not gone(process)]

    def find(self, word: str) -> psutil.Process:
        """The one descendant whose name or command line holds `word`."""
        names = []
        for process in self.descendants():
            with suppress(psutil.NoSuchProcess):
                names.append(process.name())
                if word in " ".join(process.cmdline()) or word in names[-1]:
                    return process
        raise AssertionError(f"no process {word!r} among {names}")

    def runs(self, word: str) -> bool:
        """Whether there is a descendant that `find` finds."""
        try:
            return self.find(word) is not None
        except AssertionError:
            return False

    def wait_for(self, phase: Phase, seconds: float = 150) -> None:
        """Wait for a phase; fails at once when the appliance ends first."""
        def reached() -> bool:
            if self.process.poll() is not None and self.phase is not phase:
                pytest.fail(f"ended with {self.process.returncode} before {phase}:\n{self.output}")
            return self.phase is phase

        wait_until(reached, seconds, lambda: f"phase {phase}, is {self.phase}\n{self.output[-3000:]}")

    def end(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Send a signal, wait for the end; returns the exit code."""
        self.descendants()
        self.process.send_signal(number)
        return self.wait(seconds)

    def kill(self) -> None:
        """SIGKILL for every process at once, as by `docker kill` or a power cut."""
        self.process.send_signal(signal.SIGSTOP)  # else it could start one of them again meanwhile
        for process in [*self.descendants(), psutil.Process(self.process.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(60)

    def wait(self, seconds: float) -> int:
        """Wait for the end; returns the exit code. Fails when a process outlives it."""
        try:
            self.process.wait(SLACK * seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {SLACK * seconds} s:\n{self.output[-3000:]}")
        wait_until(lambda: not self.descendants(), 5, f"no process left, but {self.descendants()}")
        self._reader.join(60)
        return self.process.returncode

    def discard(self) -> None:
        """Leave nothing behind, whatever the test did."""
        left = self.descendants()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=30)
        self._reader.join(60)
        if self.process.stdout:
            self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
