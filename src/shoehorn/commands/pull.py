"""`shoehorn pull [MODEL_ID] [--json]`: fetch a model into the volume and check every file."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from types import FrameType

from shoehorn import log as logs
from shoehorn import settings as settings_module
from shoehorn import store
from shoehorn.errors import EXIT_DONE
from shoehorn.store import Progress
from shoehorn.units import format_size

_LINE_SECONDS = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and `--json` for programs."""
    parser.add_argument("model", nargs="?", metavar="MODEL_ID", help="OWNER/NAME; the setting MODEL_ID when not given")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: phase, bytes_done, bytes_total, "
                        "rate_bytes_per_second; the last one: phase done, directory")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Pull; returns the exit code. SIGTERM ends it at once: what has arrived is kept and gone on with."""
    signal.signal(signal.SIGTERM, _end)
    settings = settings_module.load({**environment, **({"MODEL_ID": arguments.model} if arguments.model else {})})
    logs.configure(settings.log_format)
    sys.stdout.flush()
    directory = store.pull(settings, _print_json if arguments.json else _Lines())
    print(json.dumps({"phase": "done", "directory": str(directory)}) if arguments.json else directory, flush=True)
    return EXIT_DONE


def _end(_signal: int, _frame: FrameType | None) -> None:
    os._exit(128 + signal.SIGTERM)  # the library's threads would be waited for otherwise


def _print_json(progress: Progress) -> None:
    print(json.dumps(asdict(progress)), flush=True)


class _Lines:
    """A line every few seconds: bytes, share, rate, time left."""

    def __init__(self) -> None:
        self._said = 0.0

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() - self._said < _LINE_SECONDS:
            return
        self._said = time.monotonic()
        share = progress.bytes_done / progress.bytes_total if progress.bytes_total else 1.0
        rate = progress.rate_bytes_per_second
        left = f", {(progress.bytes_total - progress.bytes_done) / rate:.0f} s left" if rate else ""
        print(f"{progress.phase}: {format_size(progress.bytes_done)} of {format_size(progress.bytes_total)} "
              f"({share:.0%}), {format_size(round(rate))}/s{left}", flush=True)
