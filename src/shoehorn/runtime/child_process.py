"""Child processes that leave nothing behind.

Rules:
- a child leads a process group of its own, and the group is ended when the child ends: an engine core outlives a killed
  API server otherwise, and keeps its memory;
- SIGTERM is sent again until the child is gone, because the engine loses one that comes while it loads; when the time
  is up the whole group gets SIGKILL;
- the group is recorded in a file, so that a successor can end what a killed owner left; a SIGTERM that comes between
  the child's birth and its record is heard after it.
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

import psutil

from shoehorn.common.atomic_file import write_atomic

_REPEAT_SECONDS = 2.0


class Child:
    """A running child; its output, both streams, goes to `on_line` line by line, from a thread of its own.

    Args:
        command: the program and its arguments.
        environment: all of the child's environment.
        on_line: takes one line without its end; progress bars that redraw with a carriage return arrive as lines too.
        record: where the group is noted for a successor.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None],
                 record: Path) -> None:
        self._record = record
        with _held(signal.SIGTERM):
            self._process = subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL,
                                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                             text=True, encoding="utf-8", errors="replace")
            write_atomic(record, json.dumps({"group": self._process.pid}))
        self._reader = threading.Thread(target=self._read, args=(on_line,), name="child-output", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The child's process id, which is its group's too."""
        return self._process.pid

    def poll(self) -> int | None:
        """The exit status (negative: the signal), or None while it runs. Ends the group's leftovers with it."""
        status = self._process.poll()
        if status is not None:
            self._finish()
        return status

    def wait(self, seconds: float) -> int | None:
        """Like `poll`, after at most `seconds`."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return self.poll()

    def stop(self, grace_seconds: float) -> int:
        """End the child and its group; returns its exit status. Takes at most `grace_seconds` and a moment."""
        deadline = time.monotonic() + grace_seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            self._process.terminate()
            self.wait(min(_REPEAT_SECONDS, max(0.0, deadline - time.monotonic())))
        end_group(self.pid)
        status = self._process.wait()
        self._finish()
        return status

    def _finish(self) -> None:
        end_group(self.pid)
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
def _held(number: signal.Signals) -> Iterator[None]:
    """Keep a signal until the end of the block; not by its mask, which a child would inherit."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers in the main thread only
        return
    came: list[int] = []
    before = signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(number, before)
        if came:
            signal.raise_signal(number)


def end_group(group: int, wait_seconds: float = 10.0) -> None:
    """SIGKILL every process of `group` and wait until none is left (zombies, which hold nothing, do not count)."""
    if group <= 1:
        return  # to the kernel these mean the caller's own group and everybody
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
    deadline = time.monotonic() + wait_seconds
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.05)


def members(group: int) -> list[int]:
    """The process ids of a group's living members."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


def end_recorded_group(record: Path) -> list[int]:
    """End what a killed owner left behind; returns the ids of the processes that were still there."""
    try:
        group = int(json.loads(record.read_text(encoding="utf-8"))["group"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    left = members(group)
    if left:
        end_group(group)
    record.unlink(missing_ok=True)
    return left
