"""State of the appliance: one JSON document, written by `engine`, read by exporter, gateway and health check.

Rules: the document is replaced atomically and never contains a secret. The gateway also serves, without calling another
program, `unavailable.json`, the error that `/v1/*` answers while not ready (`unavailable.anthropic.json` for
Anthropic's routes), and reads three empty files: `ready` and `idle`, which exist exactly in these phases, and
`not-live`, which exists when the appliance has failed and while an engine that hung or died has no successor yet.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from shoehorn.common.api_errors import error_bodies
from shoehorn.common.atomic_file import write_atomic
from shoehorn.runtime.run_dir import RunDir

log = logging.getLogger("engine")

STATE_VERSION = 1


class Phase(StrEnum):
    """The phases of the appliance, in their usual order."""

    STARTING = "starting"
    WAITING = "waiting"
    PULLING = "pulling"
    VERIFYING = "verifying"
    CONVERTING = "converting"
    LOADING = "loading"
    READY = "ready"
    STEPPING_DOWN = "stepping_down"
    IDLE = "idle"
    FAILED = "failed"
    STOPPING = "stopping"


@dataclass(frozen=True)
class State:
    """Snapshot of the appliance.

    Attributes:
        progress: completed share of the phase, 0..1; None where it is unknown.
        since: Unix time, in seconds, at which the phase began.
        restarts: engine restarts since the container started; step_downs: starts with a smaller configuration.
        bytes_done, bytes_total: of the download, while pulling and after.
        rate_bytes_per_second: of the current phase of a pull; 0 while unknown and in all other phases.
        cause, remedy: of a failure, for people.
        memory: after the load, one entry for each part of each GPU: gpu, part, expected_bytes, measured_bytes.
        kv_cache_tokens, offloaded_bytes: after the load, as the engine reported.
        failures: of the engine since the container started, by diagnosis.
        plan: public summary of the current plan; empty before the first plan.
        start_seconds: of each part of the last start, by name, with their `total`; empty before the first.
        engine_down: the engine hung or died, and the next one has not started yet.
        replicas: of a front: name, state and reason of each replica.
    """

    phase: Phase = Phase.STARTING
    progress: float | None = None
    detail: str = ""
    since: float = 0.0
    model: str = ""
    restarts: int = 0
    step_downs: int = 0
    bytes_done: int = 0
    bytes_total: int = 0
    cause: str = ""
    remedy: str = ""
    memory: tuple[Mapping[str, Any], ...] = ()
    kv_cache_tokens: int = 0
    offloaded_bytes: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    rate_bytes_per_second: float = 0.0
    plan: Mapping[str, Any] = field(default_factory=dict)
    start_seconds: Mapping[str, float] = field(default_factory=dict)
    engine_down: bool = False
    replicas: tuple[Mapping[str, Any], ...] = ()
    version: int = STATE_VERSION


def unavailable_bodies(state: State) -> dict[str, str]:
    """The bodies of a 503 in the forms `openai` and `anthropic`, with phase and progress."""
    share = f" ({state.progress:.0%})" if state.progress is not None else ""
    if state.phase is Phase.READY:
        message = "The engine is temporarily unavailable and is restarting. Retry in a few seconds."
    elif state.phase is Phase.FAILED:
        message = f"The model is unavailable: {state.cause}"
    elif state.phase is Phase.IDLE:
        message = "The model was stopped because it was idle. A request starts it again; retry in a few seconds."
    elif state.phase is Phase.WAITING:
        message = f"The model is not ready: waiting for the nodes of the cluster: {state.detail}."
    else:
        message = f"The model is not ready: {state.phase}{share}."
    return error_bodies(503, message, "model_not_ready", {"phase": state.phase, "progress": state.progress})


class StateFile:
    """The state document in a run directory. Only the `engine` program writes it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._paths = RunDir(run_dir)
        self.path = self._paths.state
        self._lock = threading.RLock()  # re-entrant: a signal handler may publish the stop during an update

    def read(self) -> State:
        """Read the current state; a new `starting` one if it is missing or unreadable."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            if document["version"] != STATE_VERSION:
                return State()
            return State(**{**document, "phase": Phase(document["phase"]), "memory": tuple(document["memory"]),
                            "replicas": tuple(document.get("replicas", ()))})
        except (OSError, ValueError, TypeError, KeyError):
            return State()

    def write(self, state: State) -> None:
        """Publish `state`. The `ready` mark is removed first when readiness ends, and created last when it begins."""
        if state.phase is not Phase.READY:
            _set_mark(self._paths.ready_mark, False)
        write_atomic(self.path, json.dumps(asdict(state)) + "\n")
        for dialect, body in unavailable_bodies(state).items():
            write_atomic(self._paths.unavailable_body(dialect), body)
        _set_mark(self._paths.not_live_mark, state.phase is Phase.FAILED or state.engine_down)
        _set_mark(self._paths.idle_mark, state.phase is Phase.IDLE)
        _set_mark(self._paths.ready_mark, state.phase is Phase.READY)

    def update(self, **changes: object) -> State:
        """Write the current state with `changes`; a change of phase sets `since` and clears the rate."""
        with self._lock:
            old = self.read()
            new = replace(old, **changes)  # type: ignore[arg-type]  # the field names are checked by replace itself
            if new.phase is not old.phase or not old.since:
                new = replace(new, since=time.time())
                if "rate_bytes_per_second" not in changes:
                    new = replace(new, rate_bytes_per_second=0.0)
            self.write(new)
            return new

    def update_progress(self, **changes: object) -> None:
        """Update the progress of a phase; a full disk is logged and does not stop the phase."""
        try:
            self.update(**changes)
        except OSError as error:
            log.warning("cannot update progress in state.json: error=%s", error.strerror)


def _set_mark(path: Path, exists: bool) -> None:
    if exists:
        path.touch()
    else:
        path.unlink(missing_ok=True)
