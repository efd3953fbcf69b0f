"""One run of the engine program: takes over from the run before, and accounts for its own end.

Rules: every end that was not requested counts in the restart budget, whatever caused it and in whatever phase: an
unexpected exception at once, a kill in the next run. So no failure restarts the program more often than the budget
allows, and the state names the cause.
"""

from __future__ import annotations

import logging
import time
import traceback
from types import TracebackType
from typing import Self

from shoehorn.common import disk
from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.errors import EXIT_DONE, EXIT_ENGINE_FAILED, EngineFailedError, ShoehornError
from shoehorn.config.settings import Settings
from shoehorn.engine.restart_budget import RestartBudget
from shoehorn.engine.timing import Timing
from shoehorn.runtime.child_process import kill_recorded_group
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, StateFile

log = logging.getLogger("engine")

EXIT_RESTART = 1
"""An exit code that is not among those of `common.errors`: supervisord restarts the program."""


class StopRequested(BaseException):
    """SIGTERM arrived. Not an Exception: only the end of the program handles it."""


class ProgramRun:
    """Context of the program's work.

    Attributes:
        budget: failures of the engine and of this program.
        exit_code: of the program, after the context has ended.
    """

    def __init__(self, settings: Settings, states: StateFile, waits: Timing) -> None:
        self._settings, self._states, self._waits = settings, states, waits
        self._paths = RunDir(settings.run_dir)
        self.budget = RestartBudget(self._paths.restarts)
        self.exit_code = EXIT_DONE

    def __enter__(self) -> Self:
        return self

    def take_over(self) -> None:
        """Terminate what a killed predecessor left, count its failure, and check the budget.

        Raises:
            EngineFailedError: the budget is exhausted.
        """
        killed = self._paths.engine_alive.exists()
        self._states.update_progress(phase=Phase.STARTING, progress=None, detail="planning",
                                     model=self._settings.served_model_name, cause="", remedy="", engine_down=False,
                                     restarts=self._states.read().restarts + killed)
        processes = [process for record in self._paths.groups for process in kill_recorded_group(record)]
        if killed:
            failures = self.budget.record()
            log.warning("The engine program was killed failures=%d terminated_processes=%d", failures, len(processes))
        self._paths.leaving_mark.unlink(missing_ok=True)
        self._paths.engine_alive.touch()
        self.budget.require()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> bool:
        """Account for the end of the work; True for an end that `exit_code` reports."""
        try:
            try:
                return self._account_for(error)
            except OSError as failure:
                return self._wait_for_disk(failure)
        except StopRequested:  # during a pause
            self._paths.engine_alive.unlink(missing_ok=True)
            self.exit_code = EXIT_DONE
            return True

    def _account_for(self, error: BaseException | None) -> bool:
        if isinstance(error, ShoehornError):
            self._fail(error)
        elif isinstance(error, OSError) and error.errno in disk.FULL:
            return self._wait_for_disk(error)
        elif isinstance(error, Exception):
            self._count_crash(error)
        elif not isinstance(error, StopRequested):
            return False
        else:
            self._paths.engine_alive.unlink(missing_ok=True)
        return True

    def _fail(self, error: ShoehornError) -> None:
        """Publish a failure after which the container stops."""
        self._states.update(phase=Phase.FAILED, progress=None, detail="", cause=error.cause, remedy=error.remedy)
        log.error("%s", error)
        write_atomic(self._paths.exit_code, f"{error.exit_code}\n")
        self.exit_code = error.exit_code

    def _count_crash(self, error: Exception) -> None:
        """Count an unexpected exception, and pause before the restart while the budget lasts."""
        log.error("%s", "".join(traceback.format_exception(error)).rstrip())
        crash = EngineFailedError(
            f"Engine program: unexpected {type(error).__name__}: {error}.",
            "Undo the latest change of settings, model or profile; otherwise report the traceback in the log.",
            code="engine_program_crashed")
        failures = self.budget.record()
        if self.budget.is_exhausted:
            self._fail(crash)
            return
        delay = self._waits.restart_delay(failures)
        log.warning("%s Restarting the engine program in_seconds=%.0f failures=%d", crash.cause, delay, failures)
        self._states.update(progress=None, detail="starting the engine again", cause=crash.cause, remedy=crash.remedy,
                            restarts=self._states.read().restarts + 1)
        time.sleep(delay)
        self._paths.engine_alive.unlink(missing_ok=True)  # the next run must not count this end again
        self.exit_code = EXIT_RESTART

    def _wait_for_disk(self, error: OSError) -> bool:
        """Wait for free disk space, then let supervisord restart the program; not a failure of the engine."""
        if error.errno not in disk.FULL:
            self.exit_code = EXIT_ENGINE_FAILED
            log.error("RUN_DIR: cannot record the end of the engine program: %s.", error)
            return True
        disk.wait_for_free_space(self._settings.run_dir, self._settings.models_dir)
        self._paths.engine_alive.unlink(missing_ok=True)
        self.exit_code = EXIT_RESTART
        return True
