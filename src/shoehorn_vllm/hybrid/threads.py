"""The kernel's threads in an engine whose whole model is on the CPU: every core, as the engine's own wait meanwhile."""

from __future__ import annotations

from vllm.logger import init_logger

from shoehorn_vllm.hybrid.kernel import cpus, library, team

logger = init_logger("vllm.shoehorn.cpu_kernel")
_allowed: list[frozenset[int]] = []


def record_cpus() -> None:
    """Record the process's CPUs before the engine pins its threads."""
    _allowed[:] = [cpus.present()]


def start() -> None:
    """Start the threads once in this process."""
    if team.current() is None:
        started = team.start(reserved=0, allowed=_allowed[0] if _allowed else None)
        team.watch(0, started.choice.allowed)
        logger.info("CPU kernel started isa=%s threads=%d cpus=%s", library.default_isa().name.lower(),
                    len(started.cpus), ",".join(map(str, started.cpus)))
