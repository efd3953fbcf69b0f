"""CPU patch: sleep instead of busy-waiting on shared-memory queues.

vLLM's engine core and its workers wait for each other in a loop around `sched_yield`. On a CPU that takes a core away
from the threads that compute. Linux 6.18 also charges every such call as a whole time slice, so that other processes on
the same core are starved: an idle API server waited 23 s for its turn, and other processes 13 s. On a GPU the loop
stays, since such machines have cores to spare.

Source: vLLM 0.32.0, distributed/device_communicators/shm_broadcast.py, SpinCondition.wait and acquire_write; Linux
6.18, kernel/sched/fair.c, yield_task_fair.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm.distributed.device_communicators import shm_broadcast
from vllm.platforms import current_platform

from shoehorn_vllm.patches.patch import Patch

_SLEEP_SECONDS = 1e-5  # about 60 us in practice, of a step's milliseconds


def apply() -> None:
    """Patch this process on a CPU."""
    if current_platform.is_cpu():
        PATCH.apply()


def _sleep(_sched_yield: Callable[[], None]) -> None:
    time.sleep(_SLEEP_SECONDS)


PATCH = Patch(shm_broadcast, "sched_yield", _sleep)
