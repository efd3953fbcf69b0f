"""Child processes in groups that are always terminated.

Rules:
- a child leads a process group of its own, which is killed when the child exits: otherwise an engine core outlives a
  killed API server and keeps its memory;
- SIGTERM is repeated until the child exits, because the engine loses one that arrives while it loads; after the time
  limit the whole group gets SIGKILL;
- the group is recorded in a file, so that a successor can kill the group of a killed program; a SIGTERM between the
  start of the child and its record is handled after it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import psutil

from shoehorn.common.atomic_file import write_atomic

_REPEAT_SECONDS = 2.0


class Process(Protocol):
    """A started process, as `subprocess.Popen` has it."""

    stdout: IO[str] | None

    @property
    def pid(self) -> int:
        """Process id."""

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """

    def terminate(self) -> None:
        """Send SIGTERM."""


Start = Callable[[], Process]
"""Starts a process that leads a process group of its own, with both output streams in `stdout`."""


def command(words: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int] = ()) -> Start:
    """Return the start of a program with these arguments and this whole environment."""
    return lambda: subprocess.Popen(words, env=dict(environment), pass_fds=pass_fds, stdin=subprocess.DEVNULL,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                    text=True, encoding="utf-8", errors="replace")


class Child:
    """A running child; a thread passes its output, both streams, to `on_line` line by line.

    Args:
        start: starts the process.
        on_line: gets one line without its end; progress bars that redraw by carriage return arrive as lines too.
        record: file that names the group for a successor.
    """

    def __init__(self, start: Start, on_line: Callable[[str], None], record: Path) -> None:
        self._record = record
        with _delay_signal(signal.SIGTERM):
            self._process = start()
            write_atomic(record, json.dumps({"group": self._process.pid}))
        self._reader = threading.Thread(target=self._read, args=(on_line,), name="child-output", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id of the child and of its group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status (negative: the signal), or None while it runs. Kills the rest of its group."""
        status = self._process.poll()
        if status is not None:
            self._finish()
        return status

    def wait(self, seconds: float) -> int | None:
        """Wait up to `seconds`, then poll."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return self.poll()

    def stop(self, grace_seconds: float) -> int:
        """Terminate the child and its group within `grace_seconds`, then kill it; returns its exit status."""
        deadline = time.monotonic() + grace_seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            self._process.terminate()
            self.wait(min(_REPEAT_SECONDS, max(0.0, deadline - time.monotonic())))
        kill_group(self.pid)
        status = self._process.wait()
        self._finish()
        return status

    def _finish(self) -> None:
        kill_group(self.pid)
        self._reader.join(5.0)
        if self._process.stdout and not self._reader.is_alive():
            self._process.stdout.close()
        self._record.unlink(missing_ok=True)

    def _read(self, on_line: Callable[[str], None]) -> None:
        assert self._process.stdout is not None  # noqa: S101  # opened as a pipe above
        for line in self._process.stdout:
            if stripped := line.rstrip():
                on_line(stripped)


@contextmanager
def _delay_signal(number: signal.Signals) -> Iterator[None]:
    """Delay a signal until the end of the block; not by its mask, which a child would inherit."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers in the main thread only
        return
    received: list[int] = []
    handler = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(number, handler)
        if received:
            signal.raise_signal(number)


def kill_group(group: int, wait_seconds: float = 10.0) -> None:
    """Kill every process of `group` and wait until none is alive (zombies do not count)."""
    if group <= 1:
        return  # to the kernel these mean the caller's group and all processes
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
    deadline = time.monotonic() + wait_seconds
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.05)


def members(group: int) -> list[int]:
    """The process ids of a group's living members."""
    alive = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                alive.append(process.pid)
        except ProcessLookupError:
            continue
    return alive


def kill_recorded_group(record: Path) -> list[int]:
    """Kill the recorded group of a killed program; returns the ids of the processes that were alive."""
    try:
        group = int(json.loads(record.read_text(encoding="utf-8"))["group"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    alive = members(group)
    if alive:
        kill_group(group)
    record.unlink(missing_ok=True)
    return alive
