"""Fork server of the engine: imports vLLM once, during the plan and the pull, and starts each engine from that import.

Rules:
- it is begun before the plan, with the environment that does not depend on the plan; if the plan needs other values of
  variables that were read during the import, vLLM is imported again with these;
- where it cannot be used, the engine is started as a fresh program: slower, otherwise the same;
- while the engine serves it waits as a spare for the next start, unless the host is short of memory; most of its memory
  is shared with the engine's processes;
- its death does not end the engine.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shoehorn.common.units import GIB, format_size
from shoehorn.engine.forked_process import ForkedProcess
from shoehorn.engine.launch_spec import LaunchSpec
from shoehorn.hardware import host
from shoehorn.runtime import programs
from shoehorn.runtime.child_process import Child, Start, command
from shoehorn.runtime.run_dir import RunDir
from shoehorn_vllm.fork_server import messages

log = logging.getLogger("engine")

SPARE_FREE_BYTES = GIB
"""Available host memory below which no spare is kept; with twice as much a new one is made."""

_CHECK_SECONDS = 10.0
_ANSWER_SECONDS = 30.0


class ForkServer:
    """The fork server of one engine program, a context.

    Args:
        on_line: gets each line that it prints while it imports vLLM.
        available_bytes: returns the available host memory.
        is_used: False starts every engine as a fresh program.
    """

    def __init__(self, run_dir: RunDir, on_line: Callable[[str], None],
                 available_bytes: Callable[[], int] = lambda: host.memory(Path("/"), [])[1], *,
                 is_used: bool = True) -> None:
        self._is_used = is_used
        self._record, self._on_line, self._available_bytes = run_dir.fork_server_group, on_line, available_bytes
        self._child: Child | None = None
        self._control: socket.socket | None = None
        self._environment: Mapping[str, str] = {}
        self._checked_at = time.monotonic()
        self.import_seconds: float | None = None

    @property
    def is_running(self) -> bool:
        """True while there is a server, which may still import vLLM."""
        return self._child is not None and self._child.poll() is None

    def begin(self, environment: Mapping[str, str]) -> None:
        """Start to import vLLM with this environment, unless a server runs; does not wait."""
        if self.is_running or not self._is_used:
            return
        self.stop()
        self._environment, self.import_seconds = dict(environment), None
        self._control, theirs = messages.connect()
        words = [sys.executable, "-m", programs.FORK_SERVER, str(theirs.fileno())]
        with theirs:
            self._child = Child(command(words, environment, [theirs.fileno()]), self._on_line, self._record)

    def launch(self, spec: LaunchSpec, on_line: Callable[[str], None]) -> Child:
        """Start an engine: forked, or as a fresh program where that is impossible."""
        for _ in range(2 if self._is_used else 0):
            self.begin(spec.environment)
            try:
                self._wait_for_import()
                return Child(self._fork(spec), on_line, spec.run_dir.engine_group)
            except _ChangedError as changed:
                log.info("Importing vLLM again changed_variables=%s", changed)
                self.stop()
            except _UnusableError as error:
                log.warning("Starting the engine without the fork server reason=%s", error)
                break
        self.stop()
        return Child(command(spec.command, spec.environment), on_line, spec.run_dir.engine_group)

    def keep_spare(self) -> None:
        """Replace a dead server while the engine serves, or stop it if the host is short of memory."""
        if time.monotonic() - self._checked_at < _CHECK_SECONDS:
            return
        self._checked_at = time.monotonic()
        available = self._available_bytes()
        if self.is_running and available < SPARE_FREE_BYTES:
            log.info("Stopping the spare of the engine available_memory=%s", format_size(available))
            self.stop()
        elif self._environment and not self.is_running and available >= 2 * SPARE_FREE_BYTES:
            log.info("Making a spare of the engine available_memory=%s", format_size(available))
            self.begin(self._environment)

    def stop(self) -> None:
        """Kill the server, but not its engine."""
        if self._child is not None:
            self._child.stop(0.0)
        if self._control is not None:
            self._control.close()
        self._child = self._control = None

    def _wait_for_import(self) -> None:
        if self.import_seconds is not None:
            return
        message = self._receive(None)
        if "ready" not in message:
            raise _UnusableError(message.get("unusable", "unknown"))
        self.import_seconds = float(message["ready"])
        log.info("vLLM imported seconds=%.1f", self.import_seconds)

    def _fork(self, spec: LaunchSpec) -> Start:
        def start() -> ForkedProcess:
            data, lifeline = os.pipe()
            status, theirs = os.pipe()
            output, written = os.pipe()
            order = {"serve": spec.arguments, "environment": dict(spec.environment)}
            try:
                self._send(order, [data, theirs, written])
                answer = self._receive(_ANSWER_SECONDS)
                if "pid" not in answer:
                    raise _ChangedError(",".join(answer["changed"]))
            except _Error:
                for descriptor in (lifeline, status, output):
                    os.close(descriptor)
                raise
            finally:
                for descriptor in (data, theirs, written):
                    os.close(descriptor)
            return ForkedProcess(answer["pid"], status, lifeline,
                                 os.fdopen(output, encoding="utf-8", errors="replace"), self.stop)

        return start

    def _send(self, message: Mapping[str, object], descriptors: list[int]) -> None:
        try:
            messages.send(self._connection(), message, descriptors)
        except OSError as error:
            raise _UnusableError(f"order not sent: {error.strerror}") from error

    def _receive(self, seconds: float | None) -> dict[str, Any]:
        control = self._connection()
        control.settimeout(seconds)
        try:
            return messages.receive(control)[0]
        except EOFError:
            raise _UnusableError("it exited") from None
        except OSError as error:
            raise _UnusableError(str(error)) from error

    def _connection(self) -> socket.socket:
        if self._control is None:
            raise _UnusableError("it was stopped")
        return self._control


class _Error(Exception):
    """An engine cannot be forked."""


class _UnusableError(_Error):
    """The fork server is unusable."""


class _ChangedError(_Error):
    """The environment differs from that of the import; the message names the variables."""
