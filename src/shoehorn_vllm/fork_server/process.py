"""Start of vLLM's processes by the fork server, with the pickles of `multiprocessing`'s own fork server.

vLLM asks `multiprocessing` for the start method `spawn`. In a process that was forked by the fork server, this method
forks from it too. A fresh interpreter is started, as without the server, where that is impossible: the environment of
the import does not fit, the executable is another one (NUMA binding), or the server was killed.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import sys
import threading
from multiprocessing import (
    context,
    forkserver,
    popen_forkserver,
    popen_spawn_posix,
    reduction,
    resource_tracker,
    spawn,
    util,
)
from multiprocessing.connection import wait
from typing import Any

from shoehorn_vllm.fork_server import messages

log = logging.getLogger("vllm.shoehorn")

_UNKNOWN_STATUS = 255
"""Status of a process whose fork server was killed, as `multiprocessing` has it."""


def fork_processes_from(connection: socket.socket) -> None:
    """Let the start method `spawn` of this process fork from the server behind `connection`."""
    lock = threading.Lock()

    def start(process: Any) -> Any:
        if spawn.get_executable() in (sys.executable, os.fsencode(sys.executable)):
            try:
                with lock:
                    return _ForkedPopen(process, connection)
            except _UnavailableError as error:
                log.warning("Starting a fresh process, not a forked one process=%s reason=%s", process.name, error)
        return popen_spawn_posix.Popen(process)

    context.SpawnProcess._Popen = staticmethod(start)  # type: ignore[method-assign,assignment]


def receive_process(descriptors: list[int], data: int) -> int:
    """Run the process whose pickle is in `data`, with the descriptors that it inherits; return its exit status."""
    # A tracker of its own would remove shared memory that is still in use.
    resource_tracker._resource_tracker._fd, *inherited = descriptors  # type: ignore[attr-defined]
    forkserver._forkserver._inherited_fds = inherited  # type: ignore[attr-defined]  # as its own server does
    return spawn._main(data, os.dup(data))


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class _UnavailableError(Exception):
    """The fork server cannot fork this process."""


class _ForkedPopen(popen_forkserver.Popen):
    """A running process; its parent class has `sentinel`, a pipe that is readable after the exit."""

    _fds: list[int]

    def __init__(self, process: Any, connection: socket.socket) -> None:
        self._connection = connection
        super().__init__(process)

    def _launch(self, process: Any) -> None:
        pickles = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process._name), pickles)
            reduction.dump(process, pickles)
        finally:
            context.set_spawning_popen(None)
        data, parent = os.pipe()
        self.sentinel, status = os.pipe()
        self.finalizer = util.Finalize(self, _close, (parent, self.sentinel))
        try:
            self.pid = self._order([data, status, sys.stdout.fileno(), resource_tracker.getfd() or 0, *self._fds])
        except BaseException:
            self.finalizer()
            raise
        finally:
            os.close(data)
            os.close(status)
        with open(parent, "wb", closefd=False) as pipe:
            pipe.write(pickles.getbuffer())

    def _order(self, descriptors: list[int]) -> int:
        try:
            messages.send(self._connection, {"environment": dict(os.environ)}, descriptors)
            answer, _ = messages.receive(self._connection)
        except (OSError, EOFError) as error:
            raise _UnavailableError("the fork server does not answer") from error
        if "pid" not in answer:
            raise _UnavailableError(f"environment changed since the import: {', '.join(answer['changed'])}")
        return int(answer["pid"])

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit status, or None while the process runs."""
        if self.returncode is None and wait([self.sentinel], 0 if flag == os.WNOHANG else None):
            status = messages.read_status(self.sentinel)
            self.returncode = _UNKNOWN_STATUS if status is None else status
        return self.returncode
