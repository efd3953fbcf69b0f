"""The exporter as a process, scraped over HTTP, with missing, hung and broken sources."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import metrics_document
from fakes.engine_socket import http, serving
from fakes.nvml import GIB
from fakes.ports import free_port
from shoehorn import __version__
from shoehorn.common.paths import HOME
from shoehorn.config.settings import load
from shoehorn.observability import exporter, metrics
from shoehorn.observability.engine_scrape import EngineScrape
from shoehorn.observability.gpu_metrics import GpuProcess, GpuReading, GpuSample
from shoehorn.runtime import programs
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, State, StateFile

pytestmark = pytest.mark.process

DUMP = (HOME / "tests" / "captures" / "vllm-0.32.0-cpu-metrics.txt").read_text(encoding="utf-8")
REAL = "import pynvml as nvml"
TWO_GPUS = "from fakes.nvml import *; nvml = FakeNvml(example(example_gpu(0), example_gpu(1, 'Made-up 8G')))"
ONE_LOST = TWO_GPUS + "; nvml.lose(1)"
HANGS = TWO_GPUS + "; import threading; nvml.hang['{}'] = threading.Event()"
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def _series(text: str) -> Series:
    """Every sample; fails when a family or a series comes twice."""
    families = list(text_string_to_metric_families(text))
    assert len(families) == len({family.name for family in families})
    samples = [sample for family in families for sample in family.samples]
    series = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(series) == len(samples)
    return series


def _value(series: Series, family: str, **labels: str) -> float | None:
    values = [value for (each, its), value in series.items() if each == family and set(labels.items()) <= its]
    assert len(values) < 2, (family, labels)
    return values[0] if values else None


def _names(series: Series, start: str) -> set[str]:
    return {name for name, _ in series if name.startswith(start)}


class Running:
    """An exporter process, on a port of its own."""

    def __init__(self, run_dir: Path, nvml: str, port: int | None = None, **settings: str) -> None:
        self.port = port or free_port()
        self.run_dir = run_dir
        code = (f"import os, sys; {nvml}; from shoehorn.observability.exporter import main; "
                "sys.exit(main(os.environ, nvml))")
        command = ["-m", programs.EXPORTER] if nvml == REAL else ["-c", code]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error::SyntaxWarning", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{HOME / 'src'}:{HOME / 'tests'}",
                            "RUN_DIR": str(run_dir), "METRICS_PORT": str(self.port), **settings})

    def get(self, path: str = "/metrics", **headers: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", headers=headers, timeout=60)

    def wait(self) -> Running:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/")
                return self
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(f"it does not answer: {self.end()}")

    def scrape(self) -> Series:
        answer = self.get()
        assert answer.status_code == 200
        return _series(answer.text)

    def end(self) -> str:
        """Stop it; returns what it printed."""
        self.process.terminate()
        return self.process.communicate(timeout=60)[0]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def make(nvml: str = REAL, port: int | None = None, **settings: str) -> Running:
        started.append(Running(tmp_path, nvml, port, **settings))
        return started[-1]

    yield make
    for each in started:
        each.process.kill()
        each.process.communicate()


def test_scrape_contains_appliance_engine_and_gpus(start: Callable[..., Running], tmp_path: Path) -> None:
    rows = ({"gpu": 0, "part": "weights", "expected_bytes": 10, "measured_bytes": 11},
            {"gpu": 0, "part": "framework", "expected_bytes": 5, "measured_bytes": None})
    StateFile(tmp_path).update(phase=Phase.READY, restarts=2, step_downs=1, bytes_done=90, bytes_total=100, memory=rows,
                                kv_cache_tokens=8192, failures={"hung": 2})
    running = start(TWO_GPUS, MODELS_DIR=str(tmp_path)).wait()
    with serving(tmp_path / "engine.sock", http(DUMP.encode())):
        begun = time.time()
        answer = running.get(Accept="application/openmetrics-text; version=1.0.0, text/plain; q=0.1")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.text.endswith(DUMP)
    series = _series(answer.text)
    assert len(_series(DUMP).items() & series.items()) == len(_series(DUMP)) > 400  # all of the engine's, unchanged
    assert _value(series, "shoehorn_info", version=__version__) == 1
    assert _value(series, "shoehorn_engine_restarts_total") == 2
    assert _value(series, "shoehorn_engine_step_downs_total") == 1
    assert _value(series, "shoehorn_vram_expected_bytes", gpu="0", part="framework") == 5
    assert _value(series, "shoehorn_vram_bytes", gpu="0", part="unattributed") == 6 * GIB, "not all parts were said"
    assert sum(value for (name, labels), value in series.items()
               if name == "shoehorn_vram_bytes" and ("gpu", "0") in labels) == 24 * GIB
    assert _value(series, "shoehorn_kv_cache_tokens") == 8192
    assert _value(series, "shoehorn_engine_failures_total", diagnosis="hung") == 2
    assert (_value(series, "shoehorn_models_volume_free_bytes") or 0) > 0
    assert _value(series, "shoehorn_download_bytes") == 90
    assert _value(series, "shoehorn_engine_scrape_success") == 1
    assert _value(series, "shoehorn_gpu_collect_success") == 1
    assert _value(series, "shoehorn_gpu_nvml_return_code") == 0
    assert abs((_value(series, "shoehorn_gpu_collect_last_success_timestamp_seconds") or 0) - begun) < 60
    assert _value(series, "shoehorn_gpu_info", gpu="1", name="Made-up 8G", driver_version="580.95.05") == 1
    assert _value(series, "shoehorn_gpu_memory_used_bytes", gpu="0") == 6 * GIB
    assert _value(series, "shoehorn_gpu_process_memory_bytes", gpu="0", pid="4242") == 6 * GIB


def test_scrape_has_current_values(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start().wait()
    states = StateFile(tmp_path)
    assert _value(running.scrape(), "shoehorn_phase", phase="starting") == 1  # before any state was written
    states.update(phase=Phase.PULLING, progress=0.25, bytes_done=25, bytes_total=100)
    series = running.scrape()
    assert _value(series, "shoehorn_phase", phase="pulling") == 1
    assert _value(series, "shoehorn_phase", phase="starting") == 0
    assert _value(series, "shoehorn_phase_progress_ratio") == 0.25
    states.update(phase=Phase.READY, progress=None)
    with serving(tmp_path / "engine.sock", http(DUMP.encode())):
        assert _value(running.scrape(), "shoehorn_engine_scrape_success") == 1
    series = running.scrape()
    assert _value(series, "shoehorn_engine_scrape_success") == 0
    assert _names(series, "vllm:") == _names(series, "shoehorn_phase_progress") == set()
    assert _names(series, "shoehorn_engine_scrape") == {"shoehorn_engine_scrape_success"}


def test_promtool_accepts_the_appliances_metrics(start: Callable[..., Running], tmp_path: Path) -> None:
    StateFile(tmp_path).update(phase=Phase.PULLING, progress=0.9, bytes_done=90, bytes_total=100, failures={"hung": 1},
                               rate_bytes_per_second=3.0)
    running = start(TWO_GPUS).wait()
    text = running.get().text
    assert _value(_series(text), "shoehorn_download_bytes_per_second") == 3
    assert _value(_series(text), "shoehorn_gpu_xid_errors_total", gpu="1", kind="hardware") == 0
    for broken in ("", "# TYPE shoehorn_loads_total gauge\nshoehorn_loads_total 1\n"):
        done = subprocess.run(["promtool", "check", "metrics"], input=text + broken, capture_output=True, text=True,
                              timeout=60)
        assert (done.returncode != 0) == bool(broken), done.stdout + done.stderr


def test_missing_nvidia_driver_removes_gpu_series_only(start: Callable[..., Running]) -> None:
    running = start("from fakes.nvml import *; nvml = FakeNvml(); nvml.fail['nvmlInit'] = 12").wait()
    for _ in range(3):
        series = running.scrape()
        assert _names(series, "shoehorn_gpu_") == {"shoehorn_gpu_collect_success", "shoehorn_gpu_nvml_return_code",
                                                   "shoehorn_gpu_collect_duration_seconds"}
        assert _value(series, "shoehorn_gpu_nvml_return_code") == 12
        assert _value(series, "shoehorn_phase", phase="starting") == 1
    assert running.end().count("metrics unavailable: source=gpus error=NVML Shared Library Not Found") == 1


def test_lost_gpu_removes_its_own_series_only(start: Callable[..., Running]) -> None:
    series = start(ONE_LOST).wait().scrape()
    assert _value(series, "shoehorn_gpu_memory_used_bytes", gpu="0") == 6 * GIB
    assert not [labels for name, labels in series if ("gpu", "1") in labels]
    assert _value(series, "shoehorn_gpu_collect_success") == 0
    assert _value(series, "shoehorn_gpu_nvml_return_code") == 15


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetPowerUsage"])
def test_hung_driver_removes_gpu_series_within_a_time_limit(start: Callable[..., Running], call: str) -> None:
    running = start(HANGS.format(call)).wait()
    begun = time.monotonic()
    series = running.scrape()
    assert exporter.GPU_LIMIT_SECONDS - 0.2 < time.monotonic() - begun < 30
    assert _names(series, "shoehorn_gpu_memory") == set()
    assert (_value(series, "shoehorn_gpu_collect_success"), _value(series, "shoehorn_gpu_nvml_return_code")) == (0, -1)
    begun = time.monotonic()
    for _ in range(20):
        running.scrape()
    assert time.monotonic() - begun < 20 * exporter.GPU_LIMIT_SECONDS / 2  # callers share one call
    running.end()
    assert running.process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_it_immediately_even_during_a_scrape(start: Callable[..., Running], tmp_path: Path,
                                                       number: int) -> None:
    running = start().wait()
    with serving(tmp_path / "engine.sock", http(DUMP.encode())) as engine:
        engine.piece, engine.pause_seconds = 10, 0.05
        with socket.create_connection(("127.0.0.1", running.port)) as client:
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            end = time.monotonic() + 60
            while not engine.requests and time.monotonic() < end:
                time.sleep(0.005)
            running.process.send_signal(number)
            assert running.process.wait(60) == 0
            assert client.recv(1) == b"", "it waited for the end of the scrape"


@pytest.mark.fault("SIGSTOP of the exporter, then SIGCONT", "It continues.")
def test_it_continues_after_sigstop(start: Callable[..., Running]) -> None:
    running = start().wait()
    for _ in range(2):
        running.process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)  # longer than it waits for a signal at a time
        running.process.send_signal(signal.SIGCONT)
        running.scrape()
    assert "serving metrics" in running.end()
    assert running.process.returncode == 0


def test_it_exits_when_its_parent_was_killed(tmp_path: Path) -> None:
    port = free_port()
    code = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'shoehorn.observability.exporter'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={
            "PYTHONPATH": str(HOME / "src"), "RUN_DIR": str(tmp_path), "METRICS_PORT": str(port)}) as owner:
        assert owner.stdout is not None
        assert b"serving metrics" in owner.stdout.readline()
        owner.kill()
        owner.wait()
        assert select.select([owner.stdout], [], [], 60)[0]
        assert owner.stdout.read() == b""  # the end of it, as the exporter has closed it too
    with socket.socket() as taker:
        taker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taker.bind(("0.0.0.0", port))


def test_occupied_port_is_one_clear_message(start: Callable[..., Running]) -> None:
    with socket.socket() as taker:
        taker.bind(("0.0.0.0", 0))
        taker.listen()
        port = int(taker.getsockname()[1])
        running = start(port=port)
        assert running.process.wait(60) == 1
    output = running.end()
    assert f"port={port} error=Address already in use" in output
    assert len(output.splitlines()) == 1


def test_invalid_settings_are_reported(start: Callable[..., Running]) -> None:
    running = start(DRAIN_TIMEOUT="soon")
    assert running.process.wait(60) == 2
    assert "DRAIN_TIMEOUT: 'soon'" in running.end()


def test_other_paths_are_404(start: Callable[..., Running]) -> None:
    running = start().wait()
    assert "/metrics" in running.get("/").text
    assert running.get("/metrics?name[]=up").status_code == 200
    for path in ("/nothing", "/metrics/", "/../etc/passwd", "/metricsx"):
        assert running.get(path).status_code == 404, path
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"):
        answer = httpx.request(method, f"http://127.0.0.1:{running.port}/metrics")
        assert answer.status_code == 404, method
        assert answer.headers["server"] == "shoehorn"


def test_misbehaving_clients_leave_no_log_line(start: Callable[..., Running]) -> None:
    running = start().wait()
    for sent in (b"", b"\x16\x03\x01\x02\x00\x01", b"GET /metrics HTTP/1.0\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", running.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
            client.sendall(sent)
    time.sleep(0.3)
    running.scrape()
    assert "Traceback" not in running.end()


def test_unknown_values_are_absent() -> None:
    unknown = exporter.state_samples(State())
    assert set(unknown) == {"shoehorn_phase", "shoehorn_engine_restarts_total", "shoehorn_engine_step_downs_total"}
    gpu = GpuSample(0, "GPU-1", "X", None, None, None, None, None, None, None, (GpuProcess(1, "unknown", None),))
    assert set(exporter.gpu_samples(GpuReading((gpu,)))) == {
        "shoehorn_gpu_collect_success", "shoehorn_gpu_nvml_return_code", "shoehorn_gpu_info"}
    zero = replace(gpu, utilization_ratio=0.0, memory_used_bytes=0)
    values = exporter.gpu_samples(GpuReading((zero,)))
    assert values["shoehorn_gpu_utilization_ratio"] == values["shoehorn_gpu_memory_used_bytes"] == [(("0", "GPU-1"), 0)]


@pytest.mark.parametrize("phase", list(Phase))
def test_exactly_one_phase_is_set(phase: Phase) -> None:
    samples = dict(exporter.state_samples(State(phase=phase, since=5.0))["shoehorn_phase"])
    assert samples == {(each.value,): float(each is phase) for each in Phase}


def test_failed_fetch_reports_its_duration() -> None:
    assert exporter.engine_samples(EngineScrape(duration_seconds=2.0, problem="slow")) == {
        "shoehorn_engine_scrape_success": [((), 0.0)], "shoehorn_engine_scrape_duration_seconds": [((), 2.0)]}


def test_expert_lookups_are_absent_unless_the_engine_counts_them(tmp_path: Path) -> None:
    file = RunDir(tmp_path).expert_lookups
    assert exporter.expert_samples(file) == {}
    file.parent.mkdir()
    file.write_text("{broken")
    assert exporter.expert_samples(file) == {}
    file.write_text('{"gpu": 120, "cpu": 8}')
    text = metrics.render(exporter.expert_samples(file))
    assert 'shoehorn_expert_lookups_total{place="gpu"} 120.0' in text
    assert 'shoehorn_expert_lookups_total{place="cpu"} 8.0' in text


def test_table_follows_prometheus_conventions_and_rejects_unknown_metrics() -> None:
    for metric in metrics.TABLE:
        assert metric.name.startswith("shoehorn_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.help.endswith(".")
    assert len({metric.name for metric in metrics.TABLE}) == len(metrics.TABLE)
    with pytest.raises(KeyError, match="shoehorn_surprise"):
        metrics.render({"shoehorn_surprise": [((), 1)]})


def test_label_values_are_escaped() -> None:
    name = 'a"b\\c\nd}'
    text = metrics.render({"shoehorn_info": [((name,), 1)]})
    assert _series(text) == {("shoehorn_info", frozenset({("version", name)})): 1}


def test_metrics_document_is_current_and_names_existing_metrics() -> None:
    page = (HOME / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == metrics_document.document(), "docs/metrics.md is stale: make docs"
    in_dump = {line.split()[2] for line in DUMP.splitlines() if line.startswith("# TYPE")}
    assert {name for name, _ in metrics.ENGINE} <= in_dump


def test_prometheus_scrapes_the_service_of_the_compose_file() -> None:
    config = yaml.safe_load((HOME / "monitoring" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    compose = yaml.safe_load((HOME / "docker-compose.yml").read_text(encoding="utf-8"))
    [job] = config["scrape_configs"]
    [group] = job["static_configs"]
    [target] = group["targets"]
    service, port = target.split(":")
    assert service in compose["services"]
    assert int(port) == load({}).metrics_port
    assert set(job) == {"job_name", "static_configs"}  # the default path, over http
    seconds = {name: int(config["global"][name].removesuffix("s")) for name in ("scrape_timeout", "scrape_interval")}
    assert seconds["scrape_timeout"] - 2 > exporter.ENGINE_LIMIT_SECONDS + exporter.GPU_LIMIT_SECONDS
    assert seconds["scrape_timeout"] <= seconds["scrape_interval"]
