"""An engine that the fork server has forked, with the interface of `subprocess.Popen`.

It is a child of the fork server, which reports its exit status through a pipe. The process has the other end of that
pipe too: if the server is killed, the pipe ends with the process, and the status is unknown. A server that does not
report an exit hangs; it is killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from typing import IO

import psutil

from shoehorn_vllm.fork_server import messages

UNKNOWN_STATUS = 255

_REPORT_SECONDS = 10.0
_LOOK_SECONDS = 1.0


class ForkedProcess:
    """A forked process.

    Args:
        status: reading end of the pipe for its exit status.
        lifeline: writing end of the pipe by which it would notice the end of this program.
        stdout: its output.
        kill_server: kills the fork server.
    """

    def __init__(self, pid: int, status: int, lifeline: int, stdout: IO[str],
                 kill_server: Callable[[], None]) -> None:
        self._pid = pid
        self.stdout: IO[str] | None = stdout
        self._pipes, self._kill_server = (status, lifeline), kill_server
        self._status: int | None = None
        self._gone_since: float | None = None

    @property
    def pid(self) -> int:
        """Process id of the engine and of its group."""
        return self._pid

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._receive(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _LOOK_SECONDS if deadline is None else max(0.0, min(_LOOK_SECONDS, deadline - time.monotonic()))
            if (status := self._receive(left)) is not None:
                return status
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout or 0.0)

    def terminate(self) -> None:
        """Send SIGTERM."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has exited, and its status is about to arrive
                os.kill(self.pid, signal.SIGTERM)

    def _receive(self, seconds: float) -> int | None:
        if self._status is None:
            if select.select(self._pipes[:1], [], [], seconds)[0]:
                status = messages.read_status(self._pipes[0])
                self._status = UNKNOWN_STATUS if status is None else status
                for pipe in self._pipes:
                    os.close(pipe)
            else:
                self._expect_report()
        return self._status

    def _expect_report(self) -> None:
        """Kill a server that does not report an exit: it is stopped or hangs."""
        if not _has_exited(self.pid):
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = time.monotonic()
        elif time.monotonic() - self._gone_since > _REPORT_SECONDS:
            self._gone_since = None
            self._kill_server()


def _has_exited(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
