"""`shoehorn profiles`: the result of each profile on this machine with this model: runs, runs slowly, does not fit.

Rules: every row is a real plan, made from the model's config and headers alone; `auto` is first; a profile that is
unusable has the reason in its row; without access to the model the profiles are listed all the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shoehorn.commands.target import add_target, is_this_machine, read_machine, read_settings
from shoehorn.common.errors import EXIT_DONE, ModelUnavailableError, SettingsError
from shoehorn.common.paths import PROFILES
from shoehorn.config import profiles
from shoehorn.config import settings as settings_module
from shoehorn.config.profiles import Profile
from shoehorn.config.settings import Settings
from shoehorn.deployment import inputs
from shoehorn.deployment.plan import plan_deployment
from shoehorn.deployment.served_model import ShapeReader
from shoehorn.hardware.types import Hardware
from shoehorn.planner.plan import Plan

SLOW_TOKENS_PER_SECOND = 5.0
"""Below this speed a person reads faster than the model writes."""

_GROUPS = {"runs": "runs", "slow": f"runs slowly (less than {SLOW_TOKENS_PER_SECOND:g} tokens/s for one request)",
           "does not fit": "does not fit", "unknown": "the model is unavailable, so the result is unknown"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and the machine, as for `shoehorn plan`, and `--json`."""
    add_target(parser)
    parser.add_argument("--json", action="store_true",
                        help="print a list of {name, description, group, chosen, tokens_per_second, context, why}")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Print the rows by group; a star marks the profile that VRAM_PROFILE names."""
    settings = settings_module.load(read_settings(arguments, environment))
    machine = read_machine(arguments, settings, environment)
    rows = list_profiles(settings, machine, here=is_this_machine(arguments))
    if arguments.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return EXIT_DONE
    problem = next((row["why"] for row in rows if row["group"] == "unknown"), "")
    print(f"{settings.model_id} on {_describe(machine)}{': ' * bool(problem)}{problem}")
    for group, title in _GROUPS.items():
        members = [row for row in rows if row["group"] == group]
        if members:
            print(f"\n{title}:")
        for row in members:
            print(_line(row))
    return EXIT_DONE


def list_profiles(settings: Settings, machine: Hardware, *, here: bool = True) -> list[dict[str, Any]]:
    """Return one row for each profile: `auto`, then the files, the smallest class first.

    Args:
        here: as `inputs.gather` takes it.
    """
    loaded = sorted((profiles.load(name, PROFILES) for name in profiles.names(PROFILES)),
                    key=lambda profile: (profile.match.gpus * profile.match.vram_bytes, profile.name))
    automatic = [profiles.automatic()] if machine.gpus else []
    shapes = ShapeReader(settings)
    return [_row(settings, machine, profile, shapes, here) for profile in (*automatic, *loaded)]


def _row(settings: Settings, machine: Hardware, profile: Profile, shapes: ShapeReader, here: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"name": profile.name, "description": profile.description, "group": "does not fit",
                           "chosen": profile.name == settings.vram_profile, "tokens_per_second": None,
                           "context": None, "why": ""}
    candidate = replace(settings, vram_profile=profile.name)
    try:
        plan = plan_deployment(candidate, inputs.gather(candidate, machine, here=here, shapes=shapes))
    except ModelUnavailableError as error:
        return {**row, "group": "unknown", "why": error.cause}
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


def _describe(machine: Hardware) -> str:
    if not machine.gpus:
        return "a machine without a GPU"
    return ", ".join(f"{gpu.name or 'a GPU'} ({gpu.total_bytes / 2**30:.1f} GiB)" for gpu in machine.gpus)
