"""`shoehorn profiles`: the profiles, which of them this machine is large enough for, and which one it would use."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoehorn import hardware, profiles
from shoehorn import settings as settings_module
from shoehorn.errors import EXIT_DONE, SettingsError
from shoehorn.hardware import Hardware
from shoehorn.paths import PROFILES
from shoehorn.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--json` for programs."""
    parser.add_argument("--json", action="store_true",
                        help="print a list of {name, description, device, gpus, vram_bytes, fits, chosen}")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Print the profiles, the smallest class first; the chosen one has a star."""
    rows = listing(settings_module.load(environment), hardware.detect())
    if arguments.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return EXIT_DONE
    for row in rows:
        star, fits = "*" if row["chosen"] else " ", "" if row["fits"] else " (this machine is too small)"
        print(f"{star} {row['name']:10} {row['description']}{fits}")
    if not any(row["chosen"] for row in rows):
        print("No profile fits by itself; choose one with VRAM_PROFILE.")
    return EXIT_DONE


def listing(settings: Settings, machine: Hardware, directory: Path = PROFILES) -> list[dict[str, Any]]:
    """One row a profile."""
    usable = min((gpu.total_bytes for gpu in machine.gpus), default=0)
    usable = min(usable, settings.vram_limit or usable)
    try:
        chosen = profiles.select(settings, machine, directory).name
    except SettingsError:
        chosen = ""  # nothing fits, which the listing shows
    loaded = sorted((profiles.load(name, directory) for name in profiles.names(directory)),
                    key=lambda profile: (profile.match.gpus * profile.match.vram_bytes, profile.name))
    return [{"name": profile.name, "description": profile.description, "device": profile.match.device,
             "gpus": profile.match.gpus, "vram_bytes": profile.match.vram_bytes,
             "fits": profiles.fits(profile, len(machine.gpus), usable), "chosen": profile.name == chosen}
            for profile in loaded]
