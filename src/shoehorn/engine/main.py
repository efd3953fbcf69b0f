"""The program `engine`: model -> plan -> pull -> vLLM, published as state, ended cleanly by SIGTERM in every phase.

Rules: the plan is made from the model's config and headers before a byte of weights moves; each long phase runs in a
child process; the exit codes are those of `errors`, and the cause stands in the state before the program ends.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from shoehorn.common import disk
from shoehorn.common import logging_config as logs
from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.errors import EXIT_DONE, ShoehornError
from shoehorn.config import settings as settings_module
from shoehorn.config.settings import Settings
from shoehorn.deployment import inputs, served_model
from shoehorn.engine import launch_config, memory_report, readiness, step_down, timing
from shoehorn.engine.environment import engine_environment
from shoehorn.engine.fetch import fetch
from shoehorn.engine.replanner import Planner
from shoehorn.engine.restart_budget import Restarts
from shoehorn.engine.server import Server, StartFailedError
from shoehorn.planner import plan as plan_module
from shoehorn.planner.plan import Plan
from shoehorn.runtime import parent_watch
from shoehorn.runtime.child_process import end_recorded_group
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, StateFile
from shoehorn.store import inventory

log = logging.getLogger("engine")

_AGAIN = 1
"""An exit code that is none of Shoehorn's own: supervisord starts the program again."""


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
            if error.errno not in disk.FULL:
                raise
            disk.wait_for_free_space(settings.run_dir, settings.models_dir)
            code = _AGAIN
    except Stopped:
        pass
    RunDir(settings.run_dir).engine_alive.unlink(missing_ok=True)  # neither is a failure of the engine
    return code


def _run(settings: Settings, states: StateFile) -> int:
    try:
        _serve(settings, os.environ, states)
    except ShoehornError as error:
        states.update(phase=Phase.FAILED, progress=None, detail="", cause=error.cause, remedy=error.remedy)
        log.error("%s", error)
        write_atomic(RunDir(settings.run_dir).exit_code, f"{error.exit_code}\n")
        return error.exit_code
    raise AssertionError("serving ends by an exception only")


def _serve(settings: Settings, environment: Mapping[str, str], states: StateFile) -> None:
    restarts = _take_over(settings, states)
    settings = inputs.resolve_quantization(settings)
    ref = served_model.served_reference(settings)
    directory = served_model.served_folder(settings.models_dir, ref)
    planner = Planner(settings, directory)
    plan = planner.plan()
    states.update(plan=plan_module.of(plan), memory=())
    if directory is None:
        directory = fetch(settings, ref, environment, states)
        if settings.quantization == "int4":  # what was expected of the conversion is known now
            planner = Planner(settings, directory)
            plan = planner.plan()
            states.update(plan=plan_module.of(plan))
    if plan.draft and served_model.served_folder(settings.models_dir, plan.draft.ref) is None:
        fetch(settings, plan.draft.ref, environment, states)
    with ExitStack() as stack:
        for each in (ref, *([plan.draft.ref] if plan.draft else [])):
            if not each.is_local:
                stack.enter_context(inventory.used(settings.models_dir, each.stored_id))
        while True:
            try:
                _start(settings, environment, states, restarts, planner, plan, directory)
            except StartFailedError as failure:
                states.update(phase=Phase.STEPPING_DOWN, progress=None, detail=failure.diagnosis.name)
                smaller = planner.step_down(plan, failure.diagnosis)
                if smaller is None:
                    raise
                plan = smaller
                states.update(step_downs=states.read().step_downs + 1, plan=plan_module.of(plan), memory=())


def _start(settings: Settings, environment: Mapping[str, str], states: StateFile, restarts: Restarts,
           planner: Planner, plan: Plan, directory: Path) -> None:
    """Serve by one plan, until an exception ends it."""
    paths = RunDir(settings.run_dir)
    config = launch_config.write_engine_config(settings, plan.engine_args, directory)
    states.update(phase=Phase.LOADING, progress=None, detail="starting the engine", model=settings.served_model_name)
    log.info("loading %s", settings.served_model_name)

    def announce(seconds: float) -> None:
        log.info("ready after %.0f s", seconds)
        planner.record_start(plan, states)
        if paths.welcome.exists():  # holds a generated key: shown once
            text = paths.welcome.read_text(encoding="utf-8")
            paths.welcome.unlink()
            print(text, flush=True)

    variables = {**_address(environment, plan), **plan.engine_environment, **memory_report.prepare(settings.run_dir),
                 "SHOEHORN_MOST_REQUESTS": str(launch_config.most_requests(settings, plan.engine_args))}
    Server(config, engine_environment(environment, variables, settings.run_dir), paths.engine_socket,
           states, restarts, announce, paths.engine_log if settings.engine_log == "file" else None,
           settings.drain_timeout,
           lambda transport: readiness.prove(transport, plan.engine_args, settings.served_model_name),
           settings.served_model_name, step_down.speculates(plan.engine_args, plan.fixed),
           timing.load(environment)).serve()


def _address(environment: Mapping[str, str], plan: Plan) -> dict[str, str]:
    """Where the parts of an engine on one machine find each other.

    Else vLLM looks for an address of its own by a socket to a public name server, which OFFLINE must not see.
    """
    several = "nnodes" in plan.engine_args or plan.engine_args.get("distributed-executor-backend") == "ray"
    return {} if several or "VLLM_HOST_IP" in environment else {"VLLM_HOST_IP": "127.0.0.1"}


def _take_over(settings: Settings, states: StateFile) -> Restarts:
    """Settle what an earlier life of this program left: its engine, and its failure in the budget."""
    paths = RunDir(settings.run_dir)
    restarts = Restarts(paths.restarts)
    killed = paths.engine_alive.exists()
    states.tell(phase=Phase.STARTING, progress=None, detail="planning", model=settings.served_model_name, cause="",
                remedy="", engine_down=False, restarts=states.read().restarts + killed)
    left = [process for record in paths.groups for process in end_recorded_group(record)]
    if killed:
        failures = restarts.record()
        log.warning("the engine program was killed (failure %d); ended %d processes that it left", failures, len(left))
    paths.engine_alive.touch()
    return restarts


def _stop_on_sigterm(states: StateFile) -> None:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough; a second must not interrupt the clearing up
        states.tell(phase=Phase.STOPPING, progress=None, detail="stopping")
        raise Stopped

    signal.signal(signal.SIGTERM, stop)


def _end_with_owner() -> None:
    """End this program, as by SIGTERM, when supervisord was killed: nobody else would."""
    supervisor = parent_watch.owner()

    def watch() -> None:
        while os.getppid() == supervisor:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="owner", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
