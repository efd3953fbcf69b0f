"""`shoehorn models`: the models in the volume, with size, completeness and last use; `models rm` removes them.

Rules: sizes are those on the disk, partial files included; a model that an appliance serves from this volume, or that
is being pulled, is not removed; the manifest is removed first, so that an interrupted removal leaves an incomplete
model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime

from shoehorn.common.errors import EXIT_DONE
from shoehorn.common.units import format_size
from shoehorn.config import settings as settings_module
from shoehorn.store import inventory
from shoehorn.store.inventory import StoredModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `rm OWNER/NAME...`, and `--json` for the list."""
    parser.add_argument("--json", action="store_true",
                        help="print a list of {model, revision, bytes, complete, last_used, in_use, commit}")
    actions = parser.add_subparsers(dest="action", metavar="rm")
    remove = actions.add_parser("rm", help="remove models from the volume")
    remove.add_argument("models", nargs="+", metavar="OWNER/NAME")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """List or remove; return the exit code."""
    models_dir = settings_module.load(environment).models_dir
    if arguments.action == "rm":
        for model in arguments.models:
            freed = inventory.remove(models_dir, model)
            print(f"removed {model}: {format_size(freed)} freed")
        return EXIT_DONE
    models = inventory.models(models_dir)
    if arguments.json:
        print(json.dumps([asdict(model) for model in models], indent=1))
        return EXIT_DONE
    if not models:
        print(f"{models_dir}: no models")
    for model in models:
        print(_line(model))
    return EXIT_DONE


def _line(model: StoredModel) -> str:
    state = "in use" if model.in_use else "complete" if model.complete else "incomplete"
    used = "never served" if model.last_used is None else \
        f"last served {datetime.fromtimestamp(model.last_used, UTC):%Y-%m-%d %H:%M} UTC"
    moved = model.commit and model.commit != model.revision
    revision = f"{model.revision} at {model.commit[:12]}" if moved else model.revision
    return f"{model.model:60} {format_size(model.bytes):>12}  {state:10}  {revision}, {used}"
