"""The plan of a measured case: the machine that is really there, its cards taken as free, with the case's settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from shoehorn import checkpoint, hardware, link_probe, profiles, settings
from shoehorn.plan import Plan, Refusal, make_plan
from shoehorn.tensor_files import LocalFiles


def plan_case(case: dict[str, Any], gpus: list[int], directory: Path) -> Plan | Refusal:
    """Plan on these cards for the checkpoint in `directory`."""
    machine = link_probe.probed(hardware.detect(), directory.parent)
    machine = replace(machine, gpus=tuple(replace(gpu, free_bytes=gpu.total_bytes) for gpu in machine.gpus
                                          if gpu.index in gpus))
    loaded = settings.load({"MODEL_ID": str(directory), "MODEL_SOURCE": "local", **case.get("settings", {})})
    return make_plan(loaded, machine, profiles.select(loaded, machine), checkpoint.read(LocalFiles(directory)), None)
