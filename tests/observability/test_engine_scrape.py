"""The engine's own metrics: handed on only when they are there in time and Prometheus would take them."""

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
from shoehorn.observability.engine_scrape import MOST_BYTES, EngineScrape, EngineSource, why_invalid
from shoehorn_vllm.api.metrics import RequestMetrics

DUMP = (HOME / "tests" / "captures" / "vllm-0.32.0-cpu-metrics.txt").read_text(encoding="utf-8")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engine.sock"


@pytest.fixture
def source(path: Path) -> Iterator[EngineSource]:
    made = EngineSource(path, limit_seconds=60)
    yield made
    made.close()


@pytest.fixture
def impatient(path: Path) -> Iterator[EngineSource]:
    made = EngineSource(path, limit_seconds=0.5)
    yield made
    made.close()


def test_a_real_engines_text_comes_through_whole(path: Path, source: EngineSource) -> None:
    with serving(path, http(DUMP.encode())) as engine:
        scrape = source.scrape()
    assert (scrape.success, scrape.text, scrape.problem) == (True, DUMP, "")
    assert scrape.duration_seconds is not None
    assert 0 < scrape.duration_seconds < 60
    request = engine.requests[0].lower()
    assert request.startswith("get /metrics http/1.1")
    assert "accept: text/plain; version=0.0.4" in request  # never OpenMetrics, whose text cannot be joined


def test_a_missing_line_end_is_added(path: Path, source: EngineSource) -> None:
    with serving(path, http(b"a 1")):
        assert source.scrape().text == "a 1\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # httpcore leaves it to Python to close
def test_no_engine_is_no_problem_however_long(path: Path, source: EngineSource) -> None:
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        assert source.scrape() == EngineScrape()
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))  # nobody listens: as after a kill
        for _ in range(20):
            assert source.scrape() == EngineScrape()
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_files  # fewer: those of earlier tests end meanwhile


def test_each_scrape_reaches_the_engine_of_that_moment(path: Path, source: EngineSource) -> None:
    for text in ("a 1\n", "a 2\n"):
        with serving(path, http(text.encode())):
            assert source.scrape().text == text


def test_no_connection_is_kept(path: Path, source: EngineSource) -> None:
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


def test_a_hung_engine_costs_the_limit_and_no_more(path: Path, impatient: EngineSource) -> None:
    with serving(path, http(DUMP.encode())) as engine:
        engine.answer, engine.piece, engine.pause_seconds = b"x", 1, 60.0
        begun = time.monotonic()
        scrape = impatient.scrape()
    assert 0.4 < time.monotonic() - begun < 30
    assert not scrape.success
    assert scrape.problem
    assert scrape.duration_seconds is not None


def test_an_engine_that_answers_drop_by_drop_costs_the_limit_too(path: Path, impatient: EngineSource) -> None:
    with serving(path, http(DUMP.encode())) as engine:
        engine.piece, engine.pause_seconds = 64, 0.1  # more than a minute, though no single wait is long
        begun = time.monotonic()
        scrape = impatient.scrape()
        assert time.monotonic() - begun < 30
    assert not scrape.success
    assert scrape.text == ""
    assert "longer than 0.5 s" in scrape.problem


@pytest.mark.parametrize(("answer", "problem"), [
    (http(b"no", status=b"503 Service Unavailable"), "it answered 503"),
    (http(b"# EOF\n", kind=b"application/openmetrics-text; version=1.0.0"), "application/openmetrics-text"),
    (http(b"\xff\xfe 1\n"), "utf-8"),
    (http(b"<html>hello</html>"), "not Prometheus text"),
    (http(DUMP.encode() + b"cut{of"), "not Prometheus text"),
    (http(b"a 1\nb 1\na 2\n"), "a comes twice"),
    (http(b"shoehorn_info 1\n"), "our own prefix"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "disconnected"),
    (b"", "disconnected"),
    (http(DUMP.encode())[:-100], "without sending complete message body"),
    (http(b"a" * (MOST_BYTES + 1)), "longer than 16777216 bytes"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_prometheus_would_not_take_is_kept_back(path: Path, source: EngineSource, answer: bytes,
                                                     problem: str) -> None:
    with serving(path, answer):
        scrape = source.scrape()
    assert not scrape.success
    assert scrape.text == ""
    assert problem in scrape.problem


def test_the_real_dump_is_valid() -> None:
    assert why_invalid(DUMP) == ""


def test_what_our_middleware_counts_in_the_engine_passes_and_nothing_else_of_our_name() -> None:
    registry = CollectorRegistry()
    counts = RequestMetrics(registry)
    counts.count_request("phone", "ok")
    counts.set_running("phone", 1)
    counts.count_usage("phone", b'"usage": {"prompt_tokens": 3, "completion_tokens": 4}')
    assert why_invalid(generate_latest(registry).decode()) == ""
    assert "our own prefix" in why_invalid("# TYPE shoehorn_phase gauge\nshoehorn_phase 1\n")
    rows = {f"{family.name}{'_total' * (family.type == 'counter')}" for family in registry.collect()}
    assert rows == {name for name, _ in metrics.PER_KEY}
