"""vLLM's configuration file, `vllm.yaml`, from plan and settings.

Rules: the file is written by the YAML library, never joined from strings, and atomically into the run directory, which
only its owner can enter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from shoehorn.common.atomic_file import write_atomic
from shoehorn.config.settings import Settings
from shoehorn.planner.plan import Plan
from shoehorn.runtime.run_dir import RunDir
from shoehorn_vllm.protocol import MIDDLEWARE_CLASS, Abilities

ENGINE_DEFAULT_SEQUENCES = 256
"""vLLM's default of concurrent sequences."""

QUEUE_FACTOR = 4
"""Queued requests for each running one, unless MAX_QUEUED_REQUESTS is set."""


def engine_arguments(settings: Settings, plan_arguments: Mapping[str, object], model: Path) -> dict[str, object]:
    """Return vLLM's options: the plan's and the appliance's.

    The engine listens on a Unix socket only, serves no documentation pages, writes no access log (the gateway does),
    keeps idle streams alive with a comment every 15 s, and runs the appliance's middleware, which applies key limits
    and sets the priority of each request.
    """
    over_nodes = {"distributed-executor-backend": "ray"} if settings.role == "head" else {}
    return {
        "scheduling-policy": "priority",  # by the middleware's order of keys; a user may set fcfs
        **plan_arguments,
        "model": str(model),
        "served-model-name": [settings.served_model_name, *settings.served_aliases],
        "uds": str(RunDir(settings.run_dir).engine_socket),
        "disable-fastapi-docs": True,
        "disable-uvicorn-access-log": True,
        "sse-keep-alive-interval": 15,
        "middleware": [MIDDLEWARE_CLASS],
        **over_nodes,
    }


def most_requests(settings: Settings, plan_arguments: Mapping[str, object]) -> int:
    """Return the number of running and queued requests above which the engine refuses more."""
    running = plan_arguments.get("max-num-seqs")
    running = running if isinstance(running, int) else ENGINE_DEFAULT_SEQUENCES
    queued = settings.max_queued_requests
    return running + (queued if queued is not None else QUEUE_FACTOR * running)


def abilities(plan: Plan) -> Abilities:
    """Return tools and thoughts of the model, for the middleware."""
    thoughts, tools = (str(plan.engine_args.get(name) or "") for name in ("reasoning-parser", "tool-call-parser"))
    reasons = {reason.option: reason.text.removeprefix("off: ") for reason in plan.reasons}
    return Abilities(thoughts, tools, plan.thinking_switch,
                     without_thoughts="" if thoughts else reasons.get("reasoning-parser", "no parser is set"),
                     without_tools="" if tools else reasons.get("tool-call-parser", "no parser is set"),
                     runs_tools=bool(plan.engine_args.get("tool-server")))


def write_engine_config(settings: Settings, plan_arguments: Mapping[str, object], model: Path) -> Path:
    """Write `vllm.yaml`; return its path."""
    path = RunDir(settings.run_dir).engine_config
    arguments = engine_arguments(settings, plan_arguments, model)
    write_atomic(path, yaml.safe_dump(arguments, sort_keys=True, allow_unicode=True))
    return path
