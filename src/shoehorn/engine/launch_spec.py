"""Everything that one start of vLLM needs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shoehorn.engine.timing import Timing
from shoehorn.model.task import Task
from shoehorn.runtime import programs
from shoehorn.runtime.run_dir import RunDir


@dataclass(frozen=True)
class LaunchSpec:
    """One start of vLLM.

    Attributes:
        run_dir: with the configuration, socket and logs.
        environment: the complete environment of the engine.
        model: the name that it serves.
        options: vLLM's options, which the readiness check exercises.
        task: what the model is for, which the readiness check proves.
        log_file: file for the engine's output; None sends it to standard output.
        drain_seconds: time limit for running requests when serving ends.
        is_replica: a front sends the requests (`drain.announce`).
        idle_seconds: time without requests after which the engine is stopped; None: never.
        may_drop_speculation: after a failed start, a start without draft tokens may succeed.
        timing: waits of the engine program.
        earlier_seconds: of the parts of this start before the engine, by name (`start_times`).
    """

    run_dir: RunDir
    environment: Mapping[str, str] = field(repr=False)
    model: str
    options: Mapping[str, object]
    task: Task = Task.GENERATE
    log_file: Path | None = None
    drain_seconds: int = 60
    is_replica: bool = False
    idle_seconds: int | None = None
    may_drop_speculation: bool = False
    timing: Timing = field(default_factory=Timing)
    earlier_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """Arguments of vLLM's API server."""
        return ["--config", str(self.run_dir.engine_config)]

    @property
    def command(self) -> list[str]:
        """Command line of vLLM's API server."""
        return [sys.executable, "-m", programs.VLLM, *self.arguments]
