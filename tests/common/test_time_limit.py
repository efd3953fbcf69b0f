"""Time limit: at most one call hangs, and its late result is discarded."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from shoehorn.common.time_limit import TimeLimitedCall


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()
    _join()


def _join() -> None:
    for thread in threading.enumerate():
        if thread.name == "time-limited":
            thread.join(60)


def test_sequential_callers_get_separate_results() -> None:
    answers = iter([1, 2, 3])
    limited = TimeLimitedCall(lambda: next(answers), 60.0)
    assert [limited.get(), limited.get(), limited.get()] == [1, 2, 3]


def test_hanging_call_is_waited_for_once_and_not_repeated(release: threading.Event) -> None:
    started = []

    def call() -> int:
        started.append(1)
        release.wait()
        return len(started)

    limited = TimeLimitedCall(call, 0.5)
    begun = time.monotonic()
    assert limited.get() is None
    assert time.monotonic() - begun > 0.4
    begun = time.monotonic()
    assert [limited.get() for _ in range(50)] == [None] * 50
    assert time.monotonic() - begun < 50 * 0.5 / 2  # the limit has expired
    assert len(started) == 1


def test_late_result_is_discarded(release: threading.Event) -> None:
    ages = iter(["old", "new"])

    def call() -> str:
        age = next(ages)
        release.wait()
        return age

    limited = TimeLimitedCall(call, 0.05)
    assert limited.get() is None
    release.set()
    _join()
    limited._limit_seconds = 60.0
    assert limited.get() == "new"


def test_concurrent_callers_share_one_call(release: threading.Event) -> None:
    started = []

    def call() -> int:
        started.append(1)
        release.wait()
        return 7

    class Counted:
        """A lock that counts its releases."""

        releases, lock = 0, threading.Lock()

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.releases += 1
            self.lock.release()

    limited = TimeLimitedCall(call, 60.0)
    limited._lock = counted = Counted()  # type: ignore[assignment]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(limited.get) for _ in range(4)]
        end = time.monotonic() + 60
        while counted.releases < 4 and time.monotonic() < end:
            time.sleep(0.005)
        release.set()
        assert [answer.result() for answer in answers] == [7] * 4
    assert len(started) == 1


def test_exception_goes_to_the_hook_and_the_next_caller_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([1, 2])
    shown: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: shown.append(str(arguments.exc_value)))

    def call() -> int:
        if (answer := next(answers)) == 1:
            raise ValueError("a defect")
        return answer

    limited = TimeLimitedCall(call, 60.0)
    assert limited.get() is None
    _join()
    assert shown == ["a defect"]
    assert limited.get() == 2
