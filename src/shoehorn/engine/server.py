"""Keeps vLLM running: starts it, follows its start, notices its end, starts it again while the budget lasts.

Rules:
- ready means that the engine's /health answered 200 and that it then served a full batch (`proof`); not ready again the
  moment the process has ended;
- vLLM exits 0 when its engine core dies, so every end that nobody asked for is a failure;
- before the end of a ready engine, requests that run are finished or properly aborted (`drain`): SIGTERM with a stream
  open hangs vLLM;
- a start in which one of several workers fails, and the others wait for it, is ended;
- a failure that the same start would repeat (`Diagnosis.final`) is not tried again; one for want of memory is left to
  the caller, who may start with less.
"""

from __future__ import annotations

import logging.handlers
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

from shoehorn.common.errors import EngineFailedError
from shoehorn.engine import drain
from shoehorn.engine.diagnosis import HUNG, Diagnosis, diagnose
from shoehorn.engine.log_file import EngineLog
from shoehorn.engine.restart_budget import Restarts
from shoehorn.engine.timing import Timing
from shoehorn.engine.watchdog import Watchdog
from shoehorn.hardware import host
from shoehorn.runtime.child_process import Child
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.shutdown import ENGINE_STOP_SECONDS
from shoehorn.runtime.state import Phase, StateFile

log = logging.getLogger("engine")

_PATIENCE = 10.0
"""So many times what the first full batch took, a quiet engine gets for one token."""

_STAGES = (
    (re.compile(r"Starting to load model"), "loading the weights"),
    (re.compile(r"Loading weights took|Model loading took"), "measuring memory and warming up"),
    (re.compile(r"Capturing CUDA graphs|Compiling a graph|torch\.compile took"), "compiling and capturing graphs"),
    (re.compile(r"Starting vLLM server"), "opening the API"),
)
_WORKER_FAILED = re.compile(r"WorkerProc hit an exception")
_SHARDS = re.compile(r"Loading safetensors checkpoint shards:\s+(\d+)% Completed")


class StartFailedError(EngineFailedError):
    """The engine did not start for a reason that another plan could mend: memory, a number format, guessed tokens."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        super().__init__(diagnosis.cause, diagnosis.remedy)
        self.diagnosis = diagnosis


class Server:
    """The vLLM API server of this container.

    Args:
        config: the path of `vllm.yaml`.
        environment: all of the engine's environment.
        socket: where it will listen.
        on_ready: called before every readiness is published, with the seconds that the start took.
        engine_log: a file for the engine's own lines; None sends them to standard output.
        drain_seconds: how long running requests get to finish when serving ends.
        prove: asks the engine, through the given transport, for what the plan promises; False when it failed.
        model: the name that it serves.
        guesses: its plan has guessed tokens, without which it may start where it does not with them.
        timing: of waits and pauses.
    """

    def __init__(self, config: Path, environment: Mapping[str, str], socket: Path, states: StateFile,
                 restarts: Restarts, on_ready: Callable[[float], None], engine_log: Path | None,
                 drain_seconds: int, prove: Callable[[httpx.BaseTransport], bool], model: str,
                 guesses: bool = False, timing: Timing = Timing()) -> None:  # noqa: B008  # it is frozen
        self._command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--config", str(config)]
        self._environment = environment
        self._socket = socket
        self._states = states
        self._restarts = restarts
        self._on_ready = on_ready
        self._engine_log = EngineLog(engine_log) if engine_log else None
        self._drain_seconds = drain_seconds
        self._prove = prove
        self._model = model
        self._guesses = guesses
        self._timing = timing
        self._tail: deque[str] = deque(maxlen=400)
        self._worker_failed_at: float | None = None

    def serve(self) -> None:
        """Serve until an exception ends it, most often the caller's own on SIGTERM.

        Raises:
            StartFailedError: it did not become ready, and a smaller plan could help.
            EngineFailedError: the engine failed in a way that a new start would repeat, or the budget is used up.
        """
        while True:
            if self._restarts.exhausted:
                raise EngineFailedError("The engine failed too often within an hour; no further start is tried.",
                                        "The engine's lines above name the first failure.")
            diagnosis, was_ready = self._once()
            failed = self._states.read().failures
            self._states.update(failures={**failed, diagnosis.name: failed.get(diagnosis.name, 0) + 1})
            if not was_ready and (diagnosis.memory or diagnosis.name == "unsupported_dtype" or (
                    self._guesses and diagnosis.name != "killed")):
                raise StartFailedError(diagnosis)
            failures = self._restarts.record()
            if diagnosis.final or self._restarts.exhausted:
                self._show_tail()
                raise EngineFailedError(diagnosis.cause, diagnosis.remedy)
            delay = self._timing.restart_delay(failures)
            log.warning("%s It is started again in %.0f s (failure %d).", diagnosis.cause, delay, failures)
            self._states.update(phase=Phase.LOADING, progress=None, detail="starting the engine again",
                                restarts=self._states.read().restarts + 1, engine_down=True)
            time.sleep(delay)
            self._states.update(engine_down=False)

    def _once(self) -> tuple[Diagnosis, bool]:
        """One life of the engine; returns why it ended, and whether it was ready before."""
        self._socket.unlink(missing_ok=True)  # vLLM leaves it behind and does not start over it
        self._tail.clear()
        self._worker_failed_at = None
        started = time.monotonic()
        kills = host.memory_kills()
        ready = drained = False
        watchdog: Watchdog | None = None
        child = Child(self._command, self._environment, self._line, RunDir(self._states.run_dir).engine_group)
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(self._socket)), timeout=2.0) as client:
                while (status := child.wait(self._timing.tick)) is None:
                    if not ready and _healthy(client):
                        proving = time.monotonic()
                        ready = self._prove(httpx.HTTPTransport(uds=str(self._socket)))
                        if not ready:
                            child.stop(ENGINE_STOP_SECONDS)
                            continue
                        watchdog = Watchdog(client, self._model, _PATIENCE * (time.monotonic() - proving),
                                            self._timing)
                        if not drain.requested(self._states.run_dir):
                            self._on_ready(time.monotonic() - started)
                            self._states.update(phase=Phase.READY, progress=None, detail="serving")
                    failed_at = self._worker_failed_at
                    if not ready and failed_at and time.monotonic() - failed_at > self._timing.worker_grace:
                        log.error("a worker of the engine failed, and the others wait for it: the start is ended")
                        child.stop(0.0)
                        return diagnose(self._tail, 1), False
                    if ready and not drained and drain.requested(self._states.run_dir):
                        self._drain_on_request()
                        drained = True
                    if ready and not drained and watchdog and watchdog.hung():
                        log.error("%s", HUNG.cause)
                        self._states.update(phase=Phase.LOADING, progress=None, detail="the engine hangs",
                                            engine_down=True)
                        drain.engine(self._socket, 0)  # its API server still tells those who wait, as a rule
                        child.stop(0.0)
                        return HUNG, True
        finally:
            if ready and not drained and child.poll() is None:
                drain.engine(self._socket, self._drain_seconds)
            child.stop(ENGINE_STOP_SECONDS)
        return diagnose(self._tail, status, host.memory_kills() > kills), ready

    def _drain_on_request(self) -> None:
        self._states.update(phase=Phase.STOPPING, progress=None, detail="draining")
        outcome = drain.engine(self._socket, self._drain_seconds)
        self._states.update(detail="drained; can be stopped")
        drain.publish(self._states.run_dir, outcome)

    def _line(self, line: str) -> None:
        """One line of the engine's output, from the reading thread."""
        self._tail.append(line)
        if _WORKER_FAILED.search(line) and self._worker_failed_at is None:
            self._worker_failed_at = time.monotonic()
        if self._engine_log:
            try:
                self._engine_log.write(line)
            except OSError as error:  # a full disk must not stop the reading, or the engine would wait for it for ever
                log.warning("cannot write %s: %s; the engine's lines come here instead", self._engine_log.path,
                            error.strerror)
                self._engine_log = None
        if not self._engine_log:
            logging.getLogger("vllm").info("%s", line)
        if self._states.read().phase is not Phase.LOADING:
            return
        if match := _SHARDS.search(line):
            self._states.tell(detail="loading the weights", progress=int(match[1]) / 100)
            return
        for pattern, detail in _STAGES:
            if pattern.search(line) and self._states.read().detail != detail:
                self._states.tell(detail=detail, progress=None)
                log.info("%s", detail)

    def _show_tail(self) -> None:
        if self._engine_log:
            for line in self._tail:
                print(line, flush=True)


def _healthy(client: httpx.Client) -> bool:
    try:
        return client.get("http://engine/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
