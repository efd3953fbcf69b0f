"""What Grafana's dashboards show: the panels, by dashboard. `tools/dashboards.py` makes JSON of them.

Rules: every panel has a title, a description, a unit and a legend; rates use `$__rate_interval`; every query is held to
the chosen appliance (`instance`); a query that may rightly find nothing says what stands for that, so that an empty
panel always means a fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

HERE = 'instance=~"$instance"'
RATE = "$__rate_interval"
GREEN, YELLOW, RED = "green", "yellow", "red"
YES_NO: Mapping[str, tuple[str, str]] = {"1": ("yes", GREEN), "0": ("no", RED)}
ONE_CARD = ',gpu="$gpu"'


@dataclass(frozen=True)
class Panel:
    """One panel; `queries` are (PromQL, legend).

    Attributes:
        kind: `lines` over time, `stack` of them, `value` for the present moment, `bars` for the present moment.
        steps: (from this value on, colour) of a `value`; the first one also holds below.
        words: what stands for a value, and its colour.
        names: a `value` shows its legend instead.
        outline: a legend that is drawn as a line over the stack.
        right: a legend with an axis of its own, and that axis' unit.
        most: the end of the axis.
    """

    title: str
    description: str
    unit: str
    queries: Sequence[tuple[str, str]]
    width: int = 8
    kind: Literal["lines", "stack", "value", "bars"] = "lines"
    steps: Sequence[tuple[float, str]] = ()
    words: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    names: bool = False
    outline: str = ""
    right: tuple[str, str] = ("", "")
    most: float | None = None


def rate(metric: str, by: str = "", labels: str = "") -> str:
    """The sum of a counter's rates."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{HERE}{labels}}}[{RATE}]))"


def quantile(share: float, metric: str) -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{{HERE}}}[{RATE}])))"


def gauge(metric: str, by: str = "", labels: str = "") -> str:
    """The sum of a gauge."""
    return f"sum{f' by ({by})' if by else ''} ({metric}{{{HERE}{labels}}})"


def quantiles(metric: str) -> list[tuple[str, str]]:
    """The median and the 95th percentile."""
    return [(quantile(0.5, metric), "median"), (quantile(0.95, metric), "95 %")]


def mean(metric: str) -> str:
    """The mean of a histogram."""
    return f"{rate(f'{metric}_sum')} / {rate(f'{metric}_count')}"


def usual(metric: str) -> str:
    """The mean of a histogram over all of the dashboard's time, so that an idle minute does not leave it open."""
    return mean(metric).replace(RATE, "$__range")


USUAL_LENGTH = f"({usual('vllm:request_prompt_tokens')} + {usual('vllm:request_generation_tokens')})"
BANDS = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 10**6))
"""So many requests at a time."""


def by_concurrency(query: str) -> list[tuple[str, str]]:
    """The mean of a query over the dashboard's time, apart for the moments at which so many requests ran."""
    running, found = gauge("vllm:num_requests_running"), []
    for least, most in BANDS:
        legend = f"{least} or more" if most == 10**6 else f"{least} to {most}" if most > least else str(least)
        found.append((f"avg_over_time((({query}) and on () ({running} >= {least} <= {most}))[$__range:$__interval])",
                      legend))
    return found


OVERVIEW = (
    Panel("Phase", "What the appliance does just now: ready, on the way, or failed.", "none",
          [(f'(shoehorn_phase{{{HERE},phase="ready"}} == 1) or 3 * (shoehorn_phase{{{HERE},phase="failed"}} == 1)'
            f' or 2 * (shoehorn_phase{{{HERE}}} == 1)', "{{phase}}")], 4, "value",
          steps=((0, GREEN), (2, YELLOW), (3, RED)), names=True),
    Panel("Alerts", "Which alerts fire.", "none",
          [(f'sum by (alertname) (ALERTS{{{HERE},alertstate="firing"}})'
            ' or on () label_replace(vector(0), "alertname", "none", "", "")', "{{alertname}}")], 4, "value",
          steps=((0, GREEN), (1, RED)), names=True),
    Panel("Requests", "Requests that ended, each second.", "reqps", [(rate("vllm:request_success_total"), "all")], 4,
          "value"),
    Panel("Failing", "Share of requests that failed for reasons of the server.", "percentunit",
          [(f"""({rate("shoehorn_requests_total", labels=',outcome=~"error|aborted"')} or vector(0))"""
            f" / clamp_min({rate('shoehorn_requests_total')} or vector(0), 0.001)", "failing")], 4, "value",
          steps=((0, GREEN), (0.01, YELLOW), (0.05, RED))),
    Panel("KV cache in use", "Share of the KV cache that holds running requests.", "percentunit",
          [(f"max(vllm:kv_cache_usage_perc{{{HERE}}})", "in use")], 4, "value",
          steps=((0, GREEN), (0.9, YELLOW), (0.98, RED))),
    Panel("VRAM free", "Free memory of the fullest card.", "bytes",
          [(f'min(shoehorn_vram_bytes{{{HERE},part="free"}})', "free")], 4, "value",
          steps=((0, RED), (64 << 20, YELLOW), (256 << 20, GREEN))),
    Panel("Tokens", "Tokens read from prompts and written in answers, each second.", "none",
          [(rate("vllm:prompt_tokens_total"), "read"), (rate("vllm:generation_tokens_total"), "written")]),
    Panel("Time to first token", "From the arrival of a request to its first token.", "s",
          quantiles("vllm:time_to_first_token_seconds")),
    Panel("Time per output token", "Between one token of an answer and the next.", "s",
          quantiles("vllm:inter_token_latency_seconds")),
    Panel("Queue", "Requests that run, and that wait.", "short",
          [(gauge("vllm:num_requests_running"), "running"), (gauge("vllm:num_requests_waiting"), "waiting")]),
    Panel("KV cache and preemptions", "How full the KV cache is, and how many requests are put back for it, each "
          "second.", "percentunit",
          [(f"max(vllm:kv_cache_usage_perc{{{HERE}}})", "in use"),
           (rate("vllm:num_preemptions_total"), "preempted")], right=("preempted", "none")),
    Panel("Requests by outcome", "Answers and refusals, as the gateway's middleware counts them.", "reqps",
          [(rate("shoehorn_requests_total", "outcome"), "{{outcome}}")], kind="stack"),
    Panel("Requests by key", "Who asks: names of keys, never the keys.", "reqps",
          [(rate("shoehorn_requests_total", "key"), "{{key}}")], kind="stack"),
    Panel("Tokens by key", "Tokens of answers that show their usage, by the key's name.", "none",
          [(rate("shoehorn_tokens_total", "key"), "{{key}}")], kind="stack"),
    Panel("Ended", "Why answers ended: stop, length, abort, error.", "reqps",
          [(rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}")], kind="stack"),
)

VRAM = (
    Panel("GPU $gpu: where its memory is", "Parts that add up to the card.", "bytes",
          [(gauge("shoehorn_vram_bytes", "part", ONE_CARD), "{{part}}"),
           (gauge("shoehorn_gpu_memory_total_bytes", "", ONE_CARD), "card")], 16, "stack", outline="card"),
    Panel("Now", "The same, as figures.", "bytes",
          [(gauge("shoehorn_vram_bytes", "part", ONE_CARD), "{{part}}")], 8, "bars"),
    Panel("Expected", "What the plan said of each part.", "bytes",
          [(gauge("shoehorn_vram_expected_bytes", "part", ONE_CARD), "{{part}}")], 6, "bars"),
    Panel("Measured", "What the engine said of the same parts after its load.", "bytes",
          [(gauge("shoehorn_vram_bytes", "part",
                  f'{ONE_CARD},part=~"weights|quant_state|kv_cache|cuda_graphs|framework|activations"'),
            "{{part}}")], 6, "bars"),
    Panel("KV cache, live", "Bytes of the KV cache that hold running requests, of what there is.", "bytes",
          [(f'max(vllm:kv_cache_usage_perc{{{HERE}}}) * '
            f'sum(shoehorn_vram_bytes{{{HERE}{ONE_CARD},part="kv_cache"}})', "in use"),
           (gauge("shoehorn_vram_bytes", "", f'{ONE_CARD},part="kv_cache"'), "all")], 12),
    Panel("By process", "Memory of each process that NVML shows.", "bytes",
          [(gauge("shoehorn_gpu_process_memory_bytes", "process,pid", ONE_CARD), "{{process}} {{pid}}")], 12,
          "stack"),
    Panel("In host memory", "Weights that the engine reads over the link.", "bytes",
          [(gauge("shoehorn_offloaded_bytes"), "offloaded")], 6, "value"),
    Panel("KV cache holds", "Tokens for which there is room.", "short",
          [(gauge("shoehorn_kv_cache_tokens"), "tokens")], 6, "value"),
)

CAPACITY = (
    Panel("Would still fit", "Requests of the usual length (mean of prompt and answer) for which the KV cache has room "
          "just now.", "short",
          [(f"{gauge('shoehorn_kv_cache_tokens')} * (1 - max(vllm:kv_cache_usage_perc{{{HERE}}})) / "
            f"{USUAL_LENGTH}", "requests")],
          6, "value"),
    Panel("Fit in all", "Requests of the usual length that the empty KV cache would hold.", "short",
          [(f"{gauge('shoehorn_kv_cache_tokens')} / {USUAL_LENGTH}", "requests")],
          6, "value"),
    Panel("Running", "Requests that are being computed.", "short", [(gauge("vllm:num_requests_running"), "running")], 6,
          "value"),
    Panel("Waiting", "Requests in the queue.", "short", [(gauge("vllm:num_requests_waiting"), "waiting")], 6, "value",
          steps=((0, GREEN), (1, YELLOW))),
    Panel("Time per output token by concurrency", "The mean over the dashboard's time, apart for the moments at which "
          "so many requests ran: what more users at a time cost each one.", "s",
          by_concurrency(mean("vllm:inter_token_latency_seconds")), 8, "bars"),
    Panel("Time to first token by concurrency", "The same for the wait before an answer begins.", "s",
          by_concurrency(mean("vllm:time_to_first_token_seconds")), 8, "bars"),
    Panel("Tokens a second by concurrency", "The same for all written tokens: what more users at a time bring.",
          "none", by_concurrency(rate("vllm:generation_tokens_total")), 8, "bars"),
    Panel("Time per output token", "And how many requests ran meanwhile, on the right.", "s",
          [*quantiles("vllm:inter_token_latency_seconds"), (gauge("vllm:num_requests_running"), "running")], 12,
          right=("running", "short")),
    Panel("Tokens a second for each running request", "What one user sees.", "none",
          [(f"{rate('vllm:generation_tokens_total')} / clamp_min({gauge('vllm:num_requests_running')}, 1)", "each")],
          12),
    Panel("Room in the KV cache", "Tokens that could still be admitted.", "short",
          [(f"{gauge('shoehorn_kv_cache_tokens')} * (1 - max(vllm:kv_cache_usage_perc{{{HERE}}}))", "tokens")]),
    Panel("Time in the queue", "How long requests waited before anything was done.", "s",
          quantiles("vllm:request_queue_time_seconds")),
    Panel("Length of prompts and answers", "The 95th percentile, in tokens.", "short",
          [(quantile(0.95, "vllm:request_prompt_tokens"), "prompt"),
           (quantile(0.95, "vllm:request_generation_tokens"), "answer")]),
    Panel("Prefix cache", "Share of prompt tokens that were found in the cache.", "percentunit",
          [(f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}", "found")], most=1),
)

HEALTH = (
    Panel("Engine restarts", "Since the container started.", "short",
          [(gauge("shoehorn_engine_restarts_total"), "restarts")], 4, "value", steps=((0, GREEN), (1, YELLOW))),
    Panel("Step-downs", "Starts with a smaller plan than the first.", "short",
          [(gauge("shoehorn_engine_step_downs_total"), "step-downs")], 4, "value", steps=((0, GREEN), (1, YELLOW))),
    Panel("GPUs answer", "Whether NVML gave figures of every card.", "none",
          [(f"min(shoehorn_gpu_collect_success{{{HERE}}})", "answer")], 4, "value", words=YES_NO),
    Panel("Engine answers", "Whether the engine's metrics were part of the scrape.", "none",
          [(f"min(shoehorn_engine_scrape_success{{{HERE}}})", "answers")], 4, "value", words=YES_NO),
    Panel("Exporter answers", "Whether Prometheus could scrape the appliance.", "none",
          [(f"min(up{{{HERE}}})", "answers")], 4, "value", words=YES_NO),
    Panel("Model volume", "What is free of the volume with the models.", "percentunit",
          [(f"{gauge('shoehorn_models_volume_free_bytes')} / {gauge('shoehorn_models_volume_bytes')}", "free")], 4,
          "value", steps=((0, RED), (0.05, YELLOW), (0.1, GREEN))),
    Panel("Failures", "Of the engine since the container started, by diagnosis.", "short",
          [(f"{gauge('shoehorn_engine_failures_total', 'diagnosis')}"
            ' or on () label_replace(vector(0), "diagnosis", "none", "", "")', "{{diagnosis}}")]),
    Panel("Temperature", "Of each chip.", "celsius",
          [(f"shoehorn_gpu_temperature_celsius{{{HERE}}}", "GPU {{gpu}}")]),
    Panel("Power", "Of each card.", "watt", [(f"shoehorn_gpu_power_watts{{{HERE}}}", "GPU {{gpu}}")]),
    Panel("Utilization", "Share of the time in which a kernel ran.", "percentunit",
          [(f"shoehorn_gpu_utilization_ratio{{{HERE}}}", "GPU {{gpu}}")], most=1),
    Panel("Throttled", "Why a card's clocks are held down.", "short",
          [(f"shoehorn_gpu_throttled{{{HERE}}}"
            ' or on () label_replace(vector(0), "reason", "not throttled", "", "")', "{{gpu}} {{reason}}")]),
    Panel("Xid errors", "What the driver reports of a card, an hour.", "short",
          [(f"3600 * rate(shoehorn_gpu_xid_errors_total{{{HERE}}}[{RATE}])", "GPU {{gpu}}: {{kind}}")]),
    Panel("Download", "Bytes of the model on disk, of all that it has; nothing while none is pulled.", "bytes",
          [(f"{gauge('shoehorn_download_bytes')} or vector(0)", "there"),
           (f"{gauge('shoehorn_download_expected_bytes')} or vector(0)", "all")]),
    Panel("Scrape", "How long NVML and the engine took.", "s",
          [(f"shoehorn_gpu_collect_duration_seconds{{{HERE}}}", "NVML"),
           (f"shoehorn_engine_scrape_duration_seconds{{{HERE}}}", "engine")]),
)

DASHBOARDS: Mapping[str, tuple[str, Sequence[Panel]]] = {
    "overview": ("Shoehorn: overview", OVERVIEW), "vram": ("Shoehorn: VRAM", VRAM),
    "capacity": ("Shoehorn: capacity", CAPACITY), "health": ("Shoehorn: health", HEALTH)}
