"""The program `ray` of ROLE=head and worker: runs Ray for the session that the head orders.

Rules:
- another session ends the Ray of the one before, with all processes of the old engine on this node;
- a Ray that ends is restarted, after a pause that doubles up to 30 s;
- `ray.json` names the session only while this node has joined it.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

import psutil

from shoehorn.cluster import network, node_files, ray_command
from shoehorn.cluster.report import RaySession
from shoehorn.common import logging_config
from shoehorn.common.errors import SettingsError
from shoehorn.config import settings as settings_module
from shoehorn.config.settings import Settings
from shoehorn.hardware import detect, requirements, visible_gpus
from shoehorn.hardware.types import largest_first
from shoehorn.runtime import parent_watch
from shoehorn.runtime.child_process import Child, command, kill_recorded_group
from shoehorn.runtime.run_dir import RunDir

log = logging.getLogger("ray")

_TICK_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_STABLE_SECONDS = 60.0
"""After which the end of Ray is a new failure, not a repeated one."""
_STOP_SECONDS = 8.0
_SHOWN_LINES = 20


@dataclass
class _Run:
    """One start of Ray."""

    child: Child
    session: str
    lines: deque[str]
    begun: float


class RayProgram:
    """Keeps Ray running.

    Args:
        environment: of the container.
    """

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self._settings, self._paths = settings, RunDir(settings.run_dir)
        self._environment = environment
        node_files.write_ray(self._paths, RaySession())  # of this program, if it was killed
        self._run: _Run | None = None
        self._failures, self._start_at = 0, 0.0

    def look(self) -> None:
        """Start, restart or replace Ray where needed."""
        orders = node_files.read_orders(self._paths)
        session = orders.session
        if self._run and self._run.child.poll() is not None:
            self._report_end(self._run)
            self._run = None
        elif self._run and self._run.session != session:
            log.info("Ray: new session, ending the processes of the one before")
            self.stop()
            self._failures, self._start_at = 0, 0.0
        if self._run is None and session and time.monotonic() >= self._start_at:
            self._start(session, orders.places)

    def stop(self) -> None:
        """Kill Ray and all processes that it started: it has no state to save, and ends slowly on SIGTERM."""
        node_files.write_ray(self._paths, RaySession())
        if self._run:
            processes = _descendants(self._run.child.pid)
            self._run.child.stop(0.0)
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=_STOP_SECONDS)
        self._run = None

    def _start(self, session: str, places: int) -> None:
        settings, paths = self._settings, self._paths
        shutil.rmtree(paths.ray, ignore_errors=True)  # sockets and logs of the one before
        interface = network.interface_of(settings.node_address, network.interfaces())
        machine = requirements.usable(detect.detect(environment=self._environment))
        places = places or max(1, len(machine.gpus))
        environment = {**ray_command.ray_environment(self._environment, settings.node_address, interface, paths),
                       **visible_gpus.environment_of(largest_first(machine.gpus)[:places])}
        head = settings.head_address if settings.role == "worker" else ""
        words = ray_command.ray_arguments(settings.node_address, head, places, paths)
        lines: deque[str] = deque(maxlen=_SHOWN_LINES)
        instance = uuid.uuid4().hex

        def read(line: str) -> None:
            lines.append(line)
            if ray_command.JOINED in line:
                node_files.write_ray(paths, RaySession(session, instance))
                log.info("Ray joined head=%s places=%d", head or settings.node_address, places)

        self._run = _Run(Child(command(words, environment), read, paths.ray_group), session, lines, time.monotonic())

    def _report_end(self, run: _Run) -> None:
        lasted = time.monotonic() - run.begun > _STABLE_SECONDS
        self._failures = 1 if lasted else self._failures + 1
        pause = min(_LONGEST_PAUSE_SECONDS, 2.0 ** (self._failures - 1))
        self._start_at = time.monotonic() + pause
        node_files.write_ray(self._paths, RaySession())
        log.warning("Ray ended, starting it again in_seconds=%.0f last_lines=%s", pause, " | ".join(run.lines))


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def main(environment: Mapping[str, str] = os.environ) -> int:
    """Run the program until SIGTERM."""
    try:
        settings = settings_module.load(environment)
    except SettingsError as error:
        print(f"shoehorn: {error}", file=sys.stderr)
        return error.exit_code
    logging_config.configure(settings.log_format)
    stopped = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    supervisor = parent_watch.supervisor()
    kill_recorded_group(RunDir(settings.run_dir).ray_group)  # of this program, if it was killed
    program = RayProgram(settings, environment)
    try:
        while not stopped.wait(_TICK_SECONDS) and os.getppid() == supervisor:
            program.look()
    finally:
        program.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
