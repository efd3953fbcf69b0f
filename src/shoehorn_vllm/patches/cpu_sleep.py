"""A mend of the engine on a CPU: a process that waits for another one sleeps, and does not spin.

vLLM's engine core and its workers wait for each other in a loop around `sched_yield`. On a CPU that takes a core away
from the threads that compute; and Linux 6.18 counts every such call as a whole time slice used, so that whatever shares
the core with a spinning process is scheduled by a clock that has run away: an idle API server was seen to wait 23 s for
its turn, and any other process on the machine 13 s. On a GPU the loop stays: there a core to spare is the rule.

Source: vLLM 0.32.0, distributed/device_communicators/shm_broadcast.py, SpinCondition.wait and acquire_write; Linux
6.18, kernel/sched/fair.c, yield_task_fair.
"""

from __future__ import annotations

import time

from vllm.distributed.device_communicators import shm_broadcast
from vllm.platforms import current_platform

_SECONDS = 1e-5  # some 60 us in fact, of a step's milliseconds


def apply() -> None:
    """Mend the waiting of this process."""
    if current_platform.is_cpu():
        shm_broadcast.sched_yield = _sleep  # type: ignore[attr-defined]  # it imports that name for itself


def _sleep() -> None:
    time.sleep(_SECONDS)
