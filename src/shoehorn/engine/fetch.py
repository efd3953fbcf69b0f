"""Pull and conversion of models in child processes, published as state.

A child prints one JSON object a line (`commands.output`): progress, then `done` with the folder or `failed` with the
error. Every other line is log text.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from shoehorn.common.errors import DoesNotFitError, ModelUnavailableError, SettingsError, ShoehornError
from shoehorn.common.units import format_size
from shoehorn.config.settings import Settings
from shoehorn.deployment import served_model
from shoehorn.deployment.served_model import FetchStep
from shoehorn.engine.start_times import measured
from shoehorn.model.reference import ModelRef
from shoehorn.runtime import programs
from shoehorn.runtime.child_process import Child, command
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, StateFile

log = logging.getLogger("engine")

_PHASES = {"pull": Phase.PULLING, "convert": Phase.CONVERTING}
_ERRORS = {kind.exit_code: kind for kind in (SettingsError, DoesNotFitError, ModelUnavailableError)}
_LOG_SECONDS = 5.0


def fetch(settings: Settings, ref: ModelRef, environment: Mapping[str, str], states: StateFile,
          seconds: MutableMapping[str, float]) -> Path:
    """Pull the model, and convert it for an INT4 reference. Return its complete folder.

    Args:
        seconds: gets the duration of each step.

    Raises:
        ShoehornError: as the child reported it.
    """
    folder = Path()
    for step in served_model.fetch_steps(settings.models_dir, ref):
        with measured(seconds, step):
            folder = _Fetch(step, ref, states).run(model_environment(environment, ref),
                                                   RunDir(settings.run_dir).pull_group)
    return folder


def model_environment(environment: Mapping[str, str], ref: ModelRef) -> dict[str, str]:
    """Return the environment of a command that fetches this model, which need not be the one that is served."""
    return {**environment, "MODEL_ID": ref.id, "MODEL_SOURCE": ref.source, "MODEL_REVISION": ref.revision}


class _Fetch:
    """One `shoehorn pull` or `convert` in a child process."""

    def __init__(self, step: FetchStep, ref: ModelRef, states: StateFile) -> None:
        self._step, self._ref, self._states = step, ref, states
        self._result: Mapping[str, Any] = {}
        self._logged_at = time.monotonic()

    def run(self, environment: Mapping[str, str], record: Path) -> Path:
        """Run the child and return the folder that it reports."""
        phase = _PHASES[self._step]
        log.info("%s %s", phase.value, self._ref.id)
        self._states.update(phase=phase, progress=0.0, detail=self._ref.id)
        child = Child(command([sys.executable, "-m", programs.CLI, self._step, "--json"], environment),
                      self.read_line, record)
        try:
            while (status := child.wait(0.5)) is None:
                pass
        finally:
            child.stop(5.0)
        if status or "directory" not in self._result:
            raise self.error(status)
        return Path(self._result["directory"])

    def read_line(self, text: str) -> None:
        """Take one line of the child."""
        try:
            message = json.loads(text)
            phase = message["phase"]
        except (ValueError, TypeError, KeyError):
            log.info("%s: %s", self._step, text)
            return
        if phase == "log":
            logging.getLogger(message["program"]).log(logging.getLevelNamesMapping()[message["level"]], "%s",
                                                      message["message"])
        elif phase in ("done", "failed"):
            self._result = message
        else:
            self._publish(message)

    def error(self, status: int) -> ShoehornError:
        """Return the error of a child that ended with `status`."""
        if status < 0:
            memory = ", most likely out of memory" if status == -signal.SIGKILL else ""
            return ModelUnavailableError(f"`shoehorn {self._step}`: killed by signal {-status}{memory}.",
                                         "Restart the container: the work is resumed.", code="fetch_killed")
        cause = self._result.get("cause", f"`shoehorn {self._step}`: unexpected exit status {status}.")
        kind = _ERRORS.get(self._result.get("exit_code", status), ModelUnavailableError)
        return kind(cause, self._result.get("remedy", "Read the log above for the first error."),
                    code=self._result.get("code", ""))

    def _publish(self, message: Mapping[str, Any]) -> None:
        done, total, rate = message["bytes_done"], message["bytes_total"], message["rate_bytes_per_second"]
        self._states.update_progress(phase=Phase(message["phase"]), progress=done / total if total else None,
                                     bytes_done=done, bytes_total=total, rate_bytes_per_second=float(rate or 0))
        if time.monotonic() - self._logged_at >= _LOG_SECONDS:
            self._logged_at = time.monotonic()
            remaining = f", {(total - done) / rate:.0f} s left" if rate else ""
            log.info("%s: %s of %s (%.0f %%), %s/s%s", message["phase"], format_size(done), format_size(total),
                     100 * done / total if total else 0, format_size(int(rate or 0)), remaining)
