"""Seconds of each part of a start, from the engine program's own clock and from lines of vLLM.

Rules: the parts are consecutive and add up to the total; a part that did not occur is absent; with several workers the
slowest counts. Reading includes the copy to the GPU, because both overlap; `import` is the time for which the start
waited for the import of vLLM, most of which runs during plan and pull.
Lines as vLLM 0.32.0 has them (default_loader.py, gpu_model_runner.py, v1/engine/core.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

TOTAL = "total"
PARTS = ("plan", "pull", "convert", "import", "read", "repack", "compile", "graphs", "cache", "warm_up", "other", TOTAL)
"""`repack`: making the layers, and converting weights after reading; `cache`: profiling and making the KV cache."""

_READ, _LOADED, _GRAPHS, _INITIALIZED = "read", "loaded", "graphs", "initialized"
_LINES = (
    (_READ, re.compile(r"Loading weights took ([\d.]+) seconds")),
    (_LOADED, re.compile(r"Model loading took \S+ GiB memory and ([\d.]+) seconds")),
    (_GRAPHS, re.compile(r"Graph capturing finished in ([\d.]+) secs")),
    (_INITIALIZED, re.compile(r"init engine \(.*?\) took ([\d.]+) s")),
    ("compile", re.compile(r"init engine \(.*?\) took [\d.]+ s \(compilation: ([\d.]+) s")),
)


@contextmanager
def measured(seconds: MutableMapping[str, float], part: str) -> Iterator[None]:
    """Add the duration of the block to a part."""
    begun = time.monotonic()
    try:
        yield
    finally:
        seconds[part] = seconds.get(part, 0.0) + time.monotonic() - begun


class StartTimes:
    """The times of one start.

    Args:
        earlier: seconds of the parts before the engine was started.
    """

    def __init__(self, earlier: Mapping[str, float]) -> None:
        self._begun = time.monotonic()
        self._engine: dict[str, float] = {}
        self.seconds = dict(earlier)

    def read_line(self, line: str) -> None:
        """Take one line of the engine."""
        for part, pattern in _LINES:
            if match := pattern.search(line):
                self._engine[part] = max(self._engine.get(part, 0.0), float(match[1]))

    def finish(self) -> dict[str, float]:
        """Return the seconds of each part at the end of the start, in the order of PARTS."""
        engine = self._engine
        parts = {**self.seconds, **{part: engine[part] for part in (_READ, "compile", _GRAPHS) if part in engine}}
        if _LOADED in engine:
            parts["repack"] = engine[_LOADED] - engine.get(_READ, 0.0)
        if _INITIALIZED in engine:
            parts["cache"] = engine[_INITIALIZED] - engine.get("compile", 0.0) - engine.get(_GRAPHS, 0.0)
        before = sum(self.seconds.get(part, 0.0) for part in ("plan", "pull", "convert"))
        total = before + time.monotonic() - self._begun
        parts["other"] = total - sum(parts.values())
        parts[TOTAL] = total
        return {part: round(max(0.0, parts[part]), 2) for part in PARTS if part in parts}


def table(seconds: Mapping[str, float]) -> list[str]:
    """Format the times, one line for each part."""
    return [f"{part:8} {value:8.1f} s" for part, value in seconds.items()]
