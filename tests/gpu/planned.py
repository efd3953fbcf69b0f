"""The plan of a measured case: the machine that is really there, its GPUs taken as free, with the case's settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from shoehorn.config import settings
from shoehorn.deployment import inputs, served_model
from shoehorn.deployment.inputs import Deployment
from shoehorn.deployment.plan import plan_deployment
from shoehorn.model import checkpoint
from shoehorn.model.files import LocalFiles
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from shoehorn.planner.plan import Plan, Refusal


def plan_case(case: dict[str, Any], gpus: list[int], directory: Path) -> Plan | Refusal:
    """Plan on these GPUs for the checkpoint in `directory`."""
    values = {name: value.replace("{WORK}", str(directory.parent)) for name, value in case.get("settings", {}).items()}
    loaded = settings.load({"MODEL_ID": str(directory), "MODEL_SOURCE": "local", "MODELS_DIR": str(directory.parent),
                            **values})
    machine = inputs.detect_machine(loaded, {}, measure=True)
    machine = replace(machine, gpus=tuple(replace(gpu, free_bytes=gpu.total_bytes) for gpu in machine.gpus
                                          if gpu.index in gpus))
    profile, shape = inputs.select_profile(loaded, machine), checkpoint.read(LocalFiles(directory))
    return plan_deployment(loaded, Deployment(PlanInputs(PlanSettings.of(loaded), machine, profile, shape),
                                              served_model.served_reference(loaded), directory, None, directory))
