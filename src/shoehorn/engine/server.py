"""Supervision of vLLM: runs it, and restarts it after failures while the budget lasts.

Rules: a failure that the same start would repeat (`Diagnosis.final`) is not retried; a start that runs out of memory is
left to the caller, which may start with a smaller plan.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from shoehorn.common.errors import EngineFailedError
from shoehorn.engine import idle
from shoehorn.engine.diagnosis import Diagnosis
from shoehorn.engine.engine_run import EngineRun
from shoehorn.engine.fork_server import ForkServer
from shoehorn.engine.group import Group
from shoehorn.engine.launch_spec import LaunchSpec
from shoehorn.engine.restart_budget import RestartBudget
from shoehorn.runtime.state import Phase, StateFile

log = logging.getLogger("engine")


_OF_THE_MODEL = ("killed", "bad_parser", "missing_tokenizer", "bad_weights", "weights_mismatch", "remote_code_required")
"""Failures that a start without draft tokens repeats."""


class StartFailedError(EngineFailedError):
    """Engine start failed; a smaller plan, another dtype or no draft tokens may succeed."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        super().__init__(diagnosis.cause, diagnosis.remedy, code=diagnosis.name)
        self.diagnosis = diagnosis


class EngineServer:
    """The vLLM API server of this container.

    Args:
        fork_server: starts the engine.
        on_ready: called before each readiness is published.
        group: machines that serve together; None for one machine.
    """

    def __init__(self, spec: LaunchSpec, fork_server: ForkServer, states: StateFile, budget: RestartBudget,
                 on_ready: Callable[[], None], group: Group | None = None) -> None:
        self._spec, self._fork_server, self._states, self._budget = spec, fork_server, states, budget
        self._on_ready, self._group = on_ready, group

    def serve(self) -> None:
        """Serve until an exception ends it, usually the caller's own on SIGTERM.

        Raises:
            StartFailedError: the engine did not become ready, and a smaller plan may succeed.
            EngineFailedError: a restart would fail the same way, or the restart budget is exhausted.
        """
        while True:
            self._budget.require()
            if self._group:
                self._group.wait_until_agreed()
                self._states.update(phase=Phase.LOADING, progress=None, detail="starting the engine")
            run = EngineRun(self._spec, self._fork_server, self._states, self._on_ready, self._group)
            result = run.follow()
            if result is None:
                idle.wait_for_request(self._states, self._spec.timing.tick)
            elif self._group and (loss := self._group.explain(result.diagnosis)):
                self._count(loss)  # not in the budget: the engine did not fail
                log.warning("%s", loss.cause)
                self._group.regroup(loss)
            else:
                self._count(result.diagnosis)
                if not result.was_ready and self._may_step_down(result.diagnosis):
                    raise StartFailedError(result.diagnosis)
                self._restart_after(result.diagnosis, run)
            self._spec = replace(self._spec, earlier_seconds={})

    def _count(self, diagnosis: Diagnosis) -> None:
        failures = self._states.read().failures
        self._states.update(failures={**failures, diagnosis.name: failures.get(diagnosis.name, 0) + 1})

    def _may_step_down(self, diagnosis: Diagnosis) -> bool:
        return bool(diagnosis.limits) or diagnosis.memory or diagnosis.name == "unsupported_dtype" or (
            self._spec.may_drop_speculation and diagnosis.name not in _OF_THE_MODEL)

    def _restart_after(self, diagnosis: Diagnosis, run: EngineRun) -> None:
        """Record the failure and pause before the next start.

        Raises:
            EngineFailedError: no further start is allowed.
        """
        failures = self._budget.record()
        if diagnosis.final or self._budget.is_exhausted:
            run.output.print_tail()
            raise EngineFailedError(diagnosis.cause, diagnosis.remedy, code=diagnosis.name)
        delay = self._spec.timing.restart_delay(failures)
        log.warning("%s Restarting engine in_seconds=%.0f failures=%d", diagnosis.cause, delay, failures)
        self._states.update(phase=Phase.LOADING, progress=None, detail="starting the engine again",
                            cause=diagnosis.cause, remedy=diagnosis.remedy,
                            restarts=self._states.read().restarts + 1, engine_down=True)
        time.sleep(delay)
        self._states.update(engine_down=False)
