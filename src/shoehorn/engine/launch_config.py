"""Plan and settings -> the files that the processes read: `vllm.yaml` and `supervisord.conf`.

Rules: every file is dumped by the library of its format, never joined from strings; written atomically into the run
directory, which only its owner may enter. The gateway's own file comes from `gateway`, its keys from `keys`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from shoehorn.common.atomic_file import write_atomic
from shoehorn.config.settings import Settings
from shoehorn.runtime.run_dir import RunDir

ENGINE_DEFAULT_SEQUENCES = 256
"""What vLLM runs at a time when nobody says."""

QUEUE_FACTOR = 4
"""Requests that may wait for each one that runs, unless MAX_QUEUED_REQUESTS says otherwise."""


def engine_arguments(settings: Settings, plan_arguments: Mapping[str, object], model: Path) -> dict[str, object]:
    """vLLM's options: what the plan decided and what the appliance fixes.

    The engine listens on a Unix socket only, shows no documentation pages, writes no access log (the gateway does),
    keeps idle streams alive with a comment every 15 s, and lets the appliance's middleware hold keys to their limits.
    """
    return {
        **plan_arguments,
        "model": str(model),
        "served-model-name": settings.served_model_name,
        "uds": str(RunDir(settings.run_dir).engine_socket),
        "disable-fastapi-docs": True,
        "disable-uvicorn-access-log": True,
        "sse-keep-alive-interval": 15,
        "middleware": ["shoehorn_vllm.api.middleware.Gate"],
    }


def most_requests(settings: Settings, plan_arguments: Mapping[str, object]) -> int:
    """How many requests the engine may hold at a time, running and queued, before more are refused."""
    running = plan_arguments.get("max-num-seqs")
    running = running if isinstance(running, int) else ENGINE_DEFAULT_SEQUENCES
    queued = settings.max_queued_requests
    return running + (queued if queued is not None else QUEUE_FACTOR * running)


def write_engine_config(settings: Settings, plan_arguments: Mapping[str, object], model: Path) -> Path:
    """Write `vllm.yaml`; returns its path."""
    path = RunDir(settings.run_dir).engine_config
    arguments = engine_arguments(settings, plan_arguments, model)
    write_atomic(path, yaml.safe_dump(arguments, sort_keys=True, allow_unicode=True))
    return path
