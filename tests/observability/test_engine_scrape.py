"""The engine's own metrics: passed on only if they arrive in time and Prometheus accepts them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from fakes.engine_socket import http, serving
from shoehorn.common.paths import HOME
from shoehorn.observability import metrics
from shoehorn.observability.engine_scrape import MAX_BYTES, EngineScrape, EngineSource, find_problem
from shoehorn_vllm.api.meter import Usage
from shoehorn_vllm.api.metrics import RequestMetrics
from shoehorn_vllm.protocol import KeyLimits

DUMP = (HOME / "tests" / "captures" / "vllm-0.32.0-cpu-metrics.txt").read_text(encoding="utf-8")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engine.sock"


@pytest.fixture
def source(path: Path) -> Iterator[EngineSource]:
    source = EngineSource(path, limit_seconds=60)
    yield source
    source.close()


@pytest.fixture
def impatient(path: Path) -> Iterator[EngineSource]:
    source = EngineSource(path, limit_seconds=0.5)
    yield source
    source.close()


def test_text_of_a_real_engine_is_passed_on_unchanged(path: Path, source: EngineSource) -> None:
    with serving(path, http(DUMP.encode())) as engine:
        scrape = source.scrape()
    assert (scrape.success, scrape.text, scrape.problem) == (True, DUMP, "")
    assert scrape.duration_seconds is not None
    assert 0 < scrape.duration_seconds < 60
    request = engine.requests[0].lower()
    assert request.startswith("get /metrics http/1.1")
    assert "accept: text/plain; version=0.0.4" in request  # never OpenMetrics, whose text cannot be joined


def test_missing_newline_is_added(path: Path, source: EngineSource) -> None:
    with serving(path, http(b"a 1")):
        assert source.scrape().text == "a 1\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # httpcore leaves it to Python to close
def test_missing_engine_is_not_a_problem(path: Path, source: EngineSource) -> None:
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        assert source.scrape() == EngineScrape()
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))  # no process listens, as after a kill
        for _ in range(20):
            assert source.scrape() == EngineScrape()
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_files  # fewer after earlier tests


def test_scrape_reaches_the_current_engine(path: Path, source: EngineSource) -> None:
    for text in ("a 1\n", "a 2\n"):
        with serving(path, http(text.encode())):
            assert source.scrape().text == text


def test_connections_are_not_reused(path: Path, source: EngineSource) -> None:
    with serving(path, http(b"a 1\n")) as engine:
        engine.keep_alive = True
        assert source.scrape().success
        assert engine.closed.wait(60)


def test_proxy_settings_do_not_apply(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    source = EngineSource(path, limit_seconds=60)
    with serving(path, http(b"a 1\n")):
        assert source.scrape().success
    source.close()


def test_hung_engine_delays_a_scrape_by_the_time_limit_only(path: Path, impatient: EngineSource) -> None:
    with serving(path, http(DUMP.encode())) as engine:
        engine.answer, engine.piece, engine.pause_seconds = b"x", 1, 60.0
        begun = time.monotonic()
        scrape = impatient.scrape()
    assert 0.4 < time.monotonic() - begun < 30
    assert not scrape.success
    assert scrape.problem
    assert scrape.duration_seconds is not None


def test_slow_engine_delays_a_scrape_by_the_time_limit_only(path: Path, impatient: EngineSource) -> None:
    with serving(path, http(DUMP.encode())) as engine:
        engine.piece, engine.pause_seconds = 64, 0.1  # more than a minute, though no single wait is long
        begun = time.monotonic()
        scrape = impatient.scrape()
        assert time.monotonic() - begun < 30
    assert not scrape.success
    assert scrape.text == ""
    assert "timed out after 0.5 s" in scrape.problem


@pytest.mark.parametrize(("answer", "problem"), [
    (http(b"no", status=b"503 Service Unavailable"), "status=503"),
    (http(b"# EOF\n", kind=b"application/openmetrics-text; version=1.0.0"), "application/openmetrics-text"),
    (http(b"\xff\xfe 1\n"), "utf-8"),
    (http(b"<html>hello</html>"), "invalid Prometheus text"),
    (http(DUMP.encode() + b"cut{of"), "invalid Prometheus text"),
    (http(b"a 1\nb 1\na 2\n"), "duplicate family a"),
    (http(b"shoehorn_info 1\n"), "reserved prefix"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "disconnected"),
    (b"", "disconnected"),
    (http(DUMP.encode())[:-100], "without sending complete message body"),
    (http(b"a" * (MAX_BYTES + 1)), "exceeds 16777216 bytes"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_text_that_prometheus_would_reject_is_dropped(path: Path, source: EngineSource, answer: bytes,
                                                     problem: str) -> None:
    with serving(path, answer):
        scrape = source.scrape()
    assert not scrape.success
    assert scrape.text == ""
    assert problem in scrape.problem


def test_recorded_dump_is_valid() -> None:
    assert find_problem(DUMP) == ""


def test_only_the_middleware_may_use_the_own_prefix() -> None:
    registry = CollectorRegistry()
    counts = RequestMetrics(registry)
    counts.count_request("phone", "ok")
    counts.set_running("phone", 1)
    counts.count_tokens("phone", Usage(3, 4))
    counts.set_budgets("phone", KeyLimits())
    assert find_problem(generate_latest(registry).decode()) == ""
    assert "reserved prefix" in find_problem("# TYPE shoehorn_phase gauge\nshoehorn_phase 1\n")
    rows = {f"{family.name}{'_total' * (family.type == 'counter')}" for family in registry.collect()}
    assert rows == {name for name, _ in metrics.PER_KEY}
