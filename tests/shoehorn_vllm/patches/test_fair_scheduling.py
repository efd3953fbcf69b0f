"""The scheduler before each step: places, long prompts, and the order of prompts that are being read."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch about itself
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.request_queue import PriorityRequestQueue, SchedulingPolicy
    from vllm.v1.request import RequestStatus

    from shoehorn_vllm.patches import fair_scheduling

pytestmark = pytest.mark.contract


class Waiting(SimpleNamespace):
    """A request as the queue compares it."""

    def __lt__(self, other: Any) -> bool:
        return bool(self.priority < other.priority)


def request(priority: int, *, reading: bool = False, tokens: int = 50,
            status: RequestStatus = RequestStatus.WAITING) -> Any:
    return Waiting(priority=priority, arrival_time=float(priority), is_prefill_chunk=reading, num_tokens=tokens,
                   status=status)


def step(running: list[Any], waiting: list[Any], **more: Any) -> tuple[list[int], list[int], int]:
    """Run one step; returns the priorities of preempted and of running requests, and the limit during the step."""
    queue, preempted, limits = PriorityRequestQueue(), list[int](), list[int]()
    for each in waiting:
        queue.add_request(each)
    scheduler: Any = SimpleNamespace(**{
        "policy": SchedulingPolicy.PRIORITY, "_pause_state": PauseState.UNPAUSED, "running": running, "waiting": queue,
        "max_num_active_reqs": 3, "max_num_scheduled_tokens": 1000, "requires_kv_delivery": False,
        "scheduler_config": SimpleNamespace(long_prefill_token_threshold=0),
        "_request_blocks_can_be_freed": lambda _request: True,
        "_preempt_request": lambda each, _time, **_more: preempted.append(each.priority), **more})
    fair_scheduling._schedule(
        lambda its: limits.append(its.scheduler_config.long_prefill_token_threshold), scheduler)
    assert scheduler.scheduler_config.long_prefill_token_threshold == 0, "for this step only"
    return preempted, [each.priority for each in scheduler.running], limits[0]


def test_last_running_request_leaves_its_place_to_one_that_is_far_ahead() -> None:
    places = [0, 900, 300]
    assert step([request(place) for place in places], [request(10)]) == ([900], [0, 300], 0)
    assert step([request(place) for place in places], [request(900 - fair_scheduling.MARGIN + 1)])[0] == []
    assert step([request(place) for place in places], []) == ([], places, 0)
    assert step([request(0), request(900)], [request(10)])[0] == [], "a place is free"
    blocked = request(10, status=RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR)
    assert step([request(place) for place in places], [blocked])[0] == []


def test_long_prompts_leave_tokens_to_a_waiting_one_and_are_read_in_order() -> None:
    running = [request(900, reading=True), request(700, reading=True)]
    assert step(list(running), [request(0)]) == ([], [700, 900], (1000 - 50 - 2) // 2)
    assert step(list(running), [request(0, tokens=10**6)])[2] == (1000 - 500 - 2) // 2
    assert step(list(running), [request(850)])[2] == 0
    assert step([request(900), request(700)], [request(0)])[2] == 0, "no prompt is being read"
    assert step([request(900, reading=True), request(950), request(5, reading=True)], [])[1] == [950, 5, 900]


def test_other_policy_and_paused_engine_are_left_alone() -> None:
    for more in ({"policy": SchedulingPolicy.FCFS}, {"_pause_state": PauseState.PAUSED_NEW}):
        running = [request(900, reading=True), request(5, reading=True), request(7)]
        assert step(running, [request(0)], **more) == ([], [900, 5, 7], 0)
