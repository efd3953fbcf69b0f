"""supervisord in this very process, with an exit code that tells the truth, and a stop that begins at once.

supervisord exits 0 whatever happened to its programs; this returns the code that the engine or the watcher left in the
run directory, and makes sure that nothing outlives it. And supervisord looks at its signals once a second only, since
Python repeats a `poll` that a signal interrupted; until then new requests would still be let in.
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
from shoehorn.runtime.child_process import end_recorded_group
from shoehorn.runtime.run_dir import RunDir


class _Alarm:
    """A pipe that every signal writes to, among the files that supervisord polls."""

    def __init__(self) -> None:
        self._reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        asyncore_25.socket_map[self._reading] = self

    def readable(self) -> bool:
        """For supervisord: it may be read."""
        return True

    def writable(self) -> bool:
        """For supervisord: it is not written to."""
        return False

    def handle_read_event(self) -> None:
        """For supervisord: empty the pipe; what the signal was, its own handler has noted."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reading, 4096)

    def handle_error(self) -> None:
        """For supervisord, while an exception is handled."""
        raise


class _Options(ServerOptions):  # type: ignore[misc]  # supervisor has no types
    def setsignals(self) -> None:
        """Where supervisord installs its handlers: after it has closed all files that it does not know."""
        super().setsignals()
        _Alarm()


def main(run_dir: Path) -> int:
    """Run supervisord with `run_dir`/supervisord.conf until it is told to end; returns the container's exit code."""
    parent_watch.own()
    supervisord.ServerOptions = _Options
    paths = RunDir(run_dir)
    supervisord.main(["-c", str(paths.supervisord_config)])
    for record in paths.groups:
        end_recorded_group(record)
    try:
        return int(paths.exit_code.read_text(encoding="utf-8") or 1)
    except FileNotFoundError:
        return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
