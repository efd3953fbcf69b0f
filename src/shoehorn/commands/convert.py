"""`shoehorn convert [MODEL_ID] [--embedding B] [--group-size N] [--json]`: a model in the volume, once more, in INT4.

Rules: as for `shoehorn pull`: it ends at once, what is done is gone on with; with `--json` nothing but JSON objects
goes to standard output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from shoehorn.commands import output
from shoehorn.common.errors import EXIT_DONE
from shoehorn.config import settings as settings_module
from shoehorn.int4 import convert as converter
from shoehorn.int4.convert import Wish
from shoehorn.int4.layout import GROUPS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and what is usually decided by measuring."""
    parser.add_argument("model", nargs="?", metavar="MODEL_ID", help="OWNER/NAME; the setting MODEL_ID when not given")
    parser.add_argument("--embedding", type=int, choices=(4, 8, 16), metavar="BITS",
                        help="bits of embedding and head: 4, 8, or 16 for as they are, which an engine on the CPU "
                        "needs; by their error when not given")
    parser.add_argument("--group-size", type=int, choices=GROUPS, metavar="N",
                        help=f"weights that share a scale: {', '.join(map(str, GROUPS))}; fewer lose less, and take "
                        "more")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, as `shoehorn pull --json`")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Convert; returns the exit code."""
    changes = {"MODEL_ID": arguments.model} if arguments.model else {}
    settings = settings_module.load({**environment, **changes})
    report = output.begin(settings, as_json=arguments.json)
    directory = converter.convert(settings, Wish(arguments.embedding, arguments.group_size), report)
    output.say(json.dumps({"phase": "done", "directory": str(directory)}) if arguments.json else str(directory))
    return EXIT_DONE
