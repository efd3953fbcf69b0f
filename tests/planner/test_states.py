"""Plans of models whose layers keep states of a sequence: sequences within the engine's blocks, states reported."""

from __future__ import annotations

from functools import cache

import pytest

from fakes import captured
from shoehorn.model.shape import ModelShape
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.plan import Plan
from support.plans import GIB, llama_8b, machine, planned, reason, refused

A100, L40S, A4000 = ("NVIDIA A100-PCIE-40GB", 39.3), ("NVIDIA L40S", 44.4), ("NVIDIA RTX A4000", 15.7)
HYBRIDS = ("qwen3.5-27b-fp8", "qwen3.5-9b", "nemotron-nano-9b-v2",
           "granite-4.0-h-tiny", "falcon-h1-7b-instruct", "lfm2-1.2b", "zamba2-7b-instruct", "jamba-v0.1",
           "kimi-linear-48b-a3b-instruct")


@cache
def shape(name: str) -> ModelShape:
    return captured.shape(name)


def blocks(plan: Plan, model: ModelShape) -> int:
    """Blocks of the plan's cache, as the engine counts them."""
    return int(str(plan.engine_args["kv-cache-memory-bytes"])) // MemoryModel(
        model, plan.config).cache_layouts[0].block_bytes


def test_attention_layers_alone_have_keys_and_values() -> None:
    """Qwen3.5-27B: 16 of 64 layers, 64 KiB a token; 48 states of 3 MiB."""
    (attention,), (states,) = shape("qwen3.5-27b-fp8").kv_layers, shape("qwen3.5-27b-fp8").state_layers
    assert attention.layers * attention.token_bytes(1, 2) == 64 << 10
    assert (states.layers, states.bytes(1, 0, 2)) == (48, 3_207_168)


@pytest.mark.parametrize(("gpu", "settings"), [
    (A100, {"MAX_MODEL_LEN": "4096"}), (L40S, {"VRAM_PROFILE": "48gb"}), (A100, {})])
def test_sequences_are_within_the_blocks_and_their_states(gpu: tuple[str, float], settings: dict[str, str]) -> None:
    model = shape("qwen3.5-27b-fp8")
    plan = planned(machine(gpu, ram=64), model, **settings)
    sequences = int(str(plan.engine_args["max-num-seqs"]))
    assert plan.states
    assert sequences == plan.states.sequences <= (blocks(plan, model) - 1) // 7, "three groups of two states, and keys"
    assert sequences > 8
    assert plan.states.per_layer == 2
    assert reason(plan, "max-num-seqs")[2] == "sequences-states"
    assert plan.offloaded_bytes == 0, "a profile's 256 sequences are an upper bound"


@pytest.mark.parametrize("name", HYBRIDS)
def test_no_plan_captures_graphs_for_more_sequences_than_blocks(name: str) -> None:
    """vLLM refuses such a start (vllm/config/compilation.py, resolve_cudagraph_mode_and_sizes)."""
    for settings in ({}, {"MAX_NUM_SEQS": "256"}, {"VRAM_PROFILE": "80gb"}):
        plan = planned(machine(("NVIDIA H100 80GB HBM3", 79.2), ram=256), shape(name), **settings)
        sequences = int(str(plan.engine_args["max-num-seqs"]))
        assert plan.engine_args["enforce-eager"] or sequences <= blocks(plan, shape(name)), (name, settings)


def test_given_sequences_that_the_cache_cannot_hold_are_refused_or_planned_without_graphs() -> None:
    model = shape("nemotron-nano-9b-v2")
    extra = {"MAX_NUM_SEQS": "1000", "VLLM_EXTRA_ARGS": f"--kv-cache-memory-bytes {2 * GIB} --no-enforce-eager"}
    assert refused(machine(A100), model, **extra).missing == "vram"
    assert planned(machine(A100), model, **{**extra, "MAX_NUM_SEQS": "50"}).engine_args["max-num-seqs"] == 50


def test_given_sequences_that_have_to_wait_for_states_are_named() -> None:
    few, many = (planned(machine(A100), shape("qwen3.5-27b-fp8"), VLLM_EXTRA_ARGS="--enforce-eager", MAX_NUM_SEQS=each)
                 for each in ("2", "1000"))
    texts = [[reason.text for reason in plan.reasons if reason.code == "sequences-wait"] for plan in (few, many)]
    assert texts[0] == []
    assert texts[1][0].endswith("of max-num-seqs 1000 the others wait")


def test_states_are_part_of_the_document() -> None:
    document = planned(machine(A100), shape("qwen3.5-27b-fp8")).to_json()
    assert document["states"]["layers"] == 48
    assert document["states"]["bytes_per_sequence"] == 2 * 48 * 3_211_264
    assert planned(machine(A100), llama_8b()).to_json()["states"] is None


def test_cpu_serves_as_many_sequences_as_it_has_states_for() -> None:
    plan = planned(machine(ram=64), shape("nemotron-nano-9b-v2"), VRAM_PROFILE="cpu")
    assert plan.states
    assert plan.engine_args["max-num-seqs"] == plan.states.sequences == 2


def test_small_gpu_keeps_the_context_that_attention_layers_alone_need() -> None:
    plan = planned(machine(A4000, ram=32), shape("granite-4.0-h-tiny"))
    assert int(str(plan.engine_args["max-model-len"])) >= 32_768
