"""The estimate, plan and expected speed against every record of a GPU in bench/results."""

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
from shoehorn.planner.memory.estimate import estimate, kv_tokens
from shoehorn.planner.memory.offload import pinned_bytes
from shoehorn.planner.serving_config import Choices

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
H200 = Gpu(0, "", "NVIDIA H200", 140 * GIB, 140 * GIB, (9, 0), 5, 16, False)


def measured_shape(name: str) -> ModelShape:
    """A captured model as it was measured: the language part alone, with the positions of its config then."""
    config, tensors = captured_models.config(name), captured_models.tensors(name)
    if "text_config" in config:
        config = {**config["text_config"], "architectures": ["Gemma3ForCausalLM"], "tie_word_embeddings": True}
        tensors = [tensor for tensor in tensors if tensor.name.startswith("language_model.")]
    return checkpoints.shape_of({**config, "max_position_embeddings": 131072}, tensors, 0)


RECORDED = json.loads((RESULTS / "estimator-h200.json").read_text())


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: str(case["name"]))
def test_the_estimate_is_near_what_the_h200_showed(case: dict[str, Any]) -> None:
    arguments, measured, shape = case["args"], case["measured"], measured_shape(case["model"])
    chosen = Choices(
        limit_bytes=140 * GIB, max_model_len=arguments["max-model-len"], max_num_seqs=arguments["max-num-seqs"],
        max_num_batched_tokens=arguments["max-num-batched-tokens"], quantization=arguments.get("quantization"),
        eager=arguments.get("enforce-eager", False), kv_cache_bytes=measured["kv_cache_bytes"])
    [parts] = estimate(shape, chosen)
    held = parts.weights_bytes + parts.quant_state_bytes + parts.embeddings_bytes
    assert held == pytest.approx(measured["weights_bytes"], rel=0.005)
    framework = measured["consumed_bytes"] - measured["weights_bytes"] + measured["context_bytes"]
    assert parts.framework_bytes == pytest.approx(framework, rel=0.05)
    assert 0.98 <= parts.total_bytes / measured["nvml_running_bytes"] <= 1.05
    assert kv_tokens(shape, chosen, measured["kv_cache_bytes"]) == pytest.approx(measured["kv_cache_tokens"], rel=0.001)
    machine = RECORDED["machine"]
    card = replace(H200, link_bytes_per_second=machine["link_bytes_per_second"],
                   device_bytes_per_second=machine["device_copy_bytes_per_second"])
    found = throughput.expected(shape, chosen, card)
    assert found["batch_1"] == pytest.approx(measured["tokens_per_second"]["batch_1"], rel=0.15)
    assert found["batch_8"] == pytest.approx(measured["tokens_per_second"]["batch_8"], rel=0.18)


PLANNED = [(planned["machine"], case) for card in ("h200", "h100") for planned in [json.loads(
    (RESULTS / f"planned-{card}.json").read_text())]
           for case in planned["cases"] if case["started"]]


@pytest.mark.parametrize(("machine", "case"), PLANNED, ids=lambda of: of.get("gpu") or of["name"])
def test_a_planned_start_took_what_was_planned(machine: dict[str, Any], case: dict[str, Any]) -> None:
    arguments, measured, name = case["args"], case["measured"], case["model"].removesuffix("@int4")
    shape = checkpoints.read(captured_models.files(name) if name == case["model"] else captured_models.converted(name))
    group, guessing = arguments.get("offload-group-size", 0), arguments.get("speculative-config", {})
    draft = Path(guessing.get("model", "")).name.removesuffix("@int4")
    chosen = Choices(
        limit_bytes=case["expected"]["limit_bytes"], max_model_len=arguments["max-model-len"],
        max_num_seqs=arguments["max-num-seqs"], max_num_batched_tokens=arguments["max-num-batched-tokens"],
        quantization=arguments.get("quantization"), eager=arguments.get("enforce-eager", False),
        kv_cache_bytes=arguments["kv-cache-memory-bytes"], tensor_parallel=arguments.get("tensor-parallel-size", 1),
        offload_bytes=round(arguments.get("cpu-offload-gb", 0) * GIB),
        prefetch=(group, arguments["offload-num-in-group"], arguments["offload-prefetch-step"]) if group else (0, 0, 0),
        kv_dtype_bytes=1 if arguments.get("kv-cache-dtype") == "fp8" else 2,
        draft=checkpoints.read(captured_models.converted(draft)) if draft else None,
        speculative_tokens=guessing.get("num_speculative_tokens", 0),
        embedding_on_host="embedding" in arguments.get("additional-config", {}).get("shoehorn", {}))
    parts = estimate(shape, chosen)[0]
    assert 0.98 <= parts.total_bytes / measured["nvml_peak_bytes"] <= 1.05
    assert kv_tokens(shape, chosen, parts.kv_cache_bytes) == measured["kv_cache_tokens"]
    if not (group and chosen.quantization):  # there absmax moves last, after the engine has counted
        assert parts.weights_bytes + parts.quant_state_bytes + parts.embeddings_bytes == pytest.approx(
            measured["weights_bytes"], rel=0.02)
    if case["expected"].get("host_pinned_bytes"):  # since pinned memory is not rounded up any more
        assert pinned_bytes(shape, chosen) == pytest.approx(measured["pinned_bytes"], rel=0.005)
    card = replace(H200, link_bytes_per_second=machine["link_bytes_per_second"],
                   device_bytes_per_second=machine.get("device_copy_bytes_per_second")
                   or machine["device_read_bytes_per_second"] * throughput._COPY_SHARE)
    found = throughput.expected(shape, chosen, card)
    for batch, tokens in measured["tokens_per_second"].items():
        if batch in found:
            assert found[batch] == pytest.approx(tokens, rel=0.15 if batch == "batch_1" else 0.18)
