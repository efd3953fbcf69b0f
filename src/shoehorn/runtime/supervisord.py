"""The program `supervisord`, with the exit code of the failed program and an immediate reaction to signals.

supervisord exits with 0 whatever happened to its programs; this returns the code that the engine or the event listener
wrote to RUN_DIR, and kills all recorded process groups. supervisord checks its signals once a second only, since Python
repeats a `poll` that a signal interrupted; until then new requests would still be admitted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from supervisor import supervisord
from supervisor.medusa import asyncore_25
from supervisor.options import ServerOptions

from shoehorn.runtime import parent_watch
from shoehorn.runtime.child_process import kill_recorded_group
from shoehorn.runtime.run_dir import RunDir


class _WakeupPipe:
    """A pipe that every signal writes to, polled by supervisord."""

    def __init__(self) -> None:
        self._reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        asyncore_25.socket_map[self._reading] = self

    def readable(self) -> bool:
        """Readable, for supervisord."""
        return True

    def writable(self) -> bool:
        """Not writable, for supervisord."""
        return False

    def handle_read_event(self) -> None:
        """Empty the pipe; supervisord's handler has recorded the signal."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reading, 4096)

    def handle_error(self) -> None:
        """Raise the exception that supervisord is handling."""
        raise


class _Options(ServerOptions):  # type: ignore[misc]  # supervisor has no types
    def setsignals(self) -> None:
        """Install the handlers, after supervisord has closed all unknown files."""
        super().setsignals()
        _WakeupPipe()


def main(run_dir: Path) -> int:
    """Run supervisord with its configuration in `run_dir` until it is stopped; returns the container's exit code."""
    parent_watch.become_supervisor()
    supervisord.ServerOptions = _Options
    paths = RunDir(run_dir)
    supervisord.main(["-c", str(paths.supervisord_config)])
    for record in paths.groups:
        kill_recorded_group(record)
    try:
        return int(paths.exit_code.read_text(encoding="utf-8") or 1)
    except FileNotFoundError:
        return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
