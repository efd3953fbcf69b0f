"""`shoehorn pull [MODEL_ID] [--to DIR] [--verify] [--json]`: fetch a model into the volume and check every file.

Rules: SIGTERM and Ctrl-C end it at once, and what has arrived is gone on with by the next pull; with `--json` nothing
but JSON objects goes to standard output, and the log to standard error as text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from shoehorn.commands.output import begin, say
from shoehorn.common import disk
from shoehorn.common.errors import EXIT_DONE
from shoehorn.config import settings as settings_module
from shoehorn.store import pull


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and `--json` for programs."""
    parser.add_argument("model", nargs="?", metavar="MODEL_ID", help="OWNER/NAME; the setting MODEL_ID when not given")
    parser.add_argument("--to", metavar="DIR", help="another MODELS_DIR than the setting, made if need be: to carry it "
                        "to a machine without a network, where it is mounted as the volume")
    parser.add_argument("--verify", action="store_true", help="fetch nothing: read a complete model again, every byte")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: phase, bytes_done, bytes_total, "
                        "rate_bytes_per_second; the last one: phase done, directory")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Pull; returns the exit code."""
    changes = {"MODEL_ID": arguments.model} if arguments.model else {}
    if arguments.to:
        changes["MODELS_DIR"] = str(_folder(Path(arguments.to).absolute()))
    settings = settings_module.load({**environment, **changes})
    report = begin(settings, as_json=arguments.json)
    work = pull.verify if arguments.verify else pull.pull
    directory = work(settings, report)
    say(json.dumps({"phase": "done", "directory": str(directory)}) if arguments.json else str(directory))
    return EXIT_DONE


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk.volume_error(path, error) from error
    return path
