"""`shoehorn convert [MODEL_ID] [--embedding B] [--group-size N] [--json]`: convert a model in the volume to INT4.

Rules: as for `shoehorn pull`: it ends at once and can be resumed; with `--json` standard output has JSON lines only.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from shoehorn.commands import output
from shoehorn.common.progress import Report
from shoehorn.config.settings import Settings
from shoehorn.hardware import detect
from shoehorn.int4 import convert as converter
from shoehorn.int4.convert import ConversionOptions
from shoehorn.int4.journal import Limits
from shoehorn.int4.layout import GROUPS
from shoehorn.int4.shard_writer import worker_count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and the options that are usually chosen by measurement."""
    parser.add_argument("model", nargs="?", metavar="MODEL_ID", help="OWNER/NAME; default: the setting MODEL_ID")
    parser.add_argument("--embedding", type=int, choices=(4, 8, 16), metavar="BITS",
                        help="bits of embedding and head: 4, 8, or 16 (unchanged), which the CPU engine needs; "
                        "default: by their quantization error")
    parser.add_argument("--group-size", type=int, choices=GROUPS, metavar="N",
                        help=f"weights that share a scale: {', '.join(map(str, GROUPS))}; smaller groups lose less "
                        "accuracy and take more memory")
    parser.add_argument("--calibration-tokens", type=int, metavar="N", help="tokens of the calibration text; default: "
                        "131072 on a GPU, 16384 on a CPU")
    output.add_json(parser)


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Convert; return the exit code."""
    changes = {"MODEL_ID": arguments.model} if arguments.model else {}

    def work(settings: Settings, report: Report) -> Path:
        machine = detect.detect()
        limits = Limits(machine.host_available_bytes, machine.cpus, arguments.calibration_tokens)
        options = ConversionOptions(arguments.embedding, arguments.group_size, limits)
        cpu_workers = worker_count(machine.cpus, machine.host_available_bytes)
        return converter.convert(settings, options, cpu_workers, report)

    return output.run_work(work, {**environment, **changes}, as_json=arguments.json)
