"""Used tokens and budgets of keys: counted for every end of a request, saved, and enforced."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shoehorn.runtime.usage_file import Account, Usage, UsageFiles
from shoehorn_vllm.api import budgets
from shoehorn_vllm.api.admissions import AdmissionLog
from shoehorn_vllm.api.ledger import UsageLedger
from shoehorn_vllm.api.meter import REPORT_TOKENS, Meter
from shoehorn_vllm.protocol import KeyLimits
from support.gate_calls import MESSAGES, Engine, error, run

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp()


class Clock:
    """A clock that a test sets."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_meter_counts_one_request_its_prompts_and_its_tokens() -> None:
    reports: list[Usage] = []
    meter = Meter(lambda _adapter, usage: reports.append(usage))
    meter.count_prompt("", 7)
    meter.count_prompt("", 5)
    assert reports == [Usage(1, 7, 0), Usage(0, 5, 0)]
    for _ in range(REPORT_TOKENS + 3):
        meter.count_completion(1)
    assert reports[2:] == [Usage(0, 0, REPORT_TOKENS)]
    meter.finish()
    meter.count_completion(2)
    assert reports[3:] == [Usage(0, 0, 3), Usage(0, 0, 2)]


def test_every_end_of_a_request_is_counted() -> None:
    ledger = UsageLedger(clock=Clock())

    async def test(engine: Engine) -> None:
        left, aborted = engine.call(body=b'{"stream": true}'), engine.call(key="aborted")
        await left.until(b"data: 1")
        left.left.set()
        await left.task
        assert ledger.used("phone", "day") == 3 + 2, "the client left after two tokens"
        engine.fail = True
        with pytest.raises(RuntimeError):
            await engine.call(key="broken", body=b'{"stream": true}').task
        assert ledger.used("broken", "day") == 3 + 2
        await engine.gate.drain(0)
        await aborted.answer()
        assert ledger.used("aborted", "month") == 3 + 2

    run(test, ledger=ledger)


def test_requests_of_the_appliance_itself_are_in_no_ledger() -> None:
    ledger = UsageLedger(clock=Clock())

    async def test(engine: Engine) -> None:
        engine.go.set()
        call = engine.call()
        call.scope["headers"] = []
        await call.answer()
        assert engine.registry.get_sample_value("shoehorn_tokens_total", {"key": "none", "kind": "prompt"}) == 3
        assert ledger.used("none", "day") == 0

    run(test, ledger=ledger)


@pytest.mark.parametrize(("limits", "period", "renewed", "used"), [
    ("tokens_per_day=8", "day", "2026-11-29 00:00 UTC", 8),
    ("tokens_per_month=10", "month", "2026-12-01 00:00 UTC", 16)])
def test_used_budget_is_refused_with_its_renewal(limits: str, period: str, renewed: str, used: int,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)

    async def test(engine: Engine) -> None:
        engine.go.set()
        for _ in range(used // 8):  # a running answer is completed
            assert (await engine.call(limits=limits).answer())[0] == 200
        status, headers, body = await engine.call(limits=limits).answer()
        assert (status, error(body)["type"], error(body)["code"]) == (429, "rate_limit_error", "insufficient_quota")
        assert f"{used} of {limits.split('=')[1]} tokens per {period}" in error(body)["message"]
        assert renewed in error(body)["message"]
        assert headers[b"x-should-retry"] == b"false"
        wait = int(headers[b"retry-after"])
        document = json.loads((await engine.call(MESSAGES, limits=limits).answer())[2])
        assert (document["type"], document["error"]["type"]) == ("error", "rate_limit_error")
        assert (await engine.call(limits=limits, key="other").answer())[0] == 200
        assert engine.count("insufficient_quota") == 2
        clock.now += wait - 1
        assert (await engine.call(limits=limits).answer())[0] == 429
        clock.now += 1
        assert (await engine.call(limits=limits).answer())[0] == 200

    run(test, ledger=UsageLedger(clock=clock))


def test_budgets_are_metrics_while_a_key_has_them() -> None:
    async def test(engine: Engine) -> None:
        engine.go.set()
        labels = {"key": "phone", "period": "day"}
        await engine.call(limits="tokens_per_day=100").answer()
        assert engine.registry.get_sample_value("shoehorn_tokens_limit", labels) == 100
        await engine.call().answer()
        assert engine.registry.get_sample_value("shoehorn_tokens_limit", labels) is None

    run(test)


def test_ledger_survives_a_restart_and_sees_other_containers(tmp_path: Path) -> None:
    clock = Clock()
    first, second = (UsageLedger(UsageFiles(tmp_path), clock) for _ in range(2))
    first.add("alice", "m", Usage(1, 10, 5))
    second.add("alice", "m", Usage(1, 1, 1))
    first.save()
    second.save()
    first.save()
    assert first.used("alice", "day") == second.used("alice", "month") == 17
    third = UsageLedger(UsageFiles(tmp_path), clock)
    third.save()
    assert third.used("alice", "day") == 17
    clock.now += 86400
    assert (third.used("alice", "day"), third.used("alice", "month")) == (0, 17)
    clock.now += 5 * 86400
    third.add("alice", "m", Usage(1, 2, 0))
    third.save()
    assert third.used("alice", "month") == 2
    assert sum(usage.tokens for usage in UsageFiles(tmp_path).read("2026-11").values()) == 17


def test_figures_that_arrive_during_a_save_are_kept(tmp_path: Path) -> None:
    class Slow(UsageFiles):
        """A volume that answers after the next request."""

        def add(self, figures: Mapping[Account, Usage]) -> dict[str, dict[Account, Usage]]:
            ledger.add("alice", "m", Usage(1, 3, 0))
            return super().add(figures)

    ledger = UsageLedger(Slow(tmp_path), Clock())
    ledger.add("alice", "m", Usage(1, 10, 5))
    ledger.save()
    assert ledger.used("alice", "day") == 18
    ledger.save()
    assert ledger.used("alice", "day") == 21, "18 and the three of this save"


def test_failed_save_keeps_the_figures_and_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "2026-11.json"
    file.write_text("{")
    ledger = UsageLedger(UsageFiles(tmp_path), Clock())
    ledger.add("alice", "m", Usage(1, 10, 5))
    with caplog.at_level(logging.INFO):
        ledger.save()
        ledger.save()
        assert ledger.used("alice", "day") == 15
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        file.unlink()
        ledger.save()
    assert caplog.records[-1].levelname == "INFO"
    assert UsageFiles(tmp_path).read("2026-11") == {Account("2026-11-28", "alice", "m"): Usage(1, 10, 5)}


def test_budget_of_the_month_counts_days_and_no_budget_never_ends() -> None:
    ledger = UsageLedger(clock=Clock())
    ledger.add("alice", "m", Usage(1, 10**9, 0))
    assert budgets.check(ledger, "alice", KeyLimits(), NOON) is None
    failure = budgets.check(ledger, "alice", KeyLimits(tokens_per_month=10**9), NOON)
    assert failure
    assert failure.retry_seconds == math.ceil(2.5 * 86400)


def test_admissions_survive_the_process_and_leave_after_a_minute(tmp_path: Path) -> None:
    file = tmp_path / "admissions"
    log = AdmissionLog(file)
    for moment in (100.0, 130.0, 161.0):
        log.append("alice", moment)
    log.append("bob", 161.5)
    with file.open("a") as opened:
        opened.write("162.0 car")  # cut off by a kill
    assert AdmissionLog(file).read(162.0) == {"alice": [130.0, 161.0], "bob": [161.5]}
    assert AdmissionLog(tmp_path / "none").read(162.0) == {}
    assert AdmissionLog(tmp_path).read(162.0) == {}


def test_admissions_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoehorn_vllm.api.admissions._MOST_LINES", 10)
    log = AdmissionLog(tmp_path / "admissions")
    log._limit = 10
    for number in range(500):
        log.append("alice", 10.0 * number)
    assert len((tmp_path / "admissions").read_text().splitlines()) <= 20
    assert AdmissionLog(tmp_path / "admissions").read(4990.0) == {"alice": [4940.0, 4950.0, 4960.0, 4970.0, 4980.0,
                                                                           4990.0]}


def test_requests_per_minute_survive_a_restart_of_the_engine(tmp_path: Path) -> None:
    limits = "requests_per_minute=2"

    async def before(engine: Engine) -> None:
        engine.go.set()
        for _ in range(2):
            assert (await engine.call(limits=limits).answer())[0] == 200

    async def after(engine: Engine) -> None:
        engine.go.set()
        status, headers, body = await engine.call(limits=limits).answer()
        assert (status, error(body)["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(headers[b"retry-after"]) <= 60
        assert (await engine.call(limits=limits, key="other").answer())[0] == 200

    run(before, admissions=AdmissionLog(tmp_path / "admissions"))
    run(after, admissions=AdmissionLog(tmp_path / "admissions"))
