"""`shoehorn pull [MODEL_ID] [--to DIR] [--verify] [--json]`: fetch a model into the volume and verify every file.

Rules: SIGTERM and Ctrl-C end it at once, and the next pull resumes it; with `--json` standard output has JSON lines
only.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from shoehorn.commands import output
from shoehorn.common import disk
from shoehorn.store import pull


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and the options of a pull."""
    parser.add_argument("model", nargs="?", metavar="MODEL_ID", help="OWNER/NAME; default: the setting MODEL_ID")
    parser.add_argument("--to", metavar="DIR", help="a MODELS_DIR other than the setting, created if necessary: to "
                        "copy it to a machine without a network and mount it there as the volume")
    parser.add_argument("--verify", action="store_true", help="fetch nothing: verify every byte of a complete model")
    output.add_json(parser)


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Pull; return the exit code."""
    changes = {"MODEL_ID": arguments.model} if arguments.model else {}
    if arguments.to:
        changes["MODELS_DIR"] = str(_create_folder(Path(arguments.to).absolute()))
    return output.run_work(pull.verify if arguments.verify else pull.pull, {**environment, **changes},
                           as_json=arguments.json)


def _create_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk.volume_error(path, error) from error
    return path
