"""supervisord's event listener: stops the container when it can no longer serve, and kills remains of dead programs.

Rules:
- the engine's exit with one of its own codes is final, as is any program that supervisord gave up (FATAL): supervisord
  gets SIGTERM, and the container exits with the code in `exit_code`;
- the process group of a program that died otherwise is killed: nginx's workers would keep the port occupied;
- when supervisord was killed, nginx is killed too: unlike the other programs it does not watch its parent.
Protocol: http://supervisord.org/events.html (a line of headers, then `len` bytes, answered by RESULT).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from shoehorn.runtime.child_process import kill_group
from shoehorn.runtime.run_dir import RunDir


def handle(headers: Mapping[str, str], body: Mapping[str, str], run_dir: Path) -> bool:
    """Handle one event; returns True when supervisord must stop.

    Args:
        headers: of the event; `eventname` is used.
        body: `processname`, and for an exit `expected` (0 or 1) and `pid`.
    """
    name = body.get("processname", "?")
    if headers.get("eventname") == "PROCESS_STATE_FATAL":
        _log(f"program failed permanently, stopping the container: program={name}")
        _default_code(run_dir, 1)
        return True
    if name == "engine" and body.get("expected") == "1":
        _default_code(run_dir, 1)
        return True
    kill_group(int(body.get("pid", "0")))
    _log(f"program exited, restarting it: program={name}")
    return False


def run(source: TextIO, sink: TextIO, run_dir: Path, supervisor: int) -> None:
    """Answer events until supervisord, whose process id is `supervisor`, was killed; then kill nginx."""
    with suppress(BrokenPipeError, ProcessLookupError):  # supervisord was killed before the answer
        _answer(source, sink, run_dir, supervisor)
    _kill_gateway(run_dir)


def _answer(source: TextIO, sink: TextIO, run_dir: Path, supervisor: int) -> None:
    """Answer events until `source` ends."""
    while True:
        sink.write("READY\n")
        sink.flush()
        line = source.readline()
        if not line:
            return
        headers = _pairs(line)
        body = _pairs(source.read(int(headers.get("len", "0"))))
        if handle(headers, body, run_dir):
            os.kill(supervisor, signal.SIGTERM)
        sink.write("RESULT 2\nOK")
        sink.flush()


def _kill_gateway(run_dir: Path) -> None:
    try:
        group = int(RunDir(run_dir).nginx_pid.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # nginx did not start
        return
    kill_group(group)


def _pairs(text: str) -> dict[str, str]:
    return dict(word.split(":", 1) for word in text.split() if ":" in word)


def _default_code(run_dir: Path, code: int) -> None:
    path = RunDir(run_dir).exit_code
    if not path.exists():
        try:
            path.write_text(f"{code}\n", encoding="utf-8")
        except OSError as error:  # the container stops all the same, and an empty file counts as a failure
            _log(f"cannot write the exit code: path={path} error={error.strerror}")


def _log(message: str) -> None:
    print(f"shoehorn: {message}", file=sys.stderr, flush=True)  # stdout belongs to the protocol


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the kernel sends it to stopped processes when supervisord is killed
    run(sys.stdin, sys.stdout, Path(sys.argv[1]), os.getppid())
