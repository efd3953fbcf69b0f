"""Priorities: a flood of one key delays neither another key nor itself without end."""

from __future__ import annotations

import asyncio
import json

from shoehorn_vllm.api.fairness import ANSWER_TOKENS, HALF_LIFE_SECONDS, FairShare, Turn, expected_tokens
from shoehorn_vllm.api.meter import CURRENT
from support.gate_calls import Engine, error, run, settled


def begin(order: FairShare, key: str, count: int = 1, expected: int = 100, now: float = 0.0) -> list[Turn]:
    return [order.begin(key, expected, now) for _ in range(count)]


def priorities(turns: list[Turn]) -> list[int]:
    return [turn.priority for turn in turns]


def test_single_request_is_ahead_of_a_flood() -> None:
    order = FairShare()
    flood = begin(order, "flood", 50)
    assert priorities(flood) == [100 * number for number in range(50)]
    assert priorities(begin(order, "single")) == [0]
    for turn in flood[:10]:  # answers longer than expected
        turn.add(5000)
        order.end("flood", turn, 1.0)
    assert priorities(begin(order, "third")) == [0], "as the earliest running request, of the key `single`"
    assert begin(order, "flood")[0].priority >= 10 * 5000 - 100


def test_two_keys_alternate_by_tokens() -> None:
    order = FairShare()
    waiting = [("a", turn) for turn in begin(order, "a", 20)] + [("b", turn) for turn in begin(order, "b", 5, 400)]
    served: dict[str, int] = {"a": 0, "b": 0}
    for key, turn in sorted(waiting, key=lambda item: item[1].priority)[:15]:
        served[key] += 100 if key == "a" else 400
        order.end(key, turn, 0.0)
    assert abs(served["a"] - served["b"]) <= 400


def test_requests_of_one_key_keep_their_order_when_answers_are_short() -> None:
    order = FairShare()
    turns = begin(order, "a", 10)
    for turn in turns[:8]:
        order.end("a", turn, 0.0)
    assert begin(order, "a")[0].priority >= turns[-1].priority


def test_waiting_request_is_overtaken_by_bounded_tokens_only() -> None:
    order = FairShare()
    begin(order, "a", 10)
    last = begin(order, "a")[0]
    overtaking = 0
    for _ in range(100):
        turn = begin(order, "b")[0]
        overtaking += turn.priority < last.priority
        turn.add(100)
        order.end("b", turn, 0.0)
    assert overtaking <= 11


def test_lead_is_forgotten_by_half_in_a_minute_and_idle_server_forgets_all() -> None:
    order = FairShare()
    begin(order, "b")
    heavy = begin(order, "a", 1, 1000)[0]
    heavy.add(1000)
    order.end("a", heavy, 0.0)
    assert begin(order, "a", now=HALF_LIFE_SECONDS)[0].priority == 500
    order = FairShare()
    order.end("a", begin(order, "a", 1, 1000)[0], 0.0)
    assert begin(order, "a")[0].priority == 0


def test_unused_tokens_are_given_back() -> None:
    order = FairShare()
    begin(order, "b")
    short = begin(order, "a", 1, 1000)[0]
    short.add(40)
    order.end("a", short, 0.0)
    assert begin(order, "a")[0].priority == 40


def test_expected_tokens_follow_length_answers_and_maximum() -> None:
    assert expected_tokens(b"x" * 400, {"max_tokens": 7}, 3) == 100 + 21
    assert expected_tokens(b"", {"max_tokens": 10**9}, 1) == ANSWER_TOKENS
    assert expected_tokens(b"", {"max_tokens": -5, "max_output_tokens": "x"}, 1) == 1
    assert expected_tokens(b"x" * 8, None, 1) == 2 + ANSWER_TOKENS


def test_middleware_gives_the_engine_the_priority_of_the_key_whatever_the_body_says() -> None:
    seen: list[int] = []

    async def test(engine: Engine) -> None:
        application = engine.gate._app

        async def record(scope: object, receive: object, send: object) -> None:
            meter = CURRENT.get()
            assert meter
            seen.append(meter.priority)
            await application(scope, receive, send)  # type: ignore[arg-type]

        engine.gate._app = record
        body = json.dumps({"priority": -(10**9), "max_tokens": 100}).encode()
        calls = [engine.call(body=body, key="flood") for _ in range(3)] + [engine.call(body=body, key="single")]
        await settled()
        engine.go.set()
        await asyncio.gather(*(call.answer() for call in calls))

    run(test)
    assert (seen[0], seen[3]) == (0, 0)
    assert 0 < seen[1] < seen[2]


def test_full_queue_admits_a_key_below_its_share() -> None:
    async def test(engine: Engine) -> None:
        flood = [engine.call(key="flood") for _ in range(4)]
        await settled()
        status, _, body = await engine.call(key="flood").answer()
        assert (status, error(body)["code"]) == (429, "queue_full")
        single = [engine.call(key="single") for _ in range(2)]
        await settled()
        assert (await engine.call(key="single").answer())[0] == 429, "half of the queue for each of two keys"
        engine.go.set()
        assert [(await call.answer())[0] for call in [*flood, *single]] == [200] * 6

    run(test, max_requests=4)
