"""Memory model, plan and expected rates against every record of a GPU in bench/results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes import captured as captured_models
from shoehorn.common.units import GIB
from shoehorn.hardware.types import Gpu
from shoehorn.model import checkpoint as checkpoints
from shoehorn.model.shape import ModelShape
from shoehorn.planner import throughput
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.serving_config import Limits, ServingConfig, Speculation
from shoehorn.planner.vllm_args import with_options

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
H200 = Gpu(0, "", "NVIDIA H200", 140 * GIB, 140 * GIB, (9, 0), 5, 16, False)


def measured_shape(name: str) -> ModelShape:
    """A captured model as it was measured: the language part alone, with the positions that its config had then."""
    config, tensors = captured_models.config(name), captured_models.tensors(name)
    if "text_config" in config:
        config = {**config["text_config"], "architectures": ["Gemma3ForCausalLM"], "tie_word_embeddings": True}
        tensors = [tensor for tensor in tensors if tensor.name.startswith("language_model.")]
    return checkpoints.shape_of({**config, "max_position_embeddings": 131072}, tensors, 0)


def measured_model(shape: ModelShape, limit_bytes: int, options: dict[str, Any],
                   draft: ModelShape | None = None) -> MemoryModel:
    """The memory model of a start with these options of vLLM."""
    start = ServingConfig(limit_bytes, Limits(0, 0, 0), speculation=Speculation(draft=draft))
    return MemoryModel(shape, with_options(start, options))


RECORDED = json.loads((RESULTS / "estimator-h200.json").read_text())


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: str(case["name"]))
def test_estimate_is_near_the_measurement_of_the_h200(case: dict[str, Any]) -> None:
    arguments, measured, shape = case["args"], case["measured"], measured_shape(case["model"])
    model = measured_model(shape, 140 * GIB, {**arguments, "kv-cache-memory-bytes": measured["kv_cache_bytes"]})
    [parts] = model.gpus
    loaded = parts.weights_bytes + parts.quant_state_bytes + parts.embeddings_bytes
    assert loaded == pytest.approx(measured["weights_bytes"], rel=0.005)
    framework = measured["consumed_bytes"] - measured["weights_bytes"] + measured["context_bytes"]
    assert parts.framework_bytes == pytest.approx(framework, rel=0.05)
    assert 0.98 <= parts.total_bytes / measured["nvml_running_bytes"] <= 1.05
    assert model.kv_tokens(measured["kv_cache_bytes"]) == pytest.approx(measured["kv_cache_tokens"], rel=0.001)
    machine = RECORDED["machine"]
    gpu = replace(H200, link_bytes_per_second=machine["link_bytes_per_second"],
                   device_bytes_per_second=machine["device_copy_bytes_per_second"])
    rates = throughput.expected(model, gpu)
    assert rates["batch_1"] == pytest.approx(measured["tokens_per_second"]["batch_1"], rel=0.15)
    assert rates["batch_8"] == pytest.approx(measured["tokens_per_second"]["batch_8"], rel=0.18)


PLANNED = [(planned["machine"], case) for gpu in ("h200", "h100") for planned in [json.loads(
    (RESULTS / f"planned-{gpu}.json").read_text())]
           for case in planned["cases"] if case["started"]]


@pytest.mark.parametrize(("machine", "case"), PLANNED, ids=lambda of: of.get("gpu") or of["name"])
def test_planned_start_took_the_planned_memory(machine: dict[str, Any], case: dict[str, Any]) -> None:
    arguments, measured, name = case["args"], case["measured"], case["model"].removesuffix("@int4")
    shape = captured_models.shape(name if name == case["model"] else f"{name}@int4")
    draft = Path(arguments.get("speculative-config", {}).get("model", "")).name.removesuffix("@int4")
    model = measured_model(shape, case["expected"]["limit_bytes"], arguments,
                           captured_models.shape(f"{draft}@int4") if draft else None)
    parts = model.gpus[0]
    assert 0.98 <= parts.total_bytes / measured["nvml_peak_bytes"] <= 1.05
    assert model.kv_tokens(parts.kv_cache_bytes) == measured["kv_cache_tokens"]
    if not (model.offloaded.layers and model.config.nf4):  # there absmax moves last, after the engine has counted
        assert parts.weights_bytes + parts.quant_state_bytes + parts.embeddings_bytes == pytest.approx(
            measured["weights_bytes"], rel=0.02)
    if case["expected"].get("host_pinned_bytes"):  # older records have rounded pinned memory
        assert model.offloaded.pinned_bytes == pytest.approx(measured["pinned_bytes"], rel=0.005)
    gpu = replace(H200, link_bytes_per_second=machine["link_bytes_per_second"],
                   device_bytes_per_second=machine.get("device_copy_bytes_per_second")
                   or machine["device_read_bytes_per_second"] * throughput.COPY_SHARE)
    rates = throughput.expected(model, gpu)
    for batch, tokens in measured["tokens_per_second"].items():
        if batch in rates:
            assert rates[batch] == pytest.approx(tokens, rel=0.15 if batch == "batch_1" else 0.18)
