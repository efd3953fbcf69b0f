"""Panels of the Grafana dashboards; `tools/dashboards.py` generates their JSON.

Rules: every panel has a title, a description, a unit and a legend; rates use `$__rate_interval`; every query is limited
to the chosen appliance (`instance`); a query without results returns a substitute value, so that an empty panel always
indicates a fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

HERE = 'instance=~"$instance"'
RATE = "$__rate_interval"
GREEN, YELLOW, RED = "green", "yellow", "red"
YES_NO: Mapping[str, tuple[str, str]] = {"1": ("yes", GREEN), "0": ("no", RED)}
ONE_GPU = ',gpu="$gpu"'


@dataclass(frozen=True)
class Panel:
    """One panel; `queries` are (PromQL, legend).

    Attributes:
        kind: `lines` or a `stack` over time, `value` or `bars` for the current values.
        steps: (lower bound, colour) of a `value`; the first one also applies below.
        texts: text and colour of a value.
        names: a `value` shows its legend instead.
        outline: legend of the series that is drawn as a line over the stack.
        right: legend of a series with an axis of its own, and that axis' unit.
        maximum: end of the axis.
    """

    title: str
    description: str
    unit: str
    queries: Sequence[tuple[str, str]]
    width: int = 8
    kind: Literal["lines", "stack", "value", "bars"] = "lines"
    steps: Sequence[tuple[float, str]] = ()
    texts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    names: bool = False
    outline: str = ""
    right: tuple[str, str] = ("", "")
    maximum: float | None = None


def rate(metric: str, by: str = "", labels: str = "") -> str:
    """Query the sum of a counter's rates."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{HERE}{labels}}}[{RATE}]))"


def quantile(share: float, metric: str) -> str:
    """Query a quantile of a histogram."""
    return f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{{HERE}}}[{RATE}])))"


def gauge(metric: str, by: str = "", labels: str = "") -> str:
    """Query the sum of a gauge."""
    return f"sum{f' by ({by})' if by else ''} ({metric}{{{HERE}{labels}}})"


def quantiles(metric: str) -> list[tuple[str, str]]:
    """Query the median and the 95th percentile."""
    return [(quantile(0.5, metric), "median"), (quantile(0.95, metric), "95 %")]


def mean(metric: str) -> str:
    """Query the mean of a histogram."""
    return f"{rate(f'{metric}_sum')} / {rate(f'{metric}_count')}"


def usual(metric: str) -> str:
    """Query the mean of a histogram over the dashboard's whole time range, which idle minutes do not interrupt."""
    return mean(metric).replace(RATE, "$__range")


USUAL_LENGTH = f"({usual('vllm:request_prompt_tokens')} + {usual('vllm:request_generation_tokens')})"
BANDS = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 10**6))
"""Ranges of concurrent requests."""


def by_concurrency(query: str) -> list[tuple[str, str]]:
    """Query the mean over the dashboard's time range, separately for each range of concurrent requests."""
    running, queries = gauge("vllm:num_requests_running"), []
    for low, high in BANDS:
        legend = f"{low} or more" if high == 10**6 else f"{low} to {high}" if high > low else str(low)
        queries.append((f"avg_over_time((({query}) and on () ({running} >= {low} <= {high}))[$__range:$__interval])",
                        legend))
    return queries


OVERVIEW = (
    Panel("Phase", "Current phase of the appliance: ready, idle (IDLE_STOP), starting, or failed.", "none",
          [(f'(shoehorn_phase{{{HERE},phase=~"ready|idle"}} == 1) or 3 * (shoehorn_phase{{{HERE},phase="failed"}} == 1)'
            f' or 2 * (shoehorn_phase{{{HERE}}} == 1)', "{{phase}}")], 4, "value",
          steps=((0, GREEN), (2, YELLOW), (3, RED)), names=True),
    Panel("Alerts", "Firing alerts.", "none",
          [(f'sum by (alertname) (ALERTS{{{HERE},alertstate="firing"}})'
            ' or on () label_replace(vector(0), "alertname", "none", "", "")', "{{alertname}}")], 4, "value",
          steps=((0, GREEN), (1, RED)), names=True),
    Panel("Requests", "Finished requests per second.", "reqps", [(rate("vllm:request_success_total"), "all")], 4,
          "value"),
    Panel("Failing", "Share of requests that failed for reasons of the server.", "percentunit",
          [(f"""({rate("shoehorn_requests_total", labels=',outcome=~"error|aborted"')} or vector(0))"""
            f" / clamp_min({rate('shoehorn_requests_total')} or vector(0), 0.001)", "failing")], 4, "value",
          steps=((0, GREEN), (0.01, YELLOW), (0.05, RED))),
    Panel("KV cache in use", "Share of the KV cache used by running requests.", "percentunit",
          [(f"max(vllm:kv_cache_usage_perc{{{HERE}}})", "in use")], 4, "value",
          steps=((0, GREEN), (0.9, YELLOW), (0.98, RED))),
    Panel("VRAM free", "Free memory of the fullest GPU.", "bytes",
          [(f'min(shoehorn_vram_bytes{{{HERE},part="free"}})', "free")], 4, "value",
          steps=((0, RED), (64 << 20, YELLOW), (256 << 20, GREEN))),
    Panel("Tokens", "Prompt tokens and generated tokens per second.", "none",
          [(rate("vllm:prompt_tokens_total"), "read"), (rate("vllm:generation_tokens_total"), "written")]),
    Panel("Time to first token", "From the arrival of a request to its first token.", "s",
          quantiles("vllm:time_to_first_token_seconds")),
    Panel("Time per output token", "Between two tokens of an answer.", "s",
          quantiles("vllm:inter_token_latency_seconds")),
    Panel("Queue", "Running and waiting requests.", "short",
          [(gauge("vllm:num_requests_running"), "running"), (gauge("vllm:num_requests_waiting"), "waiting")]),
    Panel("KV cache and preemptions", "Use of the KV cache, and preempted requests per second.", "percentunit",
          [(f"max(vllm:kv_cache_usage_perc{{{HERE}}})", "in use"),
           (rate("vllm:num_preemptions_total"), "preempted")], right=("preempted", "none")),
    Panel("Requests by outcome", "Answers and refusals, counted by the middleware in the engine's API server.", "reqps",
          [(rate("shoehorn_requests_total", "outcome"), "{{outcome}}")], kind="stack"),
    Panel("Requests by key", "By the name of the key, never the key.", "reqps",
          [(rate("shoehorn_requests_total", "key"), "{{key}}")], kind="stack"),
    Panel("Tokens by key", "Tokens that the engine processed, by the key's name.", "none",
          [(rate("shoehorn_tokens_total", "key"), "{{key}}")], kind="stack"),
    Panel("Finish reasons", "Reasons why answers ended: stop, length, abort, error.", "reqps",
          [(rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}")], kind="stack"),
)

VRAM = (
    Panel("GPU $gpu: use of its memory", "Parts that add up to the size of the GPU's memory.", "bytes",
          [(gauge("shoehorn_vram_bytes", "part", ONE_GPU), "{{part}}"),
           (gauge("shoehorn_gpu_memory_total_bytes", "", ONE_GPU), "size")], 16, "stack", outline="size"),
    Panel("Now", "Current values of the parts.", "bytes",
          [(gauge("shoehorn_vram_bytes", "part", ONE_GPU), "{{part}}")], 8, "bars"),
    Panel("Expected", "The plan's estimate of each part.", "bytes",
          [(gauge("shoehorn_vram_expected_bytes", "part", ONE_GPU), "{{part}}")], 6, "bars"),
    Panel("Measured", "The same parts as measured by the engine after its load.", "bytes",
          [(gauge("shoehorn_vram_bytes", "part",
                  f'{ONE_GPU},part=~"weights|quant_state|kv_cache|cuda_graphs|framework|activations"'),
            "{{part}}")], 6, "bars"),
    Panel("KV cache, live", "Bytes of the KV cache used by running requests, and its size.", "bytes",
          [(f'max(vllm:kv_cache_usage_perc{{{HERE}}}) * '
            f'sum(shoehorn_vram_bytes{{{HERE}{ONE_GPU},part="kv_cache"}})', "in use"),
           (gauge("shoehorn_vram_bytes", "", f'{ONE_GPU},part="kv_cache"'), "all")], 12),
    Panel("By process", "Memory of each process that NVML shows.", "bytes",
          [(gauge("shoehorn_gpu_process_memory_bytes", "process,pid", ONE_GPU), "{{process}} {{pid}}")], 12,
          "stack"),
    Panel("In host memory", "Weights offloaded to host memory.", "bytes",
          [(gauge("shoehorn_offloaded_bytes"), "offloaded")], 6, "value"),
    Panel("KV cache size", "Capacity of the KV cache in tokens.", "short",
          [(gauge("shoehorn_kv_cache_tokens"), "tokens")], 6, "value"),
    Panel("Experts by place", "Share of the experts that small forward passes needed: on the GPU, computed on the CPU, "
          "or copied over PCIe.", "percentunit",
          [(f"{rate('shoehorn_expert_lookups_total', 'place')} / on () group_left () "
            f"{rate('shoehorn_expert_lookups_total')}", "{{place}}")], 12, "stack"),
)

CAPACITY = (
    Panel("Would still fit", "Requests of mean length (prompt and answer) that still fit into the KV cache.", "short",
          [(f"{gauge('shoehorn_kv_cache_tokens')} * (1 - max(vllm:kv_cache_usage_perc{{{HERE}}})) / "
            f"{USUAL_LENGTH}", "requests")],
          6, "value"),
    Panel("Fit in all", "Requests of mean length that fit into the empty KV cache.", "short",
          [(f"{gauge('shoehorn_kv_cache_tokens')} / {USUAL_LENGTH}", "requests")],
          6, "value"),
    Panel("Running", "Running requests.", "short", [(gauge("vllm:num_requests_running"), "running")], 6,
          "value"),
    Panel("Waiting", "Requests in the queue.", "short", [(gauge("vllm:num_requests_waiting"), "waiting")], 6, "value",
          steps=((0, GREEN), (1, YELLOW))),
    Panel("Time per output token by concurrency", "Mean over the dashboard's time range by number of running requests: "
          "the cost of concurrency for each user.", "s",
          by_concurrency(mean("vllm:inter_token_latency_seconds")), 8, "bars"),
    Panel("Time to first token by concurrency", "The same for the time to the first token.", "s",
          by_concurrency(mean("vllm:time_to_first_token_seconds")), 8, "bars"),
    Panel("Tokens a second by concurrency", "The same for all generated tokens: the gain of concurrency.",
          "none", by_concurrency(rate("vllm:generation_tokens_total")), 8, "bars"),
    Panel("Time per output token", "With the number of running requests on the right axis.", "s",
          [*quantiles("vllm:inter_token_latency_seconds"), (gauge("vllm:num_requests_running"), "running")], 12,
          right=("running", "short")),
    Panel("Tokens a second for each running request", "Speed for one user.", "none",
          [(f"{rate('vllm:generation_tokens_total')} / clamp_min({gauge('vllm:num_requests_running')}, 1)", "each")],
          12),
    Panel("Free KV cache", "Tokens that could still be admitted.", "short",
          [(f"{gauge('shoehorn_kv_cache_tokens')} * (1 - max(vllm:kv_cache_usage_perc{{{HERE}}}))", "tokens")]),
    Panel("Time in the queue", "Waiting time of requests in the queue.", "s",
          quantiles("vllm:request_queue_time_seconds")),
    Panel("Length of prompts and answers", "The 95th percentile, in tokens.", "short",
          [(quantile(0.95, "vllm:request_prompt_tokens"), "prompt"),
           (quantile(0.95, "vllm:request_generation_tokens"), "answer")]),
    Panel("Prefix cache", "Share of prompt tokens found in the cache.", "percentunit",
          [(f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}", "found")],
          maximum=1),
)

HEALTH = (
    Panel("Engine restarts", "Since the container started.", "short",
          [(gauge("shoehorn_engine_restarts_total"), "restarts")], 4, "value", steps=((0, GREEN), (1, YELLOW))),
    Panel("Step-downs", "Starts with a smaller plan after a failed one.", "short",
          [(gauge("shoehorn_engine_step_downs_total"), "step-downs")], 4, "value", steps=((0, GREEN), (1, YELLOW))),
    Panel("GPUs answer", "1 if NVML returned values of every GPU.", "none",
          [(f"min(shoehorn_gpu_collect_success{{{HERE}}})", "answer")], 4, "value", texts=YES_NO),
    Panel("Engine answers", "1 if the scrape contains the engine's metrics.", "none",
          [(f"min(shoehorn_engine_scrape_success{{{HERE}}})", "answers")], 4, "value", texts=YES_NO),
    Panel("Exporter answers", "1 if Prometheus could scrape the appliance.", "none",
          [(f"min(up{{{HERE}}})", "answers")], 4, "value", texts=YES_NO),
    Panel("Model volume", "Free share of the volume with the models.", "percentunit",
          [(f"{gauge('shoehorn_models_volume_free_bytes')} / {gauge('shoehorn_models_volume_bytes')}", "free")], 4,
          "value", steps=((0, RED), (0.05, YELLOW), (0.1, GREEN))),
    Panel("Failures", "Of the engine since the container started, by diagnosis.", "short",
          [(f"{gauge('shoehorn_engine_failures_total', 'diagnosis')}"
            ' or on () label_replace(vector(0), "diagnosis", "none", "", "")', "{{diagnosis}}")]),
    Panel("Start", "Seconds of each part of the last start.", "s",
          [(f"{gauge('shoehorn_start_seconds', 'part')}"
            ' or on () label_replace(vector(0), "part", "none", "", "")', "{{part}}")]),
    Panel("Replicas", "Of a front, whether each replica gets new requests; other roles have none.", "none",
          [(f"max by (replica) (shoehorn_replica_ready{{{HERE}}})"
            ' or on () label_replace(vector(0), "replica", "none", "", "")', "{{replica}}")]),
    Panel("Requests by replica", "Running requests of each replica of a front.", "short",
          [(f"sum by (replica) (shoehorn_replica_requests_running{{{HERE}}})"
            ' or on () label_replace(vector(0), "replica", "none", "", "")', "{{replica}}")]),
    Panel("Temperature", "Of each chip.", "celsius",
          [(f"shoehorn_gpu_temperature_celsius{{{HERE}}}", "GPU {{gpu}}")]),
    Panel("Power", "Of each GPU.", "watt", [(f"shoehorn_gpu_power_watts{{{HERE}}}", "GPU {{gpu}}")]),
    Panel("Utilization", "Share of time in which a kernel ran.", "percentunit",
          [(f"shoehorn_gpu_utilization_ratio{{{HERE}}}", "GPU {{gpu}}")], maximum=1),
    Panel("Throttled", "Reasons of reduced clocks.", "short",
          [(f"shoehorn_gpu_throttled{{{HERE}}}"
            ' or on () label_replace(vector(0), "reason", "not throttled", "", "")', "{{gpu}} {{reason}}")]),
    Panel("Xid errors", "Xid errors of each GPU per hour.", "short",
          [(f"3600 * rate(shoehorn_gpu_xid_errors_total{{{HERE}}}[{RATE}])", "GPU {{gpu}}: {{kind}}")]),
    Panel("Download", "Bytes of the model on disk, and its size; 0 while no model is pulled.", "bytes",
          [(f"{gauge('shoehorn_download_bytes')} or vector(0)", "on disk"),
           (f"{gauge('shoehorn_download_expected_bytes')} or vector(0)", "all")]),
    Panel("Scrape", "Duration of the answers of NVML and the engine.", "s",
          [(f"shoehorn_gpu_collect_duration_seconds{{{HERE}}}", "NVML"),
           (f"shoehorn_engine_scrape_duration_seconds{{{HERE}}}", "engine")]),
)

def used(period: str, by: str) -> str:
    """Query the tokens used in the current day or month; 0 before the first use."""
    tokens = gauge("shoehorn_usage_tokens", by, f',period="{period}"')
    return f'{tokens} or on () label_replace(vector(0), "{by.split(",")[0]}", "none", "", "")'


def budget_use(period: str) -> str:
    """Query the used share of each key's budget; 0 without budgets."""
    tokens = gauge("shoehorn_usage_tokens", "key", f',period="{period}"')
    budget = f'max by (key) (shoehorn_tokens_limit{{{HERE},period="{period}"}})'
    return f'({tokens} / {budget}) or on () label_replace(vector(0), "key", "none", "", "")'


REFUSALS = ',outcome=~"rate_limit_exceeded|concurrency_limit_exceeded|insufficient_quota"'

USAGE = (
    Panel("Tokens today", "Of each key since 00:00 UTC, prompts and answers.", "short",
          [(used("day", "key"), "{{key}}")], 12, "bars"),
    Panel("Tokens this month", "Of each key since the first day of the month (UTC), prompts and answers.", "short",
          [(used("month", "key"), "{{key}}")], 12, "bars"),
    Panel("Budget used today", "Share of tokens_per_day; at 100 % requests get status 429 until 00:00 UTC.",
          "percentunit", [(budget_use("day"), "{{key}}")], 12, "bars"),
    Panel("Budget used this month", "Share of tokens_per_month; at 100 % requests get status 429 until the next month.",
          "percentunit", [(budget_use("month"), "{{key}}")], 12, "bars"),
    Panel("Tokens by model", "Tokens of this month by model and kind.", "short",
          [(used("month", "model,kind"), "{{model}} {{kind}}")], 12, "bars"),
    Panel("Refused by key", "Requests per second that a limit or a budget of the key refused.", "reqps",
          [(f"({rate('shoehorn_requests_total', 'key,outcome', REFUSALS)})"
            ' or on () label_replace(vector(0), "key", "none", "", "")', "{{key}} {{outcome}}")], 12, "stack"),
    Panel("Prompt tokens by key", "Tokens read per second.", "none",
          [(rate("shoehorn_tokens_total", "key", ',kind="prompt"'), "{{key}}")], 12, "stack"),
    Panel("Generated tokens by key", "Tokens written per second.", "none",
          [(rate("shoehorn_tokens_total", "key", ',kind="completion"'), "{{key}}")], 12, "stack"),
)

DASHBOARDS: Mapping[str, tuple[str, Sequence[Panel]]] = {
    "overview": ("Shoehorn: overview", OVERVIEW), "vram": ("Shoehorn: VRAM", VRAM),
    "capacity": ("Shoehorn: capacity", CAPACITY), "health": ("Shoehorn: health", HEALTH),
    "usage": ("Shoehorn: usage", USAGE)}
