"""What the appliance is doing: one JSON document, written by `engine`, read by exporter, gateway and healthcheck.

Rules: the document is replaced atomically and never holds a secret. Beside it lie what the gateway serves without
asking anybody: `unavailable.json`, the OpenAI-style error that `/v1/*` answers while not ready
(`unavailable.anthropic.json` in Anthropic's style, for its routes), and the empty files
`ready`, which exists exactly in this phase, and `not-live`, which exists when it has failed and while an engine that
hangs or has died is not yet followed by the next one.
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

from shoehorn.common.api_errors import anthropic_body
from shoehorn.common.atomic_file import write_atomic
from shoehorn.runtime.run_dir import RunDir

log = logging.getLogger("engine")

STATE_VERSION = 1


class Phase(StrEnum):
    """The phases of the appliance's life, in the order in which they usually come."""

    STARTING = "starting"
    PULLING = "pulling"
    VERIFYING = "verifying"
    CONVERTING = "converting"
    LOADING = "loading"
    READY = "ready"
    STEPPING_DOWN = "stepping_down"
    FAILED = "failed"
    STOPPING = "stopping"


@dataclass(frozen=True)
class State:
    """One moment of the appliance.

    Attributes:
        progress: share of the phase that is done, 0..1; None where nothing can be measured.
        since: Unix time, in seconds, at which the phase began.
        restarts: engine restarts since the container started; step_downs: starts with a smaller plan.
        bytes_done, bytes_total: of the download, while pulling and after.
        rate_bytes_per_second: of the pull's present phase; 0 while unknown and in all other phases.
        cause, remedy: on failure, in words.
        memory: after the load, one entry for each part of each GPU: gpu, part, expected_bytes, measured_bytes.
        kv_cache_tokens, offloaded_bytes: after the load, as the engine said.
        failures: of the engine since the container started, by diagnosis.
        plan: what is started, as `shown_plan` tells it; empty before the first plan.
        engine_down: the engine hangs or has ended by itself, and the next one is not started yet.
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
    engine_down: bool = False
    version: int = STATE_VERSION


def unavailable_body(state: State) -> str:
    """The body of a 503 in OpenAI's error form, naming phase and progress."""
    share = f" ({state.progress:.0%})" if state.progress is not None else ""
    if state.phase is Phase.READY:
        message = "The engine does not answer just now; it is being looked after. Try again in a moment."
    elif state.phase is Phase.FAILED:
        message = f"The model cannot be served: {state.cause}"
    else:
        message = f"The model is not ready: {state.phase}{share}."
    error = {"message": message, "type": "server_error", "param": None, "code": "model_not_ready",
             "phase": state.phase, "progress": state.progress}
    return json.dumps({"error": error}) + "\n"


class StateFile:
    """The state document in a run directory. Only the `engine` program writes it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._paths = RunDir(run_dir)
        self.path = self._paths.state
        self._lock = threading.RLock()  # re-entrant: a signal handler may publish the end in the middle of an update

    def read(self) -> State:
        """The current state; a fresh `starting` one when nothing readable is there."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            if document["version"] != STATE_VERSION:
                return State()
            return State(**{**document, "phase": Phase(document["phase"]), "memory": tuple(document["memory"])})
        except (OSError, ValueError, TypeError, KeyError):
            return State()

    def write(self, state: State) -> None:
        """Publish `state`. The `ready` mark goes first when readiness ends and comes last when it begins."""
        if state.phase is not Phase.READY:
            _mark(self._paths.ready_mark, False)
        write_atomic(self.path, json.dumps(asdict(state)) + "\n")
        body = unavailable_body(state)
        write_atomic(self._paths.unavailable_body("openai"), body)
        write_atomic(self._paths.unavailable_body("anthropic"), anthropic_body(body))
        _mark(self._paths.not_live_mark, state.phase is Phase.FAILED or state.engine_down)
        _mark(self._paths.ready_mark, state.phase is Phase.READY)

    def update(self, **changes: object) -> State:
        """Write the current state with `changes`; `since` follows a change of phase, which also ends the rate."""
        with self._lock:
            old = self.read()
            new = replace(old, **changes)  # type: ignore[arg-type]  # the field names are checked by replace itself
            if new.phase is not old.phase or not old.since:
                new = replace(new, since=time.time())
                if "rate_bytes_per_second" not in changes:
                    new = replace(new, rate_bytes_per_second=0.0)
            self.write(new)
            return new

    def tell(self, **changes: object) -> None:
        """Like `update`, for how far a phase is: where the disk is full that stays untold, and the work goes on."""
        try:
            self.update(**changes)
        except OSError as error:
            log.warning("cannot publish how far it is: %s", error.strerror)


def _mark(path: Path, exists: bool) -> None:
    if exists:
        path.touch()
    else:
        path.unlink(missing_ok=True)
