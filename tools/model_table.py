"""Generator of docs/models.md: agreement of the planner with vLLM, by architecture.

Sources: the records in tests/captures/oracle, and tests/contract/differences.json, which the contract tier checks.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from shoehorn.common.paths import HOME
from shoehorn.model.compared import is_compared

GPUS = (1, 2, 4)
FIGURES = {"weights_bytes": "weights", "bytes_per_token": "KV cache per token", "state_bytes": "states",
           "request_bytes": "KV cache of a full request", "max_model_len": "context", "heads": "heads",
           "kv_heads": "KV heads", "head_size": "head size", "layers": "layers", "windows": "windows"}

_INTRODUCTION = """# Models

Comparison of the planner with vLLM 0.32.0, by architecture. vLLM builds each model on the meta device, without weights,
on {gpus} GPUs (tensor parallelism); the records are in `tests/captures/oracle`. A figure differs if it is off by more
than 1 %. Positive numbers: the planner expects more than vLLM needs; negative numbers: less, so the plan
may not fit. {right} of {records} records agree in all figures.

A record agrees, too, where vLLM refuses to divide the model over that many GPUs and the planner does. An architecture
all of whose records agree is planned with the measured activations of dense models; others get 50 % more, and the plan
says so. INT4 conversion, NF4 and offload by layers are limited to the architectures in `PLAIN`
(`src/shoehorn/model/shape.py`). Most configurations are written from knowledge of the public `config.json`, because the
hubs were unavailable; activations and the speed are not compared.

| architecture | all agree | records that agree | differences |
|---|---|---|---|
"""


def document() -> str:
    """Return the text of docs/models.md."""
    differences: dict[str, Any] = json.loads(
        (HOME / "tests" / "contract" / "differences.json").read_text(encoding="utf-8"))
    architectures: defaultdict[tuple[str, bool], list[Any]] = defaultdict(list)
    for path in sorted((HOME / "tests" / "captures" / "oracle").glob("*.json")):
        model = json.loads(path.read_text(encoding="utf-8"))
        architectures[str(model["config"].get("architectures", ["unknown"])[0]), _is_changed(model)] += [
            differences.get(f"{path.stem} on {gpus}", {}) for gpus in GPUS]
    entries = [entry for each in architectures.values() for entry in each]
    text = _INTRODUCTION.format(gpus=", ".join(map(str, GPUS)), right=entries.count({}), records=len(entries))
    return text + "".join(_row(*key, architectures[key]) for key in sorted(architectures))


def _is_changed(model: dict[str, Any]) -> bool:
    """Return whether a model is quantized or served with options of its own."""
    return bool(model["config"].get("quantization_config") or model.get("options") or model.get("files"))


def _row(name: str, is_changed: bool, entries: list[Any]) -> str:
    agrees = "yes" if is_compared(name) else "no"
    variant = ", quantized or with options" * is_changed
    right = f"{entries.count({})} of {len(entries)}"
    return f"| `{name}`{variant} | {agrees} | {right} | {'; '.join(_differences(entries))} |\n"


def _differences(entries: list[Any]) -> Iterable[str]:
    """Describe the figures that differ in any record of an architecture."""
    if "planner" in entries:
        yield f"the planner rejects the configuration ({entries.count('planner')})"
    if "oracle" in entries:
        yield f"no record of vLLM ({entries.count('oracle')})"
    compared = [entry for entry in entries if isinstance(entry, dict)]
    for figure, name in FIGURES.items():
        pairs = [entry[figure] for entry in compared if figure in entry]
        if pairs:
            yield f"{name} {_span(pairs)}"


def _span(pairs: list[list[Any]]) -> str:
    """Return the range of the deviation in percent, or the values where percentages have no meaning."""
    if any(isinstance(true, list) or not true for _, true in pairs):
        kinds = {"missing" if not planned else "wrong" if true else "not expected" for planned, true in pairs}
        return " or ".join(sorted(kinds))
    percent = sorted(round(100 * (planned / true - 1)) for planned, true in pairs)
    low, high = percent[0], percent[-1]
    return f"{low:+} %" if low == high else f"{low:+} to {high:+} %"
