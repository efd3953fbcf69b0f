"""Progress output of long commands, as text or as JSON lines."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from types import FrameType

from shoehorn.common import logging_config as logs
from shoehorn.common.progress import Progress, Report
from shoehorn.common.units import format_size
from shoehorn.config.settings import Settings

_LINE_SECONDS = 3.0


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
