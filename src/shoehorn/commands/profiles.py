"""`shoehorn profiles`: what each profile would do on this machine with this model: runs, runs slowly, does not fit.

Rules: every row is a real plan, made from the model's config and headers alone; `auto` stands first; a profile that
cannot be used at all says why in its own row; where the model cannot be looked at, the profiles are named all the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoehorn.commands.target import add_target, machine_of, settings_of, shape_of
from shoehorn.common.errors import EXIT_DONE, ModelUnavailableError, SettingsError
from shoehorn.common.paths import PROFILES
from shoehorn.config import profiles
from shoehorn.config import settings as settings_module
from shoehorn.config.profiles import Profile
from shoehorn.config.settings import Settings
from shoehorn.hardware import detect
from shoehorn.hardware.types import Hardware
from shoehorn.model.shape import ModelShape
from shoehorn.planner.build import make_plan
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from shoehorn.planner.plan import Plan

SLOW_TOKENS_PER_SECOND = 5.0
"""Below this one reads faster than the answer comes."""

_GROUPS = {"runs": "runs", "slow": f"runs slowly (less than {SLOW_TOKENS_PER_SECOND:g} tokens/s for one request)",
           "does not fit": "does not fit", "unknown": "the model cannot be looked at, so nothing is known"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the machine, as for `shoehorn plan`, and `--json` for programs."""
    add_target(parser)
    parser.add_argument("--json", action="store_true",
                        help="print a list of {name, description, group, chosen, tokens_per_second, context, why}")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Print the rows by group; the one that VRAM_PROFILE means has a star."""
    settings = settings_module.load(settings_of(arguments, environment))
    machine = machine_of(arguments, detect.detect())
    shape, trouble, converted = None, "", None
    try:
        shape = shape_of(settings)
        if machine.gpus:
            from shoehorn.deployment import auto_quantization  # slow to import

            resolved = auto_quantization.resolve_quantization(settings, machine, profiles.automatic(),
                                                              disk=not arguments.gpu)
            converted = (resolved, shape_of(resolved)) if resolved is not settings else None
    except ModelUnavailableError as error:
        trouble = error.cause
    rows = listing(settings, machine, shape, converted=converted)
    if arguments.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return EXIT_DONE
    print(f"{settings.model_id} on {_words(machine)}{': ' * bool(trouble)}{trouble}")
    for group, title in _GROUPS.items():
        found = [row for row in rows if row["group"] == group]
        if found:
            print(f"\n{title}:")
        for row in found:
            print(_line(row))
    return EXIT_DONE


def listing(settings: Settings, machine: Hardware, shape: ModelShape | None, directory: Path = PROFILES,
            converted: tuple[Settings, ModelShape] | None = None) -> list[dict[str, Any]]:
    """One row a profile: `auto`, then the files, the smallest class first.

    Args:
        converted: settings and model as `auto` would have them, where it converts the model.
    """
    loaded = sorted((profiles.load(name, directory) for name in profiles.names(directory)),
                    key=lambda profile: (profile.match.gpus * profile.match.vram_bytes, profile.name))
    wish, made = converted or (settings, shape)
    auto = [_row(wish, machine, made, profiles.automatic())] if machine.gpus else []
    return auto + [_row(settings, machine, shape, profile) for profile in loaded]


def _row(settings: Settings, machine: Hardware, shape: ModelShape | None, profile: Profile) -> dict[str, Any]:
    row: dict[str, Any] = {"name": profile.name, "description": profile.description, "group": "does not fit",
                           "chosen": profile.name == settings.vram_profile, "tokens_per_second": None,
                           "context": None, "why": ""}
    if shape is None:
        return {**row, "group": "unknown"}
    try:
        plan = make_plan(PlanInputs(PlanSettings.of(settings), machine, profile, shape))
    except SettingsError as error:
        return {**row, "why": error.cause.splitlines()[0]}
    if not isinstance(plan, Plan):
        return {**row, "why": plan.cause.split(". ")[0]}
    rate = plan.expected_tokens_per_second["batch_1"]
    return {**row, "group": "slow" if rate is not None and rate < SLOW_TOKENS_PER_SECOND else "runs",
            "tokens_per_second": rate, "context": plan.engine_args["max-model-len"]}


def _line(row: Mapping[str, Any]) -> str:
    star = "*" if row["chosen"] else " "
    if row["group"] == "unknown":
        return f"{star} {row['name']:8} {row['description']}"
    if row["group"] == "does not fit":
        return f"{star} {row['name']:8} {row['why']}"
    speed = "speed unknown" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:g} tokens/s"
    return f"{star} {row['name']:8} {speed:>16}, context {row['context']:>6}   {row['description']}"


def _words(machine: Hardware) -> str:
    if not machine.gpus:
        return "a machine without a GPU"
    return ", ".join(f"{gpu.name or 'a GPU'} ({gpu.total_bytes / 2**30:.1f} GiB)" for gpu in machine.gpus)
