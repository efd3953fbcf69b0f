"""Output of the engine: last lines, log file, and progress of the start.

Rules: the reading thread calls `read_line` and never fails, or the engine would block on a full pipe.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from shoehorn.engine.rotating_file import RotatingFile
from shoehorn.runtime.state import Phase, StateFile

log = logging.getLogger("engine")

_STAGES = (
    (re.compile(r"Starting to load model"), "loading the weights"),
    (re.compile(r"Loading weights took|Model loading took"), "measuring memory and warming up"),
    (re.compile(r"Capturing CUDA graphs|Compiling a graph|torch\.compile took"), "compiling and capturing graphs"),
    (re.compile(r"Starting vLLM server"), "opening the API"),
)
"""Lines of vLLM 0.32.0, and the `detail` of the state that each begins; the console page translates the details."""

_TAIL_LINES = 2000
"""Each worker of eight GPUs logs a traceback of some hundred lines before the engine ends."""
_PRINTED_LINES = 400

_LEVEL = re.compile(r"(?:\([\w-]+ pid=\d+\) )?(DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d ")
_NOISE = re.compile(r"\] Route: /|\] Available routes are:|Avg prompt throughput: .*Running: 0 reqs, Waiting: 0 reqs")
"""Routes that the gateway does not serve, and the statistics after each probe of an idle engine."""

_SHARDS = re.compile(r"Loading safetensors checkpoint shards:\s+(\d+)% Completed")
_WORKER_FAILED = re.compile(r"WorkerProc hit an exception")


class EngineOutput:
    """Output of one engine process.

    Args:
        log_file: file for the lines; None logs them.

    Attributes:
        worker_failed_at: monotonic time at which a worker process reported its failure; None without one.
    """

    def __init__(self, states: StateFile, log_file: Path | None) -> None:
        self._states = states
        self._file = RotatingFile(log_file) if log_file else None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.worker_failed_at: float | None = None

    @property
    def tail(self) -> Sequence[str]:
        """The last lines, oldest first."""
        return tuple(self._tail)

    def read_line(self, line: str) -> None:
        """Take one line of the engine."""
        self._tail.append(line)
        if _WORKER_FAILED.search(line) and self.worker_failed_at is None:
            self.worker_failed_at = time.monotonic()
        self._log(line)
        self._publish_progress(line)

    def print_tail(self) -> None:
        """Print the last lines if they are in a file only."""
        if self._file:
            print("\n".join(list(self._tail)[-_PRINTED_LINES:]), flush=True)

    def _log(self, line: str) -> None:
        if self._file:
            try:
                self._file.write(line)
            except OSError as error:
                log.warning("Cannot write engine log, using standard output path=%s error=%s", self._file.path,
                            error.strerror)
                self._file = None
        if not self._file and not _NOISE.search(line):
            match = _LEVEL.match(line)
            level = logging.getLevelNamesMapping()[match[1] if match else "INFO"]
            logging.getLogger("vllm").log(level, "%s", line)

    def _publish_progress(self, line: str) -> None:
        state = self._states.read()
        if state.phase is not Phase.LOADING:
            return
        if match := _SHARDS.search(line):
            self._states.update_progress(detail="loading the weights", progress=int(match[1]) / 100)
            return
        for pattern, detail in _STAGES:
            if pattern.search(line) and state.detail != detail:
                self._states.update_progress(detail=detail, progress=None)
                log.info("%s", detail)
