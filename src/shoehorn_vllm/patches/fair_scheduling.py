"""Patch: priority scheduling gives a waiting request of a higher priority its share of sequences and of each batch.

vLLM's priority scheduling orders the waiting requests, and preempts the last one when the KV cache is full. A request
that waits for one of `max-num-seqs` places still waits until a running one ends: a few long streams of one client fill
all places of an engine with offloaded weights for an hour. And running requests take their tokens of a batch first: a
long prompt takes whole batches until it is read, and a short prompt of another client waits.

Before each step, if a waiting request is ahead of a running one by more than `MARGIN` tokens:
- with all places taken, the last running request is preempted: it returns to the queue with its tokens and is resumed;
- otherwise long prompts that are being read leave the tokens of the waiting prompt free in this batch, at most a half.
Prompts that are being read take their tokens in the order of priority, after all requests that generate.

Priorities are tokens (`api.fairness`), lower is earlier. They replace that of the request, which a client could set.

Source: vLLM 0.32.0, v1/core/sched/scheduler.py, Scheduler.schedule: `while req_index < len(self.running)`,
`if num_running >= self.max_num_active_reqs`, and `_preempt_request`, which `reset_prefix_cache` also calls between
steps; v1/engine/async_llm.py, AsyncLLM.add_request.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.request import RequestStatus

from shoehorn_vllm.api.meter import CURRENT
from shoehorn_vllm.patches.patch import Patch

MARGIN = 128
"""Tokens by which a waiting request must be ahead: less is not worth a preemption."""


def apply() -> None:
    """Patch this process."""
    for patch in PATCHES:
        patch.apply()


def _add_request(original: Callable[..., Any], engine: AsyncLLM, *arguments: Any, **named: Any) -> Any:
    meter = CURRENT.get()
    is_ordered = engine.scheduler_config.policy == "priority" and meter is not None
    return original(engine, *arguments, **{**named, "priority": meter.priority if is_ordered and meter else 0})


def _schedule(original: Callable[..., Any], scheduler: Scheduler, *arguments: Any, **named: Any) -> Any:
    if scheduler.policy != SchedulingPolicy.PRIORITY or scheduler._pause_state != PauseState.UNPAUSED:
        return original(scheduler, *arguments, **named)
    scheduler.running.sort(key=lambda request: request.priority if request.is_prefill_chunk else -math.inf)
    threshold = scheduler.scheduler_config.long_prefill_token_threshold
    if first := _first_waiting(scheduler):
        if len(scheduler.running) >= scheduler.max_num_active_reqs:
            _free_place(scheduler, first)
        elif limit := _limit_of_long_prompts(scheduler, first):
            scheduler.scheduler_config.long_prefill_token_threshold = min(threshold or limit, limit)
    try:
        return original(scheduler, *arguments, **named)
    finally:
        scheduler.scheduler_config.long_prefill_token_threshold = threshold


def _first_waiting(scheduler: Scheduler) -> Any:
    """The first request of the queue if it can start now; else None."""
    if not scheduler.waiting:
        return None
    first = scheduler.waiting.peek_request()
    return first if first.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED) else None


def _free_place(scheduler: Scheduler, first: Any) -> None:
    last = max(scheduler.running, key=lambda request: (request.priority, request.arrival_time))
    if first.priority + MARGIN <= last.priority and scheduler._request_blocks_can_be_freed(last):
        scheduler.running.remove(last)
        scheduler._preempt_request(last, time.monotonic(), drop_stale_output=scheduler.requires_kv_delivery)


def _limit_of_long_prompts(scheduler: Scheduler, first: Any) -> int:
    """Tokens that each prompt may take of this batch so that the waiting one can start; 0 for no limit."""
    reading = [request for request in scheduler.running if request.is_prefill_chunk]
    if not reading or first.priority + MARGIN > reading[-1].priority:
        return 0
    budget: int = scheduler.max_num_scheduled_tokens
    reserve: int = min(first.num_tokens, budget // 2) + len(scheduler.running)
    return max(1, (budget - reserve) // len(reading))


PATCHES = (Patch(AsyncLLM, "add_request", _add_request), Patch(Scheduler, "schedule", _schedule))
