"""One run of the engine process, from its start to its exit.

The stages of a run:

    starting -> warming_up -> ready -> draining -> drained
        `-----------`-----------+---------`-----------`---> exited
                                `--> idle (IDLE_STOP)

Rules:
- ready means that /health answered 200 and the engine then served a full batch (`readiness`) and the first request of
  each feature (`feature_warm_up`); the run ends with the process;
- vLLM exits with 0 when its engine core dies, so every exit that was not requested is a failure;
- before a ready engine is terminated, running requests finish or are aborted (`drain`): SIGTERM with an open stream
  hangs vLLM;
- a start is aborted if one of several workers failed and the others wait for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import httpx

from shoehorn.engine import drain, feature_warm_up, idle, pooling_proof, readiness, start_times
from shoehorn.engine.diagnosis import HUNG, Diagnosis, diagnose, node_lost
from shoehorn.engine.fork_server import ForkServer
from shoehorn.engine.group import Group
from shoehorn.engine.idle import IdleWatch
from shoehorn.engine.launch_spec import LaunchSpec
from shoehorn.engine.output import EngineOutput
from shoehorn.engine.start_times import StartTimes, measured
from shoehorn.engine.watchdog import Watchdog
from shoehorn.hardware import host
from shoehorn.model.task import Task
from shoehorn.runtime.child_process import Child
from shoehorn.runtime.shutdown import ENGINE_STOP_SECONDS
from shoehorn.runtime.state import Phase, StateFile
from shoehorn.runtime.welcome import Welcome

log = logging.getLogger("engine")

_PATIENCE_FACTOR = 10.0
"""A quiet engine has so many times the duration of the first full batch for one token."""


class Stage(StrEnum):
    """Stages of a run."""

    STARTING = "starting"
    WARMING_UP = "warming_up"
    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    IDLE = "idle"


@dataclass(frozen=True)
class Exit:
    """The end of a run.

    Attributes:
        was_ready: the engine had become ready before.
    """

    diagnosis: Diagnosis
    was_ready: bool


class EngineRun:
    """One run of the engine process.

    Args:
        fork_server: starts the process.
        on_ready: called before readiness is published.
        group: machines that serve together; None for one machine.
    """

    def __init__(self, spec: LaunchSpec, fork_server: ForkServer, states: StateFile,
                 on_ready: Callable[[], None], group: Group | None = None) -> None:
        self._spec, self._fork_server, self._states, self._on_ready = spec, fork_server, states, on_ready
        self._group = group
        self.output = EngineOutput(states, spec.log_file)
        self.stage = Stage.STARTING
        self._times = StartTimes(spec.earlier_seconds)
        self._memory_kills = host.memory_kills()
        self._watchdog: Watchdog | None = None
        self._idle_watch: IdleWatch | None = None

    def follow(self) -> Exit | None:
        """Start the engine and return its exit; None if it was stopped while idle. The caller's exception stops it."""
        self._spec.run_dir.engine_socket.unlink(missing_ok=True)  # vLLM leaves it behind and does not start over it
        with measured(self._times.seconds, "import"):
            child = self._fork_server.launch(self._spec, self._read_line)
        try:
            with httpx.Client(transport=self._transport(), timeout=2.0) as client:
                while (status := child.wait(self._spec.timing.tick)) is None:
                    if failure := self._look(child, client):
                        child.stop(0.0)
                        return Exit(failure, self._is_ready)
                    if self.stage is Stage.IDLE:
                        return None
        finally:
            if self.stage in (Stage.READY, Stage.DRAINING) and child.poll() is None:
                drain.drain_engine(self._spec.run_dir.engine_socket, self._spec.drain_seconds)
            child.stop(ENGINE_STOP_SECONDS)
        killed = host.memory_kills() > self._memory_kills
        return Exit(diagnose(self.output.tail, status, killed, is_start=not self._is_ready), self._is_ready)

    def _read_line(self, line: str) -> None:
        self._times.read_line(line)
        self.output.read_line(line)

    @property
    def _is_ready(self) -> bool:
        return self.stage in (Stage.READY, Stage.DRAINING, Stage.DRAINED)

    def _look(self, child: Child, client: httpx.Client) -> Diagnosis | None:
        """Look at the running engine; return the failure for which it has to be killed."""
        if self._group and (loss := self._group.loss()):
            self._states.update(phase=Phase.WAITING, progress=None, detail=loss)
            if self._is_ready:
                drain.drain_engine(self._spec.run_dir.engine_socket, 0)  # ends open requests with an error
            return node_lost(loss)
        if self.stage is Stage.STARTING:
            if _is_healthy(client):
                self._warm_up(child, client)
            elif self._waits_for_failed_worker():
                log.error("Aborting start: a worker failed and the others wait for it")
                return diagnose(self.output.tail, 1)
        elif self.stage is Stage.READY:
            if drain.is_requested(self._states.run_dir):
                self._drain_on_request()
            elif self._watchdog and self._watchdog.is_hung():
                return self._report_hang()
            elif self._idle_watch and self._idle_watch.is_over():
                self._stop_while_idle()
            self._fork_server.keep_spare()
        return None

    def _warm_up(self, child: Child, client: httpx.Client) -> None:
        """Check that the engine serves what the plan promises; stop it if it does not."""
        self.stage = Stage.WARMING_UP
        begin = time.monotonic()
        options, model = self._spec.options, self._spec.model
        with measured(self._times.seconds, "warm_up"):
            is_pooling = self._spec.task.is_pooling
            is_serving = pooling_proof.prove(self._transport(), self._spec.task, options, model) if is_pooling else \
                readiness.warm_up(self._transport(), options, model)
            batch_seconds = time.monotonic() - begin
            is_serving = is_serving and (is_pooling or feature_warm_up.warm_up_features(
                self._transport(), options, model, readiness.TOKEN))
        if not is_serving:
            child.stop(ENGINE_STOP_SECONDS)
            return
        self.stage = Stage.READY
        self._watchdog = Watchdog(client, model, _PATIENCE_FACTOR * batch_seconds, self._spec.timing)
        self._idle_watch = IdleWatch(client, self._spec.idle_seconds, self._spec.timing.look)
        if not drain.is_requested(self._states.run_dir):
            self._on_ready()
            seconds = self._times.finish()
            for line in start_times.table(seconds):
                log.info("start: %s", line)
            log.info("ready after %.0f s", seconds[start_times.TOTAL])
            self._states.update(phase=Phase.READY, progress=None, detail="serving", start_seconds=seconds,
                                cause="", remedy="")
            _print_welcome(self._spec.run_dir.welcome, self._spec.task)

    def _waits_for_failed_worker(self) -> bool:
        failed_at = self.output.worker_failed_at
        return failed_at is not None and time.monotonic() - failed_at > self._spec.timing.worker_grace

    def _drain_on_request(self) -> None:
        self.stage = Stage.DRAINING
        drain.announce(self._spec.run_dir, self._spec.is_replica)
        self._states.update(phase=Phase.STOPPING, progress=None, detail="draining")
        result = drain.drain_engine(self._spec.run_dir.engine_socket, self._spec.drain_seconds)
        self._states.update(detail="drained; can be stopped")
        drain.publish_result(self._states.run_dir, result)
        self.stage = Stage.DRAINED

    def _stop_while_idle(self) -> None:
        """Publish the phase, then finish requests that arrived in the last moment."""
        idle.publish(self._states)
        drain.drain_engine(self._spec.run_dir.engine_socket, self._spec.drain_seconds)
        self.stage = Stage.IDLE

    def _report_hang(self) -> Diagnosis:
        log.error("%s", HUNG.cause)
        self._states.update(phase=Phase.LOADING, progress=None, detail="the engine hangs", engine_down=True)
        drain.drain_engine(self._spec.run_dir.engine_socket, 0)  # the API server usually still answers open requests
        return HUNG

    def _transport(self) -> httpx.HTTPTransport:
        return httpx.HTTPTransport(uds=str(self._spec.run_dir.engine_socket))


def _print_welcome(welcome: Path, task: Task) -> None:
    """Print the welcome text once: it may contain a generated key."""
    if welcome.exists():
        text = Welcome.from_json(welcome.read_text(encoding="utf-8")).text(task.value)
        welcome.unlink()
        print(text, flush=True)


def _is_healthy(client: httpx.Client) -> bool:
    try:
        return client.get("http://engine/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
