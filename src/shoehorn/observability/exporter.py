"""The program `exporter`: serves `/metrics` to Prometheus from the first second of the container.

Rules:
- values are collected during a scrape; none is repeated from an earlier one;
- a missing source (engine, NVML, GPUs, state) removes only its own series, and another series reports it;
- the sum of all time limits is below Prometheus' limit of a scrape (10 s).
"""

from __future__ import annotations

import functools
import http.server
import json
import logging
import os
import signal
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pynvml
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from shoehorn import __version__
from shoehorn.common import logging_config as logs
from shoehorn.common.errors import SettingsError, ShoehornError
from shoehorn.common.time_limit import TimeLimitedCall
from shoehorn.config import settings as settings_module
from shoehorn.config.models_dir import ModelsDir
from shoehorn.front import replica_states
from shoehorn.front.replica_states import LOST, READY, ReplicaState
from shoehorn.observability import metrics, vram_usage
from shoehorn.observability.engine_scrape import EngineScrape, EngineSource
from shoehorn.observability.gpu_metrics import NO_ANSWER, GpuReading, GpuSample, NvmlReader
from shoehorn.runtime import parent_watch
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, State, StateFile
from shoehorn.runtime.usage_file import Period, UsageFiles, day_of, total

log = logging.getLogger("exporter")

ENGINE_LIMIT_SECONDS = 2.0
GPU_LIMIT_SECONDS = 2.0
VOLUME_LIMIT_SECONDS = 1.0  # a network volume may hang
_Values = dict[str, list[tuple[tuple[str, ...], float]]]


def state_samples(state: State) -> _Values:
    """Samples of the state document."""
    values: _Values = {
        "shoehorn_phase": [((phase,), float(phase is state.phase)) for phase in Phase],
        "shoehorn_engine_restarts_total": [((), state.restarts)],
        "shoehorn_engine_step_downs_total": [((), state.step_downs)],
    }
    if state.since:
        values["shoehorn_phase_since_timestamp_seconds"] = [((), state.since)]
    if state.progress is not None:
        values["shoehorn_phase_progress_ratio"] = [((), state.progress)]
    if state.failures:
        values["shoehorn_engine_failures_total"] = [((name,), count) for name, count in state.failures.items()]
    if state.start_seconds:
        values["shoehorn_start_seconds"] = [((part,), seconds) for part, seconds in state.start_seconds.items()]
    if state.kv_cache_tokens:
        values["shoehorn_kv_cache_tokens"] = [((), state.kv_cache_tokens)]
    if state.memory:
        values["shoehorn_offloaded_bytes"] = [((), state.offloaded_bytes)]
    if state.bytes_total:
        values["shoehorn_download_bytes"] = [((), state.bytes_done)]
        values["shoehorn_download_expected_bytes"] = [((), state.bytes_total)]
    if state.rate_bytes_per_second and state.phase is Phase.PULLING:
        values["shoehorn_download_bytes_per_second"] = [((), state.rate_bytes_per_second)]
    return values


def vram_samples(state: State, gpus: Sequence[GpuSample]) -> _Values:
    """Samples of the use of each GPU's memory, and of the plan's estimate."""
    values: _Values = {}
    for gpu in gpus:
        rows = [row for row in state.memory if row.get("index", row["gpu"]) == gpu.index]
        for part, size in vram_usage.breakdown(rows, gpu, ready=state.phase in (Phase.READY, Phase.STOPPING)).items():
            values.setdefault("shoehorn_vram_bytes", []).append(((str(gpu.index), part), size))
        for row in rows:
            if row["part"] != "total":
                values.setdefault("shoehorn_vram_expected_bytes", []).append(
                    ((str(gpu.index), str(row["part"])), row["expected_bytes"]))
    return values


def expert_samples(lookups: Path) -> _Values:
    """Samples of the experts that the engine needed; none without such a file."""
    try:
        counts = json.loads(lookups.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no experts in host memory, or no engine
        return {}
    return {"shoehorn_expert_lookups_total": [((place,), float(count)) for place, count in counts.items()]}


def volume_samples(models_dir: Path) -> _Values:
    """Samples of the model volume's size and free space; none without a volume."""
    try:
        status = os.statvfs(models_dir)
    except OSError:
        return {}
    return {"shoehorn_models_volume_bytes": [((), status.f_blocks * status.f_frsize)],
            "shoehorn_models_volume_free_bytes": [((), status.f_bavail * status.f_frsize)]}


def usage_samples(models_dir: Path, now: float) -> _Values:
    """Samples of the used tokens of this day and month (UTC), as saved in the volume."""
    try:
        content = UsageFiles(ModelsDir(models_dir).usage).read(day_of(now)[:7])
    except SettingsError:
        return {}
    periods: Sequence[Period] = ("day", "month")
    rows: list[tuple[tuple[str, ...], float]] = [
        ((key, model, kind, period), float(tokens)) for period in periods
        for (key, model), usage in sorted(total(content, period, now).items())
        for kind, tokens in (("prompt", usage.prompt_tokens), ("completion", usage.completion_tokens))]
    return {"shoehorn_usage_tokens": rows} if rows else {}


def engine_samples(scrape: EngineScrape) -> _Values:
    """Samples of the fetch of the engine's metrics."""
    values: _Values = {"shoehorn_engine_scrape_success": [((), float(scrape.success))]}
    if scrape.duration_seconds is not None:
        values["shoehorn_engine_scrape_duration_seconds"] = [((), scrape.duration_seconds)]
    return values


def replica_samples(replicas: Sequence[ReplicaState] | None) -> _Values:
    """Samples of the replicas of a front; none without an answer of HAProxy."""
    values: _Values = {}
    for each in replicas or ():
        for name, value in (("up", each.state != LOST), ("ready", each.state == READY),
                            ("requests_running", each.running), ("requests_total", each.requests)):
            values.setdefault(f"shoehorn_replica_{name}", []).append(((each.name,), float(value)))
    return values


def gpu_samples(reading: GpuReading) -> _Values:
    """Samples of the GPUs of a reading, and of its success."""
    values: _Values = {"shoehorn_gpu_collect_success": [((), float(reading.return_code == 0))],
                       "shoehorn_gpu_nvml_return_code": [((), reading.return_code)]}
    for gpu in reading.gpus:
        labels = (str(gpu.index), gpu.uuid)
        values.setdefault("shoehorn_gpu_info", []).append(((*labels, gpu.name, reading.driver_version), 1))
        for reason in gpu.throttled:
            values.setdefault("shoehorn_gpu_throttled", []).append(((*labels, reason), 1))
        for name, value in _figures(gpu).items():
            if value is not None:
                values.setdefault(f"shoehorn_gpu_{name}", []).append((labels, value))
        for process in gpu.processes:
            if process.memory_bytes is not None:
                values.setdefault("shoehorn_gpu_process_memory_bytes", []).append(
                    ((*labels, str(process.pid), process.name), process.memory_bytes))
    for errors in reading.xid_errors:
        labels = (str(errors.index), errors.uuid)
        for kind, count in errors.counts.items():
            values.setdefault("shoehorn_gpu_xid_errors_total", []).append(((*labels, kind), count))
        if errors.last is not None:
            values.setdefault("shoehorn_gpu_last_xid", []).append((labels, errors.last))
    return values


def _figures(gpu: GpuSample) -> dict[str, float | None]:
    return {"memory_total_bytes": gpu.memory_total_bytes, "memory_used_bytes": gpu.memory_used_bytes,
            "memory_free_bytes": gpu.memory_free_bytes, "memory_reserved_bytes": gpu.memory_reserved_bytes,
            "utilization_ratio": gpu.utilization_ratio, "power_watts": gpu.power_watts,
            "temperature_celsius": gpu.temperature_celsius}


class Exporter:
    """Collects the text of a scrape; thread-safe.

    Args:
        gpus: reads NVML; None in a front, which has no GPU of its own.
        replicas: reads HAProxy's states; None in other roles.
    """

    def __init__(self, states: StateFile, engine: EngineSource, gpus: TimeLimitedCall[GpuReading] | None,
                 models: TimeLimitedCall[_Values],
                 replicas: Callable[[], Sequence[ReplicaState] | None] | None = None) -> None:
        self._states, self._engine, self._gpus, self._models = states, engine, gpus, models
        self._replicas = replicas
        self._lock = threading.Lock()
        self._last_success: float | None = None
        self._problems: dict[str, str] = {}

    def scrape(self) -> str:
        """Collect the appliance's metrics, then the engine's, as Prometheus text 0.0.4."""
        engine = self._engine.scrape()
        state = self._states.read()
        values: _Values = {"shoehorn_info": [((__version__,), 1)], **state_samples(state), **engine_samples(engine),
                           **(self._collect_gpus(state, self._gpus) if self._gpus else {}),
                           **(replica_samples(self._replicas()) if self._replicas else {}),
                           **expert_samples(RunDir(self._states.run_dir).expert_lookups), **(self._models.get() or {})}
        with self._lock:
            self._log_change("engine", engine.problem)
        return metrics.render(values) + engine.text

    def _collect_gpus(self, state: State, gpus: TimeLimitedCall[GpuReading]) -> _Values:
        started = time.monotonic()
        reading = gpus.get() or GpuReading(return_code=NO_ANSWER, problem="NVML timed out")
        values: _Values = {**gpu_samples(reading), **vram_samples(state, reading.gpus),
                           "shoehorn_gpu_collect_duration_seconds": [((), time.monotonic() - started)]}
        with self._lock:
            if reading.return_code == 0:
                self._last_success = time.time()
            if self._last_success is not None:
                values["shoehorn_gpu_collect_last_success_timestamp_seconds"] = [((), self._last_success)]
            self._log_change("gpus", reading.problem)
        return values

    def _log_change(self, source: str, problem: str) -> None:
        """Log once when a source of metrics fails, and once when it recovers."""
        if problem == self._problems.get(source, ""):
            return
        self._problems[source] = problem
        if problem:
            log.info("metrics unavailable: source=%s error=%s", source, problem)
        else:
            log.info("metrics available again: source=%s", source)


class MetricsServer(http.server.ThreadingHTTPServer):
    """Serves each request in a thread; threads do not delay the exit."""

    def __init__(self, address: tuple[str, int], exporter: Exporter) -> None:
        self.exporter = exporter
        super().__init__(address, MetricsHandler)

    def server_bind(self) -> None:
        """Bind without HTTPServer's lookup of the host's name, which may wait for a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "shoehorn", int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class MetricsHandler(http.server.BaseHTTPRequestHandler):
    """`GET /metrics`, `GET /`, and 404 for everything else."""

    server: MetricsServer
    timeout = 10.0

    def do_GET(self) -> None:
        """Answer one request."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, CONTENT_TYPE_PLAIN_0_0_4, self.server.exporter.scrape())
        elif path == "/":
            self._answer(200, "text/plain; charset=utf-8", "Shoehorn exporter. Metrics: /metrics\n")
        else:
            self._not_found()

    def _not_found(self) -> None:
        self._answer(404, "text/plain; charset=utf-8", "Not found. Metrics: /metrics\n")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _not_found

    def _answer(self, status: int, content_type: str, text: str) -> None:
        body = text.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        """The Server header, without versions."""
        return "shoehorn"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log no line per scrape."""


def _wait_for(signals: set[signal.Signals], seconds: float) -> bool:
    """Wait for one of these blocked signals; returns False after the time limit.

    Python's sigtimedwait returns other values when the process was stopped (SIGSTOP) past the time limit.
    """
    received = signal.sigtimedwait(signals, seconds)
    return received is not None and received.si_signo in signals


def main(environment: Mapping[str, str], nvml: Any) -> int:
    """Serve until SIGTERM; returns the exit code.

    Args:
        nvml: a module like pynvml.
    """
    supervisor = parent_watch.supervisor()
    stop_signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)  # before the first thread: only the wait below receives them
    try:
        settings = settings_module.load(environment)
    except ShoehornError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    logs.configure(settings.log_format)
    is_front = settings.role == "front"
    exporter = Exporter(StateFile(settings.run_dir),
                        EngineSource(RunDir(settings.run_dir).engine_socket, ENGINE_LIMIT_SECONDS),
                        None if is_front else TimeLimitedCall(NvmlReader(nvml).read, GPU_LIMIT_SECONDS),
                        TimeLimitedCall(lambda: {**volume_samples(settings.models_dir),
                                                 **usage_samples(settings.models_dir, time.time())},
                                        VOLUME_LIMIT_SECONDS),
                        functools.partial(replica_states.read, RunDir(settings.run_dir).balancer_stats,
                                          settings.replicas) if is_front else None)
    port = settings.metrics_port
    try:
        server = MetricsServer(("0.0.0.0", port), exporter)  # noqa: S104  # the container's network; compose publishes on 127.0.0.1
    except OSError as error:
        log.error("cannot listen, set METRICS_PORT to a free port: port=%d error=%s", port, error.strerror)
        return 1
    threading.Thread(target=server.serve_forever, args=(0.1,), name="http", daemon=True).start()
    log.info("serving metrics: port=%d", port)
    while not _wait_for(stop_signals, 1.0) and os.getppid() == supervisor:
        pass  # exits too when supervisord was killed
    server.shutdown()
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main(os.environ, pynvml))
