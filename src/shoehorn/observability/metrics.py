"""The appliance's own metrics: one table for the scrape and docs/metrics.md.

Rules: prefix `shoehorn_`, base units in the name, counters end in `_total`; unknown values are absent, never 0.
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
"""Label values, in the table's order, and value of each sample, by metric name."""

_GPU = ("gpu", "uuid")
_REPLICA = ("replica",)


@dataclass(frozen=True)
class Metric:
    """One row; `absent` is the condition under which the series is missing ("" means never)."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    absent: str = ""
    kind: Literal["gauge", "counter"] = "gauge"


TABLE: tuple[Metric, ...] = (
    Metric("shoehorn_info", "Always 1; the version is in the label.", ("version",)),
    Metric("shoehorn_phase", f"1 for the current phase, 0 for the others: {', '.join(Phase)}.",
           ("phase",)),
    Metric("shoehorn_phase_since_timestamp_seconds", "Unix time at which the phase began.",
           absent="before the engine program wrote its first state"),
    Metric("shoehorn_phase_progress_ratio", "Completed share of the phase, 0 to 1.",
           absent="while it cannot be measured"),
    Metric("shoehorn_download_bytes", "Bytes of the model on disk.", absent="when nothing is pulled"),
    Metric("shoehorn_download_expected_bytes", "Size of the whole model.", absent="when nothing is pulled"),
    Metric("shoehorn_download_bytes_per_second", "Download rate.", absent="when nothing is pulled"),
    Metric("shoehorn_start_seconds", "Seconds of each part of the last start: plan, pull, convert, import (the wait "
           "for vLLM's import, most of which runs during plan and pull), read (with the copy to the GPU), repack, "
           "compile, graphs, cache (profiling and KV cache), warm_up, other, and their total.", ("part",),
           absent="before the first start; a part that did not occur"),
    Metric("shoehorn_engine_restarts_total", "Engine restarts since the container started.", kind="counter"),
    Metric("shoehorn_engine_step_downs_total", "Starts with a smaller configuration after a failed one, since the "
           "container started.", kind="counter"),
    Metric("shoehorn_engine_failures_total", "Engine failures since the container started, by diagnosis.",
           ("diagnosis",), absent="before the first failure", kind="counter"),
    Metric("shoehorn_vram_bytes", "Current use of the GPU's memory; the parts add up to its size. weights, quant_state "
           "(bitsandbytes' absmax), kv_cache and cuda_graphs as the engine reported after its load; framework: CUDA's "
           "context and workspaces at that time; activations: allocated from their reserve since; "
           "unattributed: all of these before the engine is ready; other_processes; driver; free.",
           ("gpu", "part"), absent="where NVML does not report the memory in use"),
    Metric("shoehorn_vram_expected_bytes", "The plan's estimate of weights, quant_state, kv_cache, cuda_graphs and "
           "framework after the load, and of activations under load.", ("gpu", "part"),
           absent="before the first load"),
    Metric("shoehorn_kv_cache_tokens", "Capacity of the KV cache in tokens.", absent="before the first load"),
    Metric("shoehorn_offloaded_bytes", "Weights offloaded to host memory.", absent="before the first load"),
    Metric("shoehorn_expert_lookups_total", "Experts of a mixture that small forward passes needed since the engine's "
           "start, by `place`: gpu (it had them), cpu (computed there) or pcie (copied from host memory). Up to 5 s "
           "old.", ("place",), absent="unless a GPU's experts are in host memory", kind="counter"),
    Metric("shoehorn_models_volume_bytes", "Size of the volume with the models.", absent="when it does not answer"),
    Metric("shoehorn_models_volume_free_bytes", "Free space of the volume.", absent="when it does not answer"),
    Metric("shoehorn_usage_tokens", "Tokens that a key used in the current `period`: day or month (UTC); `kind`: "
           "prompt or completion. Kept in the volume, up to 15 s old.", ("key", "model", "kind", "period"),
           absent="before the first use in the month, and when the volume does not answer"),
    Metric("shoehorn_engine_scrape_success", "1 when the engine's own metrics are part of this scrape."),
    Metric("shoehorn_engine_scrape_duration_seconds", "Duration of the engine's answer or failure.",
           absent="when no engine listens"),
    Metric("shoehorn_replica_up", "1 when a replica of this front answers its check, 0 when it is lost.", _REPLICA,
           absent="in other roles, and while HAProxy does not answer"),
    Metric("shoehorn_replica_ready", "1 when a replica gets new requests; 0 when it is lost, starting or stopping.",
           _REPLICA, absent="in other roles, and while HAProxy does not answer"),
    Metric("shoehorn_replica_requests_running", "Requests of this front that a replica is answering.", _REPLICA,
           absent="in other roles, and while HAProxy does not answer"),
    Metric("shoehorn_replica_requests_total", "Requests sent to a replica since HAProxy started, repeated ones "
           "and the front's own included.", _REPLICA, absent="in other roles, and while HAProxy does not answer",
           kind="counter"),
    Metric("shoehorn_gpu_info", "Always 1; name and driver are in the labels.", (*_GPU, "name", "driver_version")),
    Metric("shoehorn_gpu_memory_total_bytes", "Memory of the GPU.", _GPU),
    Metric("shoehorn_gpu_memory_used_bytes", "Memory in use by processes, on drivers without "
           "shoehorn_gpu_memory_reserved_bytes also by the driver.", _GPU),
    Metric("shoehorn_gpu_memory_free_bytes", "Free memory.", _GPU),
    Metric("shoehorn_gpu_memory_reserved_bytes", "Memory reserved by the driver.", _GPU),
    Metric("shoehorn_gpu_process_memory_bytes", "Memory of one process. Its name is `unknown` unless its id belongs to "
           "the container.", (*_GPU, "pid", "process"),
           absent="for processes whose memory the driver does not show to a container"),
    Metric("shoehorn_gpu_utilization_ratio", "Share of the driver's last sample period in which a kernel ran.",
           _GPU),
    Metric("shoehorn_gpu_power_watts", "Power draw.", _GPU),
    Metric("shoehorn_gpu_temperature_celsius", "Temperature of the chip.", _GPU),
    Metric("shoehorn_gpu_throttled", "1 for each reason of reduced clocks: power_cap, thermal, "
           "hardware_slowdown, hardware_thermal, power_brake.", (*_GPU, "reason"), absent="at full clocks"),
    Metric("shoehorn_gpu_xid_errors_total", "Xid errors since the exporter started, by `kind`: application (usually "
           "the program's fault: 13, 31, 32, 43, 45, 68, 69), corrected (63, 92: the GPU corrected a "
           "memory error) or hardware (all others). Also of a GPU that no longer answers.", (*_GPU, "kind"),
           absent="where the driver does not report them", kind="counter"),
    Metric("shoehorn_gpu_last_xid", "Code of the last Xid error, also of a GPU that no longer answers.", _GPU,
           absent="before the first"),
    Metric("shoehorn_gpu_collect_success", "1 when every GPU answered. 0 without NVML, without GPUs, with fewer than "
           "before, and when NVML hangs."),
    Metric("shoehorn_gpu_collect_last_success_timestamp_seconds", "Unix time of the last scrape at which every GPU "
           "answered.", absent="before the first such scrape"),
    Metric("shoehorn_gpu_collect_duration_seconds", "Duration of the NVML calls, limited to the time of a scrape."),
    Metric("shoehorn_gpu_nvml_return_code", "NVML's last return code: 0 success, 9 driver not loaded, 12 library not "
           "found, 15 GPU lost, 16 reset required, 18 library and driver differ, 999 unknown; -1 without a code: "
           "NVML timed out, no GPU, or fewer than before."),
)

ENGINE: tuple[tuple[str, str], ...] = (
    ("vllm:num_requests_running", "Running requests."),
    ("vllm:num_requests_waiting", "Requests in the queue."),
    ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1 in spite of its name."),
    ("vllm:num_preemptions_total", "Requests preempted because the KV cache was full."),
    ("vllm:prompt_tokens_total", "Prompt tokens."),
    ("vllm:generation_tokens_total", "Generated tokens."),
    ("vllm:request_success_total", "Finished requests by `finished_reason`: stop, length, and also abort, error."),
    ("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache, of vllm:prefix_cache_queries_total."),
    ("vllm:time_to_first_token_seconds", "Histogram: from arrival to the first token."),
    ("vllm:inter_token_latency_seconds", "Histogram: between two tokens."),
    ("vllm:e2e_request_latency_seconds", "Histogram: from arrival to the last token."),
    ("vllm:request_queue_time_seconds", "Histogram: time in the queue."),
)
"""The most useful metrics of vLLM 0.32; it has many more."""

PER_KEY: tuple[tuple[str, str], ...] = (
    ("shoehorn_requests_total", "Requests by `outcome`: `ok`, `error`, `left` (by the client), `aborted` (by a stop), "
     "or the code of the refusal, such as `rate_limit_exceeded`."),
    ("shoehorn_requests_running", "Requests admitted and not yet answered."),
    ("shoehorn_tokens_total", "Tokens that the engine processed, by `kind` (`prompt`, `completion`), of all requests."),
    ("shoehorn_tokens_limit", "Token budget of a key in a `period`: day or month."),
)
"""Metrics of the middleware inside the engine's API server, by `key`: its name, never the key itself."""


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
    """Format `samples` as Prometheus text 0.0.4; metrics without a sample are omitted.

    Raises:
        KeyError: a sample's name is not in the table.
    """
    if unknown := set(samples) - {metric.name for metric in TABLE}:
        raise KeyError(f"unknown metrics: {', '.join(sorted(unknown))}")
    registry = CollectorRegistry()  # its own, without metrics of this process
    registry.register(_Snapshot(samples))
    return generate_latest(registry).decode("utf-8")
