"""Output of commands: tables, and the progress of long ones, as text or as one JSON object a line.

The JSON lines are one protocol, which the engine program reads (`engine.fetch`), by `phase`: `pulling`, `verifying` and
`converting` with bytes_done, bytes_total and rate_bytes_per_second; `log` with program, level and message, on standard
error; last either `done` with the directory or `failed` with exit_code, code, cause and remedy.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from shoehorn.common import logging_config as logs
from shoehorn.common.errors import EXIT_DONE, ShoehornError
from shoehorn.common.progress import Progress, Report
from shoehorn.common.units import format_size
from shoehorn.config import settings as settings_module
from shoehorn.config.settings import Settings

_LINE_SECONDS = 3.0

Work = Callable[[Settings, Report], Path]
"""Work that ends with a folder."""


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object a line: phase, bytes_done, "
                        "bytes_total, rate_bytes_per_second; the last one has phase done and directory, or phase "
                        "failed, exit_code, code, cause and remedy")


def run_work(work: Work, environment: Mapping[str, str], *, as_json: bool) -> int:
    """Run a command's work with its progress as output; return the exit code.

    Raises:
        ShoehornError: of the work, if the output is text.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    if not as_json:
        settings = settings_module.load(environment)
        logs.configure(settings.log_format)
        print_line(str(work(settings, Lines(print_line))))
        return EXIT_DONE
    _log_as_json()
    try:
        directory = work(settings_module.load(environment), _print_progress)
    except ShoehornError as error:
        print_line(json.dumps({"phase": "failed", "exit_code": error.exit_code, "code": error.code,
                               "cause": error.cause, "remedy": error.remedy}))
        return error.exit_code
    print_line(json.dumps({"phase": "done", "directory": str(directory)}))
    return EXIT_DONE


def print_line(text: str) -> None:
    """Print a line; without a reader of standard output the process exits."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _exit(signal.SIGPIPE, None)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows, of which the first has the titles, in aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _exit(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)  # a regular exit would wait for the hub library's threads


def _print_progress(progress: Progress) -> None:
    print_line(json.dumps(asdict(progress)))


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({"phase": "log", "program": record.name, "level": record.levelname,
                           "message": record.getMessage()})


def _log_as_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


class Lines:
    """Progress as text: a line every few seconds, at each change of phase and at its end.

    Args:
        write: takes one line.
        clock: seconds.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._phase, self._ended, self._at = "", False, 0.0

    def __call__(self, progress: Progress) -> None:
        ended = progress.bytes_done == progress.bytes_total
        same = (progress.phase, ended) == (self._phase, self._ended)
        if same and (ended or self._clock() - self._at < _LINE_SECONDS):
            return
        self._phase, self._ended, self._at = progress.phase, ended, self._clock()
        rate, missing = progress.rate_bytes_per_second, progress.bytes_total - progress.bytes_done
        share = progress.bytes_done / progress.bytes_total if progress.bytes_total else 1.0
        speed = f", {format_size(round(rate))}/s" if rate else ""
        remaining = f", {_duration(missing / rate)} left" if rate and missing else ""
        self._write(f"{progress.phase}: {format_size(progress.bytes_done)} of {format_size(progress.bytes_total)} "
                    f"({share:.0%}){speed}{remaining}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
