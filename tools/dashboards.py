"""Writes monitoring/grafana/dashboards/*.json: `make dashboards`. A test says when they are stale.

Rules: every panel has a title, a description, a unit and a legend; rates use `$__rate_interval`; every query is held to
the chosen appliance (`instance`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import DataSourceRef, GridPos

from shoehorn.paths import HOME

OUT = HOME / "monitoring" / "grafana" / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
HERE = 'instance=~"$instance"'
RATE = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """One panel; `queries` are (PromQL, legend). `stack` stacks its lines, `single` shows the last value only."""

    title: str
    description: str
    unit: str
    queries: Sequence[tuple[str, str]]
    width: int = 8
    stack: bool = False
    single: bool = False


def rate(metric: str, by: str = "") -> str:
    """The sum of a counter's rates."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{HERE}}}[{RATE}]))"


def quantile(share: float, metric: str) -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{{HERE}}}[{RATE}])))"


def gauge(metric: str, by: str = "", labels: str = "") -> str:
    """The sum of a gauge."""
    return f"sum{f' by ({by})' if by else ''} ({metric}{{{HERE}{labels}}})"


def quantiles(metric: str) -> list[tuple[str, str]]:
    """The median and the 95th percentile."""
    return [(quantile(0.5, metric), "median"), (quantile(0.95, metric), "95 %")]


OVERVIEW = (
    Panel("Phase", "What the appliance does just now.", "none",
          [(f"shoehorn_phase{{{HERE}}} == 1", "{{phase}}")], 4, single=True),
    Panel("Requests", "Requests that ended in this second.", "reqps", [(rate("vllm:request_success_total"), "all")], 4,
          single=True),
    Panel("Running", "Requests that are being computed.", "short", [(gauge("vllm:num_requests_running"), "running")], 4,
          single=True),
    Panel("Waiting", "Requests in the queue.", "short", [(gauge("vllm:num_requests_waiting"), "waiting")], 4,
          single=True),
    Panel("KV cache in use", "Share of the KV cache that holds running requests.", "percentunit",
          [(f"max(vllm:kv_cache_usage_perc{{{HERE}}})", "in use")], 4, single=True),
    Panel("VRAM free", "Free memory of the fullest card.", "bytes",
          [(f'min(shoehorn_vram_bytes{{{HERE},part="free"}})', "free")], 4, single=True),
    Panel("Tokens", "Tokens read from prompts and written in answers, each second.", "none",
          [(rate("vllm:prompt_tokens_total"), "read"), (rate("vllm:generation_tokens_total"), "written")]),
    Panel("Time to first token", "From the arrival of a request to its first token.", "s",
          quantiles("vllm:time_to_first_token_seconds")),
    Panel("Time per output token", "Between one token of an answer and the next.", "s",
          quantiles("vllm:inter_token_latency_seconds")),
    Panel("Queue", "Requests that run, and that wait.", "short",
          [(gauge("vllm:num_requests_running"), "running"), (gauge("vllm:num_requests_waiting"), "waiting")]),
    Panel("Requests by outcome", "Answers and refusals, as the gateway's middleware counts them.", "reqps",
          [(rate("shoehorn_requests_total", "outcome"), "{{outcome}}")], stack=True),
    Panel("Requests by key", "Who asks: names of keys, never the keys.", "reqps",
          [(rate("shoehorn_requests_total", "key"), "{{key}}")], stack=True),
    Panel("Preemptions", "Requests put back because the KV cache was full, each second.", "none",
          [(rate("vllm:num_preemptions_total"), "preempted")]),
    Panel("Ended", "Why answers ended: stop, length, abort, error.", "reqps",
          [(rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}")], stack=True),
    Panel("Prefix cache", "Share of prompt tokens that were found in the cache.", "percentunit",
          [(f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}", "found")]),
)

VRAM = (
    Panel("GPU $gpu: where its memory is", "Parts that add up to the card.", "bytes",
          [(gauge("shoehorn_vram_bytes", "part", ',gpu="$gpu"'), "{{part}}")], 16, stack=True),
    Panel("Now", "The same, as figures.", "bytes",
          [(gauge("shoehorn_vram_bytes", "part", ',gpu="$gpu"'), "{{part}}")], 8, single=True),
    Panel("Expected and measured", "What the plan said of each part, and what the engine said after its load.", "bytes",
          [(gauge("shoehorn_vram_expected_bytes", "part", ',gpu="$gpu"'), "{{part}}, expected"),
           (gauge("shoehorn_vram_bytes", "part", ',gpu="$gpu",part=~"weights|kv_cache|cuda_graphs|framework"'),
            "{{part}}, measured")], 12),
    Panel("KV cache, live", "Bytes of the KV cache that hold running requests, of what there is.", "bytes",
          [(f'max(vllm:kv_cache_usage_perc{{{HERE}}}) * '
            f'sum(shoehorn_vram_bytes{{{HERE},gpu="$gpu",part="kv_cache"}})', "in use"),
           (gauge("shoehorn_vram_bytes", "", ',gpu="$gpu",part="kv_cache"'), "all")], 12),
    Panel("By process", "Memory of each process that NVML shows.", "bytes",
          [(gauge("shoehorn_gpu_process_memory_bytes", "process,pid", ',gpu="$gpu"'), "{{process}} {{pid}}")], 12,
          stack=True),
    Panel("In host memory", "Weights that the engine reads over the link.", "bytes",
          [(gauge("shoehorn_offloaded_bytes"), "offloaded")], 6, single=True),
    Panel("KV cache holds", "Tokens for which there is room.", "short",
          [(gauge("shoehorn_kv_cache_tokens"), "tokens")], 6, single=True),
)

CAPACITY = (
    Panel("Written tokens over running requests", "Together: what more requests at a time bring.", "none",
          [(rate("vllm:generation_tokens_total"), "tokens/s"), (gauge("vllm:num_requests_running"), "running")], 12),
    Panel("Time per output token over running requests", "Together: what more requests at a time cost each one.", "s",
          quantiles("vllm:inter_token_latency_seconds"), 12),
    Panel("Tokens a second for each running request", "What one user sees.", "none",
          [(f"{rate('vllm:generation_tokens_total')} / clamp_min({gauge('vllm:num_requests_running')}, 1)", "each")],
          12),
    Panel("Room in the KV cache", "Tokens that could still be admitted.", "short",
          [(f"{gauge('shoehorn_kv_cache_tokens')} * (1 - max(vllm:kv_cache_usage_perc{{{HERE}}}))", "tokens")], 12),
    Panel("Time in the queue", "How long requests waited before anything was done.", "s",
          quantiles("vllm:request_queue_time_seconds"), 12),
    Panel("Length of prompts and answers", "The 95th percentile, in tokens.", "short",
          [(quantile(0.95, "vllm:request_prompt_tokens"), "prompt"),
           (quantile(0.95, "vllm:request_generation_tokens"), "answer")], 12),
)

HEALTH = (
    Panel("Engine restarts", "Since the container started.", "short",
          [(gauge("shoehorn_engine_restarts_total"), "restarts")], 4, single=True),
    Panel("Step-downs", "Starts with a smaller plan than the first.", "short",
          [(gauge("shoehorn_engine_step_downs_total"), "step-downs")], 4, single=True),
    Panel("GPUs answer", "1 when NVML gave figures of every card.", "short",
          [(f"min(shoehorn_gpu_collect_success{{{HERE}}})", "answer")], 4, single=True),
    Panel("Engine answers", "1 when the engine's metrics were part of the scrape.", "short",
          [(f"min(shoehorn_engine_scrape_success{{{HERE}}})", "answers")], 4, single=True),
    Panel("Model volume", "What is free of the volume with the models.", "bytes",
          [(gauge("shoehorn_models_volume_free_bytes"), "free"), (gauge("shoehorn_models_volume_bytes"), "size")], 8,
          single=True),
    Panel("Failures", "Of the engine, by diagnosis.", "short",
          [(gauge("shoehorn_engine_failures_total", "diagnosis"), "{{diagnosis}}")]),
    Panel("Temperature", "Of each chip.", "celsius",
          [(f"shoehorn_gpu_temperature_celsius{{{HERE}}}", "GPU {{gpu}}")]),
    Panel("Power", "Of each card.", "watt", [(f"shoehorn_gpu_power_watts{{{HERE}}}", "GPU {{gpu}}")]),
    Panel("Utilization", "Share of the time in which a kernel ran.", "percentunit",
          [(f"shoehorn_gpu_utilization_ratio{{{HERE}}}", "GPU {{gpu}}")]),
    Panel("Throttled", "Why a card's clocks are held down.", "short",
          [(f"shoehorn_gpu_throttled{{{HERE}}}", "GPU {{gpu}}: {{reason}}")]),
    Panel("Xid errors", "What the driver reports of a card, an hour.", "short",
          [(f"3600 * rate(shoehorn_gpu_xid_errors_total{{{HERE}}}[$__rate_interval])", "GPU {{gpu}}: {{kind}}")]),
    Panel("Download", "Bytes of the model on disk, of all that it has.", "bytes",
          [(gauge("shoehorn_download_bytes"), "there"), (gauge("shoehorn_download_expected_bytes"), "all")]),
    Panel("Scrape", "How long NVML and the engine took.", "s",
          [(f"shoehorn_gpu_collect_duration_seconds{{{HERE}}}", "NVML"),
           (f"shoehorn_engine_scrape_duration_seconds{{{HERE}}}", "engine")]),
)

DASHBOARDS = {"overview": ("Shoehorn: overview", OVERVIEW), "vram": ("Shoehorn: VRAM", VRAM),
              "capacity": ("Shoehorn: capacity", CAPACITY), "health": ("Shoehorn: health", HEALTH)}


def built(panel: Panel, number: int, place: GridPos) -> Any:
    """The SDK's builder of a panel."""
    made: Any
    if panel.single:
        made = stat.Panel().reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    else:
        made = timeseries.Panel().legend(
            VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
        ).tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI)).min(0)
        if panel.stack:
            made = made.stacking(StackingConfig().mode(StackingMode.NORMAL).group("A")).fill_opacity(60).line_width(0)
    made = (made.id(number).title(panel.title).description(panel.description).unit(panel.unit).datasource(SOURCE)
            .grid_pos(place))
    for letter, (query, legend) in zip("ABCDEF", panel.queries, strict=False):
        made = made.with_target(prometheus.Dataquery().ref_id(letter).expr(query).legend_format(legend))
    return made


def document(name: str) -> str:
    """A dashboard's JSON."""
    title, panels = DASHBOARDS[name]
    made = (dashboard.Dashboard(title).uid(f"shoehorn-{name}").tags(["shoehorn"]).refresh("30s").time("now-1h", "now")
            .timezone("browser").readonly()
            .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
            .with_variable(_query("instance", "Appliance", "label_values(shoehorn_info, instance)")))
    if name == "vram":
        made = made.with_variable(_query("gpu", "GPU", 'label_values(shoehorn_gpu_info{instance=~"$instance"}, gpu)'))
    left = top = row = 0
    for number, panel in enumerate(panels, 1):
        height = 4 if panel.single and panel.width <= 6 else 8
        if left + panel.width > 24:
            left, top, row = 0, top + row, 0
        row = max(row, height)
        made = made.with_panel(built(panel, number, GridPos(h=height, w=panel.width, x=left, y=top)))
        left += panel.width
    return json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(made.build())), indent=1, sort_keys=True) + "\n"


def _query(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return dashboard.QueryVariable(name).label(label).datasource(SOURCE).query(query)


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    for each in DASHBOARDS:
        (OUT / f"{each}.json").write_text(document(each), encoding="utf-8")
        print(OUT / f"{each}.json")
