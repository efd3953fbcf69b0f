"""Pull and conversion of the model in child processes, reported as state."""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from shoehorn.common.errors import DoesNotFitError, ModelUnavailableError, SettingsError, ShoehornError
from shoehorn.common.units import format_size
from shoehorn.config.settings import Settings
from shoehorn.int4 import artifact
from shoehorn.model.reference import ModelRef
from shoehorn.runtime.child_process import Child
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, StateFile

log = logging.getLogger("engine")

_LOGGED = re.compile(r"([\w.]+) (INFO|WARNING|ERROR) (.*)")


def fetch(settings: Settings, ref: ModelRef, environment: Mapping[str, str], states: StateFile) -> Path:
    """Pull the model, and convert it for an INT4 reference. Returns the folder that is served."""
    if not ref.is_int4:
        return _work("pull", settings, ref, environment, states)
    if artifact.source(settings.models_dir, ref) is None:
        _work("pull", settings, ref, environment, states)
    return _work("convert", settings, ref, environment, states)


def model_environment(environment: Mapping[str, str], ref: ModelRef) -> dict[str, str]:
    """Return the environment of a command that fetches this model, which need not be the one that is served."""
    return {**environment, "MODEL_ID": ref.id, "MODEL_SOURCE": ref.source, "MODEL_REVISION": ref.revision}


def _work(command: str, settings: Settings, ref: ModelRef, environment: Mapping[str, str],
          states: StateFile) -> Path:
    """`shoehorn pull` or `convert` in a child process, whose progress lines become state. Returns its directory."""
    phase = Phase.PULLING if command == "pull" else Phase.CONVERTING
    log.info("%s %s", phase.value, ref.id)
    states.update(phase=phase, progress=0.0, detail=ref.id)
    complaints: list[str] = []
    outcome: dict[str, str] = {}
    said = {"at": time.monotonic()}

    def line(text: str) -> None:
        try:
            message = json.loads(text)
        except ValueError:
            if logged := _LOGGED.fullmatch(text):
                logging.getLogger(logged[1]).log(logging.getLevelNamesMapping()[logged[2]], "%s", logged[3])
            else:
                complaints.append(text)
            return
        if message["phase"] == "done":
            outcome["directory"] = message["directory"]
            return
        done, total, rate = message["bytes_done"], message["bytes_total"], message["rate_bytes_per_second"]
        states.tell(phase=Phase(message["phase"]), progress=done / total if total else None,
                    bytes_done=done, bytes_total=total, rate_bytes_per_second=float(rate or 0))
        if time.monotonic() - said["at"] >= 5:
            said["at"] = time.monotonic()
            left = f", {(total - done) / rate:.0f} s left" if rate else ""
            log.info("%s: %s of %s (%.0f %%), %s/s%s", message["phase"], format_size(done), format_size(total),
                     100 * done / total if total else 0, format_size(int(rate or 0)), left)

    child = Child([sys.executable, "-m", "shoehorn.cli", command, "--json"],
                  model_environment(environment, ref), line, RunDir(settings.run_dir).pull_group)
    try:
        while (status := child.wait(0.5)) is None:
            pass
    finally:
        child.stop(5.0)
    if status or "directory" not in outcome:
        raise _failed(command, status, complaints)
    return Path(outcome["directory"])


def _failed(command: str, status: int, complaints: list[str]) -> ShoehornError:
    """What ended a `shoehorn pull` or `convert`, as it told itself."""
    if status < 0:
        memory = ", most often because memory ran out" if status == -signal.SIGKILL else ""
        return ModelUnavailableError(f"`shoehorn {command}` was ended by signal {-status}{memory}.",
                                     "Start again: what is done is kept and gone on with.")
    text = "\n".join(["", *complaints[-10:]])
    cause, _, remedy = text.rpartition("\nshoehorn: ")[2].strip().partition("\n  -> ")
    kind = next((kind for kind in (SettingsError, DoesNotFitError) if kind.exit_code == status), ModelUnavailableError)
    return kind(cause or f"`shoehorn {command}` ended with status {status}.", remedy)
