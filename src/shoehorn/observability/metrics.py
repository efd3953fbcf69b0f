"""The appliance's own metrics: one table, from which the scrape and docs/metrics.md are made.

Rules: prefix `shoehorn_`, base units in the name, counters end in `_total`; what is not known is absent, never 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from shoehorn.runtime.state import Phase

Samples = Mapping[str, Sequence[tuple[tuple[str, ...], float]]]
"""By metric name: the label values, in the table's order, with their value."""

_GPU = ("gpu", "uuid")


@dataclass(frozen=True)
class Metric:
    """One row; `absent` says when the series is missing ("" means never)."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    absent: str = ""
    kind: Literal["gauge", "counter"] = "gauge"


TABLE: tuple[Metric, ...] = (
    Metric("shoehorn_info", "Always 1; the label names the version.", ("version",)),
    Metric("shoehorn_phase", f"1 for the phase that the appliance is in, 0 for the others: {', '.join(Phase)}.",
           ("phase",)),
    Metric("shoehorn_phase_since_timestamp_seconds", "Unix time at which the phase began.",
           absent="before the engine program wrote its first state"),
    Metric("shoehorn_phase_progress_ratio", "Share of the phase that is done, 0 to 1.",
           absent="while nothing can be measured"),
    Metric("shoehorn_download_bytes", "Bytes of the model that are on disk.", absent="when nothing is pulled"),
    Metric("shoehorn_download_expected_bytes", "Bytes that the whole model has.", absent="when nothing is pulled"),
    Metric("shoehorn_download_bytes_per_second", "How fast they arrive.", absent="when nothing is pulled"),
    Metric("shoehorn_engine_restarts_total", "Engine restarts since the container started.", kind="counter"),
    Metric("shoehorn_engine_step_downs_total", "Starts with a smaller plan after one that failed, since the container "
           "started.", kind="counter"),
    Metric("shoehorn_engine_failures_total", "Engine failures since the container started, by diagnosis.",
           ("diagnosis",), absent="before the first failure", kind="counter"),
    Metric("shoehorn_vram_bytes", "Where the GPU's memory is now; the parts add up to the card. weights, quant_state "
           "(bitsandbytes' absmax), kv_cache and cuda_graphs as the engine said after its load; framework: CUDA's "
           "context and workspaces as they were then; activations: what was taken of their reserve since; "
           "unattributed: all of these before the engine is ready; other_processes; driver; free.",
           ("gpu", "part"), absent="where NVML does not say what is in use"),
    Metric("shoehorn_vram_expected_bytes", "What the plan expected of weights, quant_state, kv_cache, cuda_graphs and "
           "framework after the load, and of activations under load.", ("gpu", "part"),
           absent="before the first load"),
    Metric("shoehorn_kv_cache_tokens", "Tokens that the KV cache holds.", absent="before the first load"),
    Metric("shoehorn_offloaded_bytes", "Weights that the engine put into host memory.", absent="before the first load"),
    Metric("shoehorn_models_volume_bytes", "Size of the volume with the models.", absent="when it does not answer"),
    Metric("shoehorn_models_volume_free_bytes", "What is free of it.", absent="when it does not answer"),
    Metric("shoehorn_engine_scrape_success", "1 when the engine's own metrics are part of this scrape."),
    Metric("shoehorn_engine_scrape_duration_seconds", "How long the engine took to give its metrics, or to fail.",
           absent="when no engine listens"),
    Metric("shoehorn_gpu_info", "Always 1; what the GPU is.", (*_GPU, "name", "driver_version")),
    Metric("shoehorn_gpu_memory_total_bytes", "Memory of the GPU.", _GPU),
    Metric("shoehorn_gpu_memory_used_bytes", "Memory in use by processes, on drivers without "
           "shoehorn_gpu_memory_reserved_bytes also by the driver.", _GPU),
    Metric("shoehorn_gpu_memory_free_bytes", "Memory that is free.", _GPU),
    Metric("shoehorn_gpu_memory_reserved_bytes", "Memory that the driver keeps for itself.", _GPU),
    Metric("shoehorn_gpu_process_memory_bytes", "Memory of one process. The process is named when its id is one of the "
           "container's, and `unknown` otherwise.", (*_GPU, "pid", "process"),
           absent="for processes whose memory the driver does not show to a container"),
    Metric("shoehorn_gpu_utilization_ratio", "Share of the driver's last sample period in which the GPU computed.",
           _GPU),
    Metric("shoehorn_gpu_power_watts", "Power draw.", _GPU),
    Metric("shoehorn_gpu_temperature_celsius", "Temperature of the chip.", _GPU),
    Metric("shoehorn_gpu_throttled", "1 for each reason why the clocks are held down: power_cap, thermal, "
           "hardware_slowdown, hardware_thermal, power_brake.", (*_GPU, "reason"), absent="when they are not"),
    Metric("shoehorn_gpu_xid_errors_total", "Xid errors since the exporter started, by `kind`: application (the "
           "program's fault as a rule: 13, 31, 32, 43, 45, 68, 69), corrected (63, 92: the card has dealt with a "
           "memory error) or hardware (all others). Also of a GPU that no longer answers.", (*_GPU, "kind"),
           absent="where the driver does not tell", kind="counter"),
    Metric("shoehorn_gpu_last_xid", "The code of the last Xid error, also of a GPU that no longer answers.", _GPU,
           absent="before the first"),
    Metric("shoehorn_gpu_collect_success", "1 when every GPU answered. 0 without NVML, with no GPU, with fewer than "
           "there were, and when NVML hangs."),
    Metric("shoehorn_gpu_collect_last_success_timestamp_seconds", "Unix time of the last scrape at which every GPU "
           "answered.", absent="until that happened once"),
    Metric("shoehorn_gpu_collect_duration_seconds", "How long NVML took; it is not waited for longer than a scrape can "
           "wait."),
    Metric("shoehorn_gpu_nvml_return_code", "NVML's last return code: 0 success, 9 driver not loaded, 12 library not "
           "found, 15 GPU lost, 16 reset required, 18 library and driver differ, 999 unknown; -1 when NVML gave no "
           "code: no answer in time, no GPU, or fewer than there were."),
)

ENGINE: tuple[tuple[str, str], ...] = (
    ("vllm:num_requests_running", "Requests that are being computed."),
    ("vllm:num_requests_waiting", "Requests in the queue."),
    ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1 in spite of its name."),
    ("vllm:num_preemptions_total", "Requests that were put back because the KV cache was full."),
    ("vllm:prompt_tokens_total", "Tokens read."),
    ("vllm:generation_tokens_total", "Tokens written."),
    ("vllm:request_success_total", "Requests that ended, by `finished_reason`: stop, length, and also abort, error."),
    ("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache, of vllm:prefix_cache_queries_total."),
    ("vllm:time_to_first_token_seconds", "Histogram: from arrival to the first token."),
    ("vllm:inter_token_latency_seconds", "Histogram: between one token and the next."),
    ("vllm:e2e_request_latency_seconds", "Histogram: from arrival to the last token."),
    ("vllm:request_queue_time_seconds", "Histogram: time in the queue."),
)
"""Metrics of vLLM 0.32 that an operator looks at first; it has many more."""

PER_KEY: tuple[tuple[str, str], ...] = (
    ("shoehorn_requests_total", "Requests by `outcome`: `ok`, `error`, `left` (by the client), `aborted` (by a stop), "
     "or the code of the refusal, such as `rate_limit_exceeded`."),
    ("shoehorn_requests_running", "Requests that are admitted and not yet answered."),
    ("shoehorn_tokens_total", "Tokens by `kind` (`prompt`, `completion`), of answers that show their usage: OpenAI's "
     "streams do when asked with `stream_options.include_usage`."),
)
"""What the appliance's middleware counts inside the engine's API server, by `key`: its name, never the key itself."""


class _Snapshot(Collector):
    """The values of one scrape."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        for metric in TABLE:
            if not self._samples.get(metric.name):
                continue
            form = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = form(metric.name, metric.help, labels=metric.labels)
            for labels, value in self._samples[metric.name]:
                family.add_metric(labels, value)
            yield family


def render(samples: Samples) -> str:
    """Prometheus text format 0.0.4 of `samples`; metrics without a sample are left out.

    Raises:
        KeyError: a sample's name is not in the table.
    """
    if unknown := set(samples) - {metric.name for metric in TABLE}:
        raise KeyError(f"not in the table: {', '.join(sorted(unknown))}")
    registry = CollectorRegistry()  # its own, so that nothing of this process itself is in it
    registry.register(_Snapshot(samples))
    return generate_latest(registry).decode("utf-8")


_INTRODUCTION = """# Metrics

`GET /metrics` on `METRICS_PORT` (6334) answers from the first second, in Prometheus' text format 0.0.4. One scrape
holds the appliance's own metrics and, once the engine listens, all of the engine's. What is not known or not supported
is absent, never 0, and no figure is repeated from an earlier scrape: `shoehorn_engine_scrape_success` and
`shoehorn_gpu_collect_success` tell "none" from "not measured". `monitoring/prometheus/prometheus.yml` scrapes it.

## The appliance's own

GPU series exist for each GPU that answered, as far as its driver supports them; its Xid errors outlast it.

| metric | type | labels | meaning |
|---|---|---|---|
"""

_ENGINE_INTRODUCTION = """
## The engine's

Everything that vLLM exposes, unchanged, with the labels `model_name` and `engine`. To look at first:

| metric | meaning |
|---|---|
"""


_PER_KEY_INTRODUCTION = """
## For each key

Counted by the appliance inside the engine's API server, with the label `key`: the key's name. They begin anew when the
engine does.

| metric | meaning |
|---|---|
"""


def document() -> str:
    """The text of docs/metrics.md."""
    own = []
    for metric in TABLE:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        absent = f" Absent {metric.absent}." if metric.absent else ""
        own.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help}{absent} |\n")
    engine = [f"| `{name}` | {meaning} |\n" for name, meaning in ENGINE]
    per_key = [f"| `{name}` | {meaning} |\n" for name, meaning in PER_KEY]
    return "".join([_INTRODUCTION, *own, _ENGINE_INTRODUCTION, *engine, _PER_KEY_INTRODUCTION, *per_key])
