"""supervisord's event listener: ends the container when it can no longer serve, and clears what a dead program left.

Rules:
- the engine's exit with one of its own codes is final, as is any program that supervisord gave up (FATAL): supervisord
  gets SIGTERM, and `supervise` returns the code that stands in `exit_code`;
- the process group of a program that died otherwise is ended, so that nginx's workers do not hold the port against
  their successor;
- when supervisord was killed nginx is ended too: unlike the other programs it does not look after its parent.
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

from shoehorn.runtime.child_process import end_group
from shoehorn.runtime.run_dir import RunDir


def handle(headers: Mapping[str, str], body: Mapping[str, str], run_dir: Path) -> bool:
    """React to one event; returns True when supervisord is to end.

    Args:
        headers: of the event; `eventname` counts.
        body: `processname`, and for an exit `expected` (0 or 1) and `pid`.
    """
    name = body.get("processname", "?")
    if headers.get("eventname") == "PROCESS_STATE_FATAL":
        _say(f"{name} cannot be kept running; the container ends")
        _default_code(run_dir, 1)
        return True
    if name == "engine" and body.get("expected") == "1":
        _default_code(run_dir, 1)
        return True
    end_group(int(body.get("pid", "0")))
    _say(f"{name} ended and is started again")
    return False


def run(source: TextIO, sink: TextIO, run_dir: Path, supervisor: int) -> None:
    """Answer events until supervisord, whose process id is `supervisor`, was killed: then end nginx."""
    with suppress(BrokenPipeError, ProcessLookupError):  # it was killed before it could be answered
        _answer(source, sink, run_dir, supervisor)
    _end_gateway(run_dir)


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


def _end_gateway(run_dir: Path) -> None:
    try:
        group = int(RunDir(run_dir).nginx_pid.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it did not start
        return
    end_group(group)


def _pairs(text: str) -> dict[str, str]:
    return dict(word.split(":", 1) for word in text.split() if ":" in word)


def _default_code(run_dir: Path, code: int) -> None:
    path = RunDir(run_dir).exit_code
    if not path.exists():
        try:
            path.write_text(f"{code}\n", encoding="utf-8")
        except OSError as error:  # the container ends all the same, and an empty file means that it failed
            _say(f"cannot write {path}: {error.strerror}")


def _say(message: str) -> None:
    print(f"shoehorn: {message}", file=sys.stderr, flush=True)  # stdout belongs to the protocol


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # from the kernel, to who is stopped while supervisord is killed
    run(sys.stdin, sys.stdout, Path(sys.argv[1]), os.getppid())
