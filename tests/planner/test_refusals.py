"""Refusals: each names the smallest changes that would do, and each of them does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes import captured as captured_models
from shoehorn.common.errors import SettingsError
from shoehorn.hardware.types import Hardware
from shoehorn.model import checkpoint as checkpoints
from shoehorn.planner.plan import Plan, Refusal
from support.plans import (
    GIB,
    HUGE,
    LARGE,
    MIDDLE,
    SMALL,
    llama_8b,
    llama_70b,
    machine,
    plan_for,
    planned,
    reason,
    refused,
)

SIX = ("made up", 6.0)


def test_the_70b_in_nf4_fits_7_gb_but_not_6_and_the_refusal_says_what_would() -> None:
    assert isinstance(plan_for(machine(SMALL), llama_70b()), Plan)
    refusal = refused(machine(SIX), llama_70b())
    assert refusal.missing == "vram"
    assert refusal.missing_bytes < GIB
    assert "embeddings (1.96 GiB)" in refusal.cause
    assert refusal.remedies[-2].startswith("a GPU with 6.")
    error = refusal.as_error()
    assert error.exit_code == 3
    assert refusal.remedies[0] in error.remedy
    document = refusal.to_json()
    assert (document["fits"], document["missing_bytes"]) == (False, refusal.missing_bytes)


def test_the_named_card_does_fit() -> None:
    size = float(refused(machine(SIX), llama_70b()).remedies[-2].split()[3])
    assert isinstance(plan_for(machine(("made up", size)), llama_70b()), Plan)
    assert isinstance(plan_for(machine(("made up", size - 0.5)), llama_70b()), Refusal)


TOO_LONG = {"MAX_MODEL_LEN": "24000", "VRAM_PROFILE": "32gb"}


def apply(remedy: str) -> dict[str, str]:
    """`A=1 with B='2'` as environment."""
    return dict(word.replace("'", "").split("=", 1) for word in remedy.split(" with "))


@pytest.mark.parametrize(("hardware", "shape", "environment", "expected"), [
    (machine(HUGE), llama_70b, {"VRAM_LIMIT": "6GiB"}, "VRAM_LIMIT="),
    (machine(HUGE), llama_70b, {"VLLM_EXTRA_ARGS": "--gpu-memory-utilization 0.035", "VRAM_PROFILE": "7gb"},
     "VLLM_EXTRA_ARGS='--gpu-memory-utilization"),
    (machine(LARGE), llama_70b, TOO_LONG, "MAX_MODEL_LEN="),
    (machine(LARGE), llama_70b, TOO_LONG, "MAX_NUM_SEQS=8 with VLLM_EXTRA_ARGS="),
    (machine(LARGE), llama_70b, TOO_LONG, "VLLM_EXTRA_ARGS='--cpu-offload-gb"),
    (machine(LARGE), llama_70b, TOO_LONG, "VLLM_EXTRA_ARGS='--enforce-eager'"),
    (machine(SMALL), llama_8b, {"QUANTIZATION": "none", "VLLM_EXTRA_ARGS": "--cpu-offload-gb 0"},
     "QUANTIZATION=bitsandbytes"),
])
def test_each_remedy_does_what_it_says(hardware: Hardware, shape: object, environment: dict[str, str],
                                       expected: str) -> None:
    model = shape()  # type: ignore[operator]  # a cached function
    refusal = refused(hardware, model, **environment)
    remedy = next(each for each in refusal.remedies if each.startswith(expected))
    changed = apply(remedy)
    if "VLLM_EXTRA_ARGS" in changed:
        changed["VLLM_EXTRA_ARGS"] = f"{environment.get('VLLM_EXTRA_ARGS', '')} {changed['VLLM_EXTRA_ARGS']}"
    assert isinstance(plan_for(hardware, model, **{**environment, **changed}), Plan), remedy


def test_too_little_host_memory_is_refused_with_what_is_missing() -> None:
    refusal = refused(machine(MIDDLE, ram=16), llama_70b())
    assert refusal.missing == "host_memory"
    enough = 16 + -(-refusal.missing_bytes // GIB)
    assert isinstance(plan_for(machine(MIDDLE, ram=enough), llama_70b()), Plan)
    assert isinstance(plan_for(machine(MIDDLE, ram=enough - 1), llama_70b()), Refusal)


def test_unknown_host_memory_is_not_checked_and_that_is_said() -> None:
    plan = planned(machine(MIDDLE, ram=0), llama_70b())
    assert "unknown" in reason(plan, "host-memory")[2]


def test_host_memory_that_others_hold_is_a_remark() -> None:
    plan = planned(replace(machine(MIDDLE), host_available_bytes=GIB), llama_70b())
    assert "only 1.00 GiB are free" in reason(plan, "host-memory")[2]


def test_a_full_disk_is_refused_before_anything_is_pulled() -> None:
    refusal = refused(machine(LARGE), llama_70b(), disk=100 * GIB)
    assert refusal.missing == "disk"
    assert refusal.missing_bytes == llama_70b().disk_bytes - 100 * GIB
    assert isinstance(plan_for(machine(LARGE), llama_70b(), llama_70b().disk_bytes), Plan)


def test_a_cache_on_the_cpu_that_is_too_small_names_the_context_that_fits() -> None:
    refusal = refused(machine(ram=64), llama_8b(), VRAM_PROFILE="cpu", MAX_MODEL_LEN="9000")
    assert "MAX_MODEL_LEN=8192" in refusal.remedies
    assert isinstance(plan_for(machine(ram=64), llama_8b(), VRAM_PROFILE="cpu", MAX_MODEL_LEN="8192"), Plan)


def test_a_model_larger_than_the_hosts_memory_names_quantization() -> None:
    refusal = refused(machine(ram=16), llama_8b(), VRAM_PROFILE="cpu")
    assert "QUANTIZATION=bitsandbytes" in refusal.remedies
    assert isinstance(plan_for(machine(ram=16), llama_8b(), VRAM_PROFILE="cpu", QUANTIZATION="bitsandbytes"), Plan)


def test_a_fixed_cache_counts_as_it_is() -> None:
    plan = planned(machine(MIDDLE), llama_8b(), VLLM_EXTRA_ARGS=f"--kv-cache-memory-bytes {GIB}")
    assert plan.kv_cache_tokens == 8192
    assert refused(machine(MIDDLE), llama_8b(), VLLM_EXTRA_ARGS=f"--kv-cache-memory-bytes {20 * GIB}").missing == "vram"


@pytest.mark.parametrize("name", ["llama-3.1-8b-instruct-gptq", "llama-3.3-70b-instruct-w4a16"])
def test_a_checkpoint_that_the_engine_no_longer_reads_is_refused_before_it_is_pulled(name: str) -> None:
    with pytest.raises(SettingsError, match="activation order") as told:
        plan_for(machine(HUGE), checkpoints.read(captured_models.files(name)), MODEL_ID=f"some/{name}")
    assert f"some/{name}" in told.value.cause
    assert "MODEL_ID" in told.value.remedy
    planned(machine(HUGE), checkpoints.read(captured_models.files(f"{name}@unordered")))


@pytest.mark.parametrize(("quantized", "unreadable"), [
    ({"quant_method": "gptq", "desc_act": True, "group_size": -1}, False),
    ({"quant_method": "gptq", "desc_act": False, "group_size": 128,
      "dynamic": {"+:.*down.*": {"desc_act": True}}}, True),
    ({"quant_method": "gptq", "desc_act": True, "group_size": 128}, True),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"actorder": "weight"}}}}, False),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"actorder": "dynamic"}}}}, True),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": None}}}, False),
])
def test_activation_order_is_refused_where_the_engine_refuses_it(quantized: dict[str, object],
                                                                 unreadable: bool) -> None:
    config = {**captured_models.config("llama-3.1-8b-instruct"), "quantization_config": quantized}
    shape = checkpoints.shape_of(config, captured_models.tensors("llama-3.1-8b-instruct"), 0)
    assert bool(shape.unreadable) == unreadable
