"""`shoehorn pull [MODEL_ID] [--to DIR] [--verify] [--json]`: fetch a model into the volume and check every file.

Rules: SIGTERM and Ctrl-C end it at once, and what has arrived is gone on with by the next pull; with `--json` nothing
but JSON objects goes to standard output, and the log to standard error as text.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from shoehorn import log as logs
from shoehorn import settings as settings_module
from shoehorn import store, volume
from shoehorn.errors import EXIT_DONE
from shoehorn.progress import Progress, Report
from shoehorn.settings import Settings
from shoehorn.units import format_size

_LINE_SECONDS = 3.0


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
    work = store.verify if arguments.verify else store.pull
    directory = work(settings, report)
    say(json.dumps({"phase": "done", "directory": str(directory)}) if arguments.json else str(directory))
    return EXIT_DONE


def begin(settings: Settings, *, as_json: bool) -> Report:
    """What long commands share: they end at a signal, and tell where they are as text or as JSON."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    if as_json:
        logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s", stream=sys.stderr,
                            force=True)
        logging.getLogger("httpx").setLevel(logging.WARNING)
    else:
        logs.configure(settings.log_format)
    return _say_json if as_json else Lines(say)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise volume.trouble(path, error) from error
    return path


def _end(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)  # an orderly end would wait for the library's threads


def say(text: str) -> None:
    """A line for whoever reads; without a reader the work ends."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _end(signal.SIGPIPE, None)  # the reader is gone, and with it who wanted the model


def _say_json(progress: Progress) -> None:
    say(json.dumps(asdict(progress)))


class Lines:
    """Progress for people: a line every few seconds, at each change of phase and at its end.

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
        pace = f", {format_size(round(rate))}/s" if rate else ""
        left = f", {_duration(missing / rate)} left" if rate and missing else ""
        self._write(f"{progress.phase}: {format_size(progress.bytes_done)} of {format_size(progress.bytes_total)} "
                    f"({share:.0%}){pace}{left}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
