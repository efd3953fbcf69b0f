"""docs/metrics.md, from the tables in shoehorn.observability.metrics."""

from __future__ import annotations

from shoehorn.observability.metrics import ENGINE, PER_KEY, TABLE

_INTRODUCTION = """# Metrics

`GET /metrics` on `METRICS_PORT` (6334) answers from the first second, in Prometheus' text format 0.0.4. One scrape
contains the appliance's own metrics and, once the engine listens, all of the engine's. Unknown and unsupported values
are absent, never 0, and no value is repeated from an earlier scrape: `shoehorn_engine_scrape_success` and
`shoehorn_gpu_collect_success` distinguish "none" from "not measured".
`monitoring/prometheus/prometheus.yml` scrapes it.

## The appliance's own

GPU series exist for each GPU that answered, as far as its driver supports them; its Xid errors remain after it is lost.

| metric | type | labels | meaning |
|---|---|---|---|
"""

_ENGINE_INTRODUCTION = """
## The engine's

Everything that vLLM exposes, unchanged, with the labels `model_name` and `engine`. The most useful ones:

| metric | meaning |
|---|---|
"""


_PER_KEY_INTRODUCTION = """
## For each key

Counted by the appliance inside the engine's API server, with the label `key`: the key's name. They restart at 0 with
the engine.

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
