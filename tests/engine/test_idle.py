"""Watch for idle time: only a quiet engine that answers is idle."""

from __future__ import annotations

import httpx
import pytest

from shoehorn.config.setting_values import idle_time
from shoehorn.engine.idle import IdleWatch
from shoehorn_vllm.protocol import ACTIVITY_PATH


class Time:
    """Monotonic seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def watch(answer: httpx.Response | Exception, limit: int | None = 60) -> tuple[IdleWatch, Time]:
    def handle(request: httpx.Request) -> httpx.Response:
        assert request.url.path == ACTIVITY_PATH
        if isinstance(answer, Exception):
            raise answer
        return answer

    clock = Time()
    return IdleWatch(httpx.Client(transport=httpx.MockTransport(handle)), limit, 5.0, clock), clock


@pytest.mark.parametrize(("answer", "over"), [
    (httpx.Response(200, json={"running": 0, "idle_seconds": 60.0}), True),
    (httpx.Response(200, json={"running": 0, "idle_seconds": 59.9}), False),
    (httpx.Response(200, json={"running": 1, "idle_seconds": 600.0}), False),
    (httpx.Response(200, json=[]), False), (httpx.Response(500, text="no"), False),
    (httpx.ConnectError("gone"), False)])
def test_engine_is_idle_after_the_time_without_requests(answer: httpx.Response | Exception, over: bool) -> None:
    its, clock = watch(answer)
    clock.now = 60.0
    assert its.is_over() is over


def test_time_begins_with_readiness_and_off_never_ends() -> None:
    quiet = httpx.Response(200, json={"running": 0, "idle_seconds": 10**6})
    its, clock = watch(quiet)
    clock.now = 59.0
    assert not its.is_over(), "loading took longer than the limit"
    its, clock = watch(quiet, None)
    clock.now = 10.0**9
    assert not its.is_over()


@pytest.mark.parametrize(("text", "seconds"), [("off", None), ("90s", 90), ("30m", 1800), ("2h", 7200)])
def test_idle_time_is_parsed(text: str, seconds: int | None) -> None:
    assert idle_time(text) == seconds


@pytest.mark.parametrize("text", ["30", "0m", "-1m", "m", "1d", "yes", "1.5h", "30 m"])
def test_invalid_idle_time_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="30m"):
        idle_time(text)
