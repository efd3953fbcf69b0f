"""The program `engine`: model -> plan -> pull -> vLLM, published as state, ended cleanly by SIGTERM in every phase.

Rules: the plan is made from the model's config and headers before a byte of weights moves; each long phase runs in a
child process; the exit codes are those of `errors`, and the cause stands in the state before the program ends.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from shoehorn import (
    converted,
    drafts,
    engine_memory,
    inventory,
    owner,
    planning,
    proof,
    render,
    room,
    shown_plan,
    step_down,
)
from shoehorn import log as logs
from shoehorn import settings as settings_module
from shoehorn.errors import EXIT_DONE, DoesNotFitError, ModelUnavailableError, SettingsError, ShoehornError
from shoehorn.files import write_atomic
from shoehorn.plan import Plan
from shoehorn.planning import Planner
from shoehorn.process import Child, end_recorded_group
from shoehorn.restarts import Restarts
from shoehorn.serving import Server, StartFailedError, engine_environment
from shoehorn.settings import Settings
from shoehorn.state import Phase, StateFile
from shoehorn.units import format_size

log = logging.getLogger("engine")

_AGAIN = 1
"""An exit code that is none of Shoehorn's own: supervisord starts the program again."""

_LOGGED = re.compile(r"([\w.]+) (INFO|WARNING|ERROR) (.*)")


class Stopped(BaseException):
    """SIGTERM came. Not an Exception: nothing but the program's end may catch it."""


def main() -> int:
    """Run the program; returns its exit code."""
    settings = settings_module.load(os.environ)
    logs.configure(settings.log_format)
    states = StateFile(settings.run_dir)
    code = EXIT_DONE
    try:
        _stop_on_sigterm(states)
        _end_with_owner()
        try:
            return _run(settings, states)
        except OSError as error:
            if error.errno not in room.FULL:
                raise
            room.wait_for(settings.run_dir, settings.models_dir)
            code = _AGAIN
    except Stopped:
        pass
    (settings.run_dir / "engine.alive").unlink(missing_ok=True)  # neither is a failure of the engine
    return code


def _run(settings: Settings, states: StateFile) -> int:
    try:
        _serve(settings, os.environ, states)
    except ShoehornError as error:
        states.update(phase=Phase.FAILED, progress=None, detail="", cause=error.cause, remedy=error.remedy)
        log.error("%s", error)
        write_atomic(settings.run_dir / "exit_code", f"{error.exit_code}\n")
        return error.exit_code
    raise AssertionError("serving ends by an exception only")


def _serve(settings: Settings, environment: Mapping[str, str], states: StateFile) -> None:
    restarts = _take_over(settings, states)
    settings = planning.settled(settings)
    directory = converted.served(settings)
    planner = Planner(settings, directory)
    plan = planner.plan()
    states.update(plan=shown_plan.of(plan), memory=())
    if directory is None:
        directory = _fetch(settings, environment, states)
        if settings.quantization == "int4":  # what was expected of the conversion is known now
            planner = Planner(settings, directory)
            plan = planner.plan()
            states.update(plan=shown_plan.of(plan))
    if plan.draft and converted.served(plan.draft.settings) is None:
        _fetch(plan.draft.settings, drafts.environment(environment, plan.draft), states)
    with ExitStack() as stack:
        for each in (settings, *([plan.draft.settings] if plan.draft else [])):
            model = converted.target(each) if each.quantization == "int4" else each
            if model.model_source != "local":
                stack.enter_context(inventory.used(model.models_dir, model.model_id))
        while True:
            try:
                _start(settings, environment, states, restarts, planner, plan, directory)
            except StartFailedError as failure:
                states.update(phase=Phase.STEPPING_DOWN, progress=None, detail=failure.diagnosis.name)
                smaller = planner.step_down(plan, failure.diagnosis)
                if smaller is None:
                    raise
                plan = smaller
                states.update(step_downs=states.read().step_downs + 1, plan=shown_plan.of(plan), memory=())


def _start(settings: Settings, environment: Mapping[str, str], states: StateFile, restarts: Restarts,
           planner: Planner, plan: Plan, directory: Path) -> None:
    """Serve by one plan, until an exception ends it."""
    config = render.write_engine_config(settings, plan.engine_args, directory)
    states.update(phase=Phase.LOADING, progress=None, detail="starting the engine", model=settings.served_model_name)
    log.info("loading %s", settings.served_model_name)

    def announce(seconds: float) -> None:
        log.info("ready after %.0f s", seconds)
        planner.settle(plan, states)
        welcome = settings.run_dir / "welcome.txt"
        if welcome.exists():  # holds a generated key: shown once
            text = welcome.read_text(encoding="utf-8")
            welcome.unlink()
            print(text, flush=True)

    variables = {**_address(environment, plan), **plan.engine_environment, **engine_memory.prepare(settings.run_dir),
                 "SHOEHORN_MOST_REQUESTS": str(render.most_requests(settings, plan.engine_args))}
    Server(config, engine_environment(environment, variables, settings.run_dir), render.engine_socket(settings), states,
           restarts, announce, settings.run_dir / "engine.log" if settings.engine_log == "file" else None,
           settings.drain_timeout,
           lambda transport: proof.prove(transport, plan.engine_args, settings.served_model_name),
           settings.served_model_name, step_down.speculates(plan.engine_args, plan.fixed)).serve()


def _address(environment: Mapping[str, str], plan: Plan) -> dict[str, str]:
    """Where the parts of an engine on one machine find each other.

    Else vLLM looks for an address of its own by a socket to a public name server, which OFFLINE must not see.
    """
    several = "nnodes" in plan.engine_args or plan.engine_args.get("distributed-executor-backend") == "ray"
    return {} if several or "VLLM_HOST_IP" in environment else {"VLLM_HOST_IP": "127.0.0.1"}


def _take_over(settings: Settings, states: StateFile) -> Restarts:
    """Settle what an earlier life of this program left: its engine, and its failure in the budget."""
    restarts = Restarts(settings.run_dir / "restarts.json")
    alive = settings.run_dir / "engine.alive"
    killed = alive.exists()
    states.tell(phase=Phase.STARTING, progress=None, detail="planning", model=settings.served_model_name, cause="",
                remedy="", engine_down=False, restarts=states.read().restarts + killed)
    left = end_recorded_group(settings.run_dir / "engine.group") + end_recorded_group(settings.run_dir / "pull.group")
    if killed:
        failures = restarts.record()
        log.warning("the engine program was killed (failure %d); ended %d processes that it left", failures, len(left))
    alive.touch()
    return restarts


def _fetch(settings: Settings, environment: Mapping[str, str], states: StateFile) -> Path:
    """Pull, and convert where that is asked for. Returns the directory that is served."""
    if settings.quantization != "int4":
        return _work("pull", settings, environment, states)
    if converted.source(settings) is None:
        _work("pull", settings, environment, states)
    return _work("convert", settings, environment, states)


def _work(command: str, settings: Settings, environment: Mapping[str, str], states: StateFile) -> Path:
    """`shoehorn pull` or `convert` in a child process, whose progress lines become state. Returns its directory."""
    phase = Phase.PULLING if command == "pull" else Phase.CONVERTING
    log.info("%s %s", phase.value, settings.model_id)
    states.update(phase=phase, progress=0.0, detail=settings.model_id)
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

    child = Child([sys.executable, "-m", "shoehorn.cli", command, "--json"], environment, line,
                  settings.run_dir / "pull.group")
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


def _stop_on_sigterm(states: StateFile) -> None:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough; a second must not interrupt the clearing up
        states.tell(phase=Phase.STOPPING, progress=None, detail="stopping")
        raise Stopped

    signal.signal(signal.SIGTERM, stop)


def _end_with_owner() -> None:
    """End this program, as by SIGTERM, when supervisord was killed: nobody else would."""
    supervisor = owner.owner()

    def watch() -> None:
        while os.getppid() == supervisor:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="owner", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
