"""Comparison of the planner's figures with the oracle's: figures that differ by more than 1 %.

Rules: where vLLM refuses to divide a model over so many GPUs, the planner does, too; weights are the parameters, what
loading changes and the buffers (rotary tables); a model without headers or truth is left out with the reason that its
file gives; of windowed layers the windows are compared, of all caches together the bytes of a request of full length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from contract.oracle import planner_adapter

TOLERANCE = 0.01
NUMBERS = ("weights_bytes", "bytes_per_token", "state_bytes", "request_bytes", "max_model_len", "heads", "kv_heads",
           "head_size", "layers")


@dataclass(frozen=True)
class Row:
    """One model on one number of GPUs.

    Attributes:
        off: figure -> (planner's, oracle's), where they differ by more than the tolerance.
        refused: why the planner or the oracle has no figures; empty where both have.
    """

    name: str
    architecture: str
    gpus: int
    off: Mapping[str, tuple[Any, Any]]
    refused: str = ""


def compare(name: str, document: Mapping[str, Any], gpus: tuple[int, ...]) -> list[Row]:
    """Compare one model, on each number of GPUs."""
    architecture = str(document["config"].get("architectures", ["unknown"])[0])
    missing = document.get("missing", {})
    planned = planner_adapter.plan(document, gpus) if "tensors" in document else {}
    rows = []
    for number in gpus:
        truth = document.get("truth", {}).get(str(number))
        divides = planned.get(number, {}).get("divides")
        if divides is False and number > 1:
            rows.append(Row(name, architecture, number, {}, "" if truth is None else "planner: not divisible"))
        elif truth is None or not planned:
            reason = missing.get(f"truth.{number}") or missing.get("tensors") or "not computed"
            rows.append(Row(name, architecture, number, {}, f"oracle: {reason}"))
        elif "refused" in planned[number]:
            rows.append(Row(name, architecture, number, {}, f"planner: {planned[number]['refused'].splitlines()[0]}"))
        else:
            rows.append(Row(name, architecture, number, differences(planned[number], figures(truth))))
    return rows


def differences(planned: Mapping[str, Any], true: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Figure -> (planner's, oracle's), where they differ."""
    off = {key: (planned[key], true[key]) for key in NUMBERS if differs(planned[key], true[key])}
    return off if planned["windows"] == true["windows"] else {**off, "windows": (planned["windows"], true["windows"])}


def figures(truth: Mapping[str, Any]) -> dict[str, Any]:
    """The oracle's figures under the planner's names."""
    kv, architecture = truth["kv"], truth["architecture"]
    whole = architecture["whole"]
    longest = kv.get("request_blocks", {}).get(str(truth["max_model_len"]), 0)
    specs = kv["layers"].values()
    return {
        "weights_bytes": truth["weights_bytes"] + sum(truth["after_loading"].values()) + truth["buffers_bytes"],
        "bytes_per_token": kv["bytes_per_token"],
        "state_bytes": kv["state_bytes"],
        "request_bytes": longest * kv.get("pool_bytes_per_block", 0),
        "max_model_len": truth["max_model_len"],
        "heads": whole.get("total_num_attention_heads"), "kv_heads": whole.get("total_num_kv_heads"),
        "head_size": whole.get("head_size"), "layers": whole.get("total_num_hidden_layers"),
        "windows": sorted({spec["sliding_window"] for spec in specs if spec.get("sliding_window")}
                          | {spec["attention_chunk_size"] for spec in specs if spec.get("attention_chunk_size")}),
    }


def differs(planned: float, true: float | None) -> bool:
    """Return whether a figure is off by more than the tolerance."""
    return true is None or abs(planned - true) > TOLERANCE * abs(true)
