"""The engine program: plans, fetches the model, and serves it with vLLM; publishes its phases as state.

Rules: the plan is made from the model's config and headers before any weights are transferred; long phases run in child
processes; SIGTERM ends every phase cleanly; exit codes are those of `common.errors`, and the cause is in the state
before the program exits (`engine.program_run`).
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType

from shoehorn.cluster import network, ports, ray_command
from shoehorn.common import logging_config as logs
from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.errors import SettingsError
from shoehorn.config import network as proxies
from shoehorn.config import settings as settings_module
from shoehorn.config.models_dir import ModelsDir
from shoehorn.config.settings import Settings
from shoehorn.deployment import inputs, machines, served_model
from shoehorn.deployment.inputs import Deployment
from shoehorn.engine import drain, launch_config, memory_report, timing, worker
from shoehorn.engine.environment import engine_environment, for_cluster
from shoehorn.engine.fetch import fetch
from shoehorn.engine.fork_server import ForkServer
from shoehorn.engine.group import Group
from shoehorn.engine.launch_spec import LaunchSpec
from shoehorn.engine.output import EngineOutput
from shoehorn.engine.program_run import ProgramRun, StopRequested
from shoehorn.engine.replanner import Replanner
from shoehorn.engine.restart_budget import RestartBudget
from shoehorn.engine.server import EngineServer, StartFailedError
from shoehorn.engine.start_times import measured
from shoehorn.engine.timing import Timing
from shoehorn.hardware import visible_gpus
from shoehorn.hardware.types import Hardware
from shoehorn.planner import step_down
from shoehorn.planner.plan import Plan
from shoehorn.runtime import parent_watch
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, StateFile
from shoehorn_vllm.protocol import (
    ABILITIES_VARIABLE,
    ADMISSIONS_VARIABLE,
    MAX_REQUESTS_VARIABLE,
    MODEL_VARIABLE,
    USAGE_DIR_VARIABLE,
)

log = logging.getLogger("engine")


def main(environment: Mapping[str, str] = os.environ) -> int:
    """Run the program; return its exit code."""
    try:
        settings, waits = settings_module.load(environment), timing.load(environment)
    except SettingsError as error:
        print(f"shoehorn: {error}", file=sys.stderr)
        paths = RunDir(settings_module.run_dir(environment))
        if paths.path.is_dir():  # the watcher ends the container with the code that is written there
            write_atomic(paths.exit_code, f"{error.exit_code}\n")
            StateFile(paths.path).update(phase=Phase.FAILED, progress=None, detail="", cause=error.cause,
                                         remedy=error.remedy)
        return error.exit_code
    logs.configure(settings.log_format)
    for remark in proxies.prepare(os.environ):
        log.warning("%s", remark)
    states = StateFile(settings.run_dir)
    run = ProgramRun(settings, states, waits)
    with run:
        _stop_on_sigterm(settings, states)
        _stop_with_supervisord()
        run.take_over()
        if settings.role == "worker":
            worker.follow_head(settings, environment, states)
        fork_server = _begin_import(settings, environment, states)
        try:
            _serve(settings, environment, fork_server, states, run.budget, waits)
        finally:
            fork_server.stop()
    return run.exit_code


def _begin_import(settings: Settings, environment: Mapping[str, str], states: StateFile) -> ForkServer:
    """Begin to import vLLM, with the engine's environment as far as it does not depend on the plan."""
    paths = RunDir(settings.run_dir)
    fork_server = ForkServer(paths, EngineOutput(states, _engine_log(settings)).read_line,
                             is_used=settings.role == "single")  # Ray leaves threads, which a fork would lose
    fork_server.begin(engine_environment(environment, memory_report.prepare(settings.run_dir), settings.run_dir))
    return fork_server


def _serve(settings: Settings, environment: Mapping[str, str], fork_server: ForkServer, states: StateFile,
           budget: RestartBudget, waits: Timing) -> None:
    """Plan, fetch and serve; ends by an exception only."""
    seconds: dict[str, float] = {}
    with measured(seconds, "plan"):
        machine = inputs.detect_machine(settings, environment, measure=True)
    group = Group(settings, machine, states) if settings.role == "head" else None
    if group:
        machine = machines.merged(group.wait_for_machines())
    with measured(seconds, "plan"):
        deployment, replanner, plan = _plan(settings, machine, states)
    if group:
        group.order([deployment.ref, *([plan.draft.ref] if plan.draft else [])], _processes(plan))
    if deployment.directory is None:
        on_gpus = {**environment, **visible_gpus.environment_of(plan.gpus)}  # for a conversion
        directory = fetch(settings, deployment.ref, on_gpus, states, seconds)
        if deployment.ref.is_int4:  # the plan so far was made of the expected conversion
            with measured(seconds, "plan"):
                deployment, replanner, plan = _plan(settings, machine, states)
    else:
        directory = deployment.directory
    refs = [deployment.ref]
    if plan.draft:
        refs.append(plan.draft.ref)
        if served_model.served_folder(settings.models_dir, plan.draft.ref) is None:
            fetch(settings, plan.draft.ref, environment, states, seconds)
    if group:
        group.order(refs, _processes(plan))
        group.set_model(served_model.models_digest(settings.models_dir, refs, lambda _progress: None), str(directory))
    with served_model.in_use(settings.models_dir, refs):
        while True:
            spec = replace(_launch_spec(settings, environment, plan, directory, waits), earlier_seconds=seconds)
            seconds = {}
            try:
                _start(spec, settings, fork_server, states, budget, replanner, plan, group)
            except StartFailedError as failure:
                states.update(phase=Phase.STEPPING_DOWN, progress=None, detail=failure.diagnosis.name)
                smaller = replanner.step_down(plan, failure.diagnosis)
                if smaller is None:
                    raise
                plan = smaller
                states.update(step_downs=states.read().step_downs + 1, plan=plan.public_summary(), memory=())


def _plan(settings: Settings, machine: Hardware, states: StateFile) -> tuple[Deployment, Replanner, Plan]:
    deployment = inputs.gather(settings, machine)
    replanner = Replanner(settings, deployment)
    plan = replanner.first_plan()
    states.update(plan=plan.public_summary(), memory=())
    return deployment, replanner, plan


def _launch_spec(settings: Settings, environment: Mapping[str, str], plan: Plan, directory: Path,
                 waits: Timing) -> LaunchSpec:
    """Write vLLM's configuration and return the start of vLLM by this plan."""
    paths = RunDir(settings.run_dir)
    launch_config.write_engine_config(settings, plan.engine_args, directory)
    own = _cluster_variables(settings, environment) if settings.role == "head" else _host_address(environment)
    variables = {**own, **plan.engine_environment,
                 **memory_report.prepare(settings.run_dir),
                 **({} if settings.replica_port else {USAGE_DIR_VARIABLE: str(ModelsDir(settings.models_dir).usage)}),
                 ADMISSIONS_VARIABLE: str(paths.admissions), MODEL_VARIABLE: settings.served_model_name,
                 ABILITIES_VARIABLE: launch_config.abilities(plan).to_json(),
                 MAX_REQUESTS_VARIABLE: str(launch_config.most_requests(settings, plan.engine_args))}
    complete = engine_environment(environment, variables, settings.run_dir)
    return LaunchSpec(
        run_dir=paths, environment=for_cluster(complete) if settings.role == "head" else complete,
        model=settings.served_model_name, options=plan.engine_args, task=plan.task,
        log_file=_engine_log(settings), drain_seconds=settings.drain_timeout,
        idle_seconds=settings.idle_stop, is_replica=settings.replica_port is not None,
        may_drop_speculation=step_down.uses_unrequested_drafts(plan.engine_args, plan.fixed), timing=waits)


def _engine_log(settings: Settings) -> Path | None:
    return RunDir(settings.run_dir).engine_log if settings.engine_log == "file" else None


def _start(spec: LaunchSpec, settings: Settings, fork_server: ForkServer, states: StateFile, budget: RestartBudget,
           replanner: Replanner, plan: Plan, group: Group | None) -> None:
    """Serve by one plan, until an exception ends it."""
    states.update(phase=Phase.LOADING, progress=None, detail="starting the engine", model=settings.served_model_name)
    log.info("loading %s", settings.served_model_name)

    def on_ready() -> None:
        replanner.save_known_good()
        memory_report.record(plan, states)

    EngineServer(spec, fork_server, states, budget, on_ready, group).serve()


def _processes(plan: Plan) -> int:
    """Return the number of the engine's worker processes."""
    sizes = (plan.engine_args.get(f"{kind}-parallel-size", 1) for kind in ("tensor", "pipeline"))
    return math.prod(int(str(size)) for size in sizes)


def _host_address(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the address by which the processes of an engine on one machine connect to each other.

    Without it vLLM looks for an address through a socket to a public name server, which OFFLINE must prevent.
    """
    return {} if "VLLM_HOST_IP" in environment else {"VLLM_HOST_IP": "127.0.0.1"}


def _cluster_variables(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the head's engine: Ray's address and credentials, and the cluster's network."""
    interface = network.interface_of(settings.node_address, network.interfaces())
    return {**ray_command.network_variables(settings.node_address, interface, environment),
            **ray_command.credentials(RunDir(settings.run_dir)),
            "RAY_COLOR_PREFIX": "0",
            "RAY_ADDRESS": f"{settings.node_address}:{ports.GCS}"}


def _stop_on_sigterm(settings: Settings, states: StateFile) -> None:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the cleanup
        drain.announce(RunDir(settings.run_dir), settings.replica_port is not None)
        states.update_progress(phase=Phase.STOPPING, progress=None, detail="stopping")
        raise StopRequested

    signal.signal(signal.SIGTERM, stop)


def _stop_with_supervisord() -> None:
    """Stop this program as by SIGTERM after supervisord was killed."""
    supervisor = parent_watch.supervisor()

    def watch() -> None:
        while os.getppid() == supervisor:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
