"""The program `exporter`: `/metrics` for Prometheus, answering from the first second of the container's life.

Rules:
- values are made while a scrape is answered; nothing is repeated from an earlier one;
- whatever is missing (engine, NVML, GPUs, state) costs its own series and no more, and a series of its own says so;
- all waiting together stays below Prometheus' own limit for a scrape (10 s).
"""

from __future__ import annotations

import http.server
import logging
import os
import signal
import socketserver
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pynvml
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from shoehorn import __version__
from shoehorn.common import logging_config as logs
from shoehorn.common.errors import ShoehornError
from shoehorn.common.time_limit import TimeLimitedCall
from shoehorn.config import settings as settings_module
from shoehorn.observability import metrics, vram_usage
from shoehorn.observability.engine_scrape import EngineScrape, EngineSource
from shoehorn.observability.gpu_metrics import NO_ANSWER, Gpu, GpuReading, NvmlReader
from shoehorn.runtime import parent_watch
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, State, StateFile

log = logging.getLogger("exporter")

ENGINE_LIMIT_SECONDS = 2.0
GPU_LIMIT_SECONDS = 2.0
VOLUME_LIMIT_SECONDS = 1.0  # a network volume may hang
_Values = dict[str, list[tuple[tuple[str, ...], float]]]


def state_samples(state: State) -> _Values:
    """What the state document says."""
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


def vram_samples(state: State, gpus: Sequence[Gpu]) -> _Values:
    """Where the memory of each card is, and what the plan expected of it."""
    values: _Values = {}
    for number, gpu in enumerate(vram_usage.in_use(gpus)):
        rows = [row for row in state.memory if row["gpu"] == number]
        for part, size in vram_usage.breakdown(rows, gpu, ready=state.phase in (Phase.READY, Phase.STOPPING)).items():
            values.setdefault("shoehorn_vram_bytes", []).append(((str(gpu.index), part), size))
        for row in rows:
            if row["part"] != "total":
                values.setdefault("shoehorn_vram_expected_bytes", []).append(
                    ((str(gpu.index), str(row["part"])), row["expected_bytes"]))
    return values


def volume_samples(models_dir: Path) -> _Values:
    """The model volume's size and what is free of it; nothing where there is none."""
    try:
        status = os.statvfs(models_dir)
    except OSError:
        return {}
    return {"shoehorn_models_volume_bytes": [((), status.f_blocks * status.f_frsize)],
            "shoehorn_models_volume_free_bytes": [((), status.f_bavail * status.f_frsize)]}


def engine_samples(scrape: EngineScrape) -> _Values:
    """How the fetch of the engine's metrics went."""
    values: _Values = {"shoehorn_engine_scrape_success": [((), float(scrape.success))]}
    if scrape.duration_seconds is not None:
        values["shoehorn_engine_scrape_duration_seconds"] = [((), scrape.duration_seconds)]
    return values


def gpu_samples(reading: GpuReading) -> _Values:
    """The cards of a reading, and whether it was whole."""
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
    for card in reading.xid_errors:
        labels = (str(card.index), card.uuid)
        for kind, count in card.counts.items():
            values.setdefault("shoehorn_gpu_xid_errors_total", []).append(((*labels, kind), count))
        if card.last is not None:
            values.setdefault("shoehorn_gpu_last_xid", []).append((labels, card.last))
    return values


def _figures(gpu: Gpu) -> dict[str, float | None]:
    return {"memory_total_bytes": gpu.memory_total_bytes, "memory_used_bytes": gpu.memory_used_bytes,
            "memory_free_bytes": gpu.memory_free_bytes, "memory_reserved_bytes": gpu.memory_reserved_bytes,
            "utilization_ratio": gpu.utilization_ratio, "power_watts": gpu.power_watts,
            "temperature_celsius": gpu.temperature_celsius}


class Exporter:
    """Makes the text of a scrape; thread-safe."""

    def __init__(self, states: StateFile, engine: EngineSource, gpus: TimeLimitedCall[GpuReading],
                 models: TimeLimitedCall[_Values]) -> None:
        self._states, self._engine, self._gpus, self._models = states, engine, gpus, models
        self._lock = threading.Lock()
        self._last_success: float | None = None
        self._said: dict[str, str] = {}

    def scrape(self) -> str:
        """Prometheus text format 0.0.4: our own metrics, then the engine's."""
        engine = self._engine.scrape()
        begun = time.monotonic()
        reading = self._gpus.get() or GpuReading(return_code=NO_ANSWER, problem="NVML gave no answer in time")
        duration = time.monotonic() - begun
        state = self._states.read()
        values: _Values = {"shoehorn_info": [((__version__,), 1)], **state_samples(state),
                           **engine_samples(engine), **gpu_samples(reading), **vram_samples(state, reading.gpus),
                           **(self._models.get() or {}),
                           "shoehorn_gpu_collect_duration_seconds": [((), duration)]}
        with self._lock:
            if reading.return_code == 0:
                self._last_success = time.time()
            if self._last_success is not None:
                values["shoehorn_gpu_collect_last_success_timestamp_seconds"] = [((), self._last_success)]
            self._say_once("the GPUs", reading.problem)
            self._say_once("the engine's metrics", engine.problem)
        return metrics.render(values) + engine.text

    def _say_once(self, what: str, problem: str) -> None:
        """One line when something becomes unreadable and one when it is back, not one a scrape."""
        if problem != self._said.get(what, ""):
            self._said[what] = problem
            log.info("%s", f"cannot read {what}: {problem}" if problem else f"{what} can be read again")


class Server(http.server.ThreadingHTTPServer):
    """One thread a request; the threads never hold up the end."""

    def __init__(self, address: tuple[str, int], exporter: Exporter) -> None:
        self.exporter = exporter
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the host's name, which may wait for a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "shoehorn", int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """`GET /metrics`, `GET /`, and 404 for everything else."""

    server: Server
    timeout = 10.0

    def do_GET(self) -> None:
        """Answer."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, CONTENT_TYPE_PLAIN_0_0_4, self.server.exporter.scrape())
        elif path == "/":
            self._answer(200, "text/plain; charset=utf-8", "Shoehorn's exporter: the metrics are at /metrics\n")
        else:
            self._not_found()

    def _not_found(self) -> None:
        self._answer(404, "text/plain; charset=utf-8", "not found; the metrics are at /metrics\n")

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
        """No line a scrape."""


def _came(signals: set[signal.Signals], seconds: float) -> bool:
    """Whether one of these blocked signals comes within so many seconds.

    What Python's sigtimedwait returns when the process was stopped past its time (SIGSTOP) is noise.
    """
    came = signal.sigtimedwait(signals, seconds)
    return came is not None and came.si_signo in signals


def main(environment: Mapping[str, str], nvml: Any) -> int:
    """Serve until SIGTERM; returns the exit code.

    Args:
        nvml: a module like pynvml.
    """
    supervisor = parent_watch.supervisor()
    ending = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)  # before the first thread: only the wait below takes them
    try:
        settings = settings_module.load(environment)
    except ShoehornError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    logs.configure(settings.log_format)
    exporter = Exporter(StateFile(settings.run_dir),
                        EngineSource(RunDir(settings.run_dir).engine_socket, ENGINE_LIMIT_SECONDS),
                        TimeLimitedCall(NvmlReader(nvml).read, GPU_LIMIT_SECONDS),
                        TimeLimitedCall(lambda: volume_samples(settings.models_dir), VOLUME_LIMIT_SECONDS))
    port = settings.metrics_port
    try:
        server = Server(("0.0.0.0", port), exporter)  # noqa: S104  # the container's network; compose publishes on 127.0.0.1
    except OSError as error:
        log.error("cannot listen on port %d: %s; set METRICS_PORT to a free one", port, error.strerror)
        return 1
    threading.Thread(target=server.serve_forever, args=(0.1,), name="http", daemon=True).start()
    log.info("metrics on port %d", port)
    while not _came(ending, 1.0) and os.getppid() == supervisor:
        pass  # when supervisord was killed nobody else would end this
    server.shutdown()
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main(os.environ, pynvml))
