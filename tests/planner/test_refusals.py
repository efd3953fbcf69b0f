"""Refusals: each names the smallest changes that would be enough, and each of them is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fakes import captured as captured_models
from shoehorn.common.errors import SettingsError
from shoehorn.hardware.types import Hardware
from shoehorn.model import checkpoint as checkpoints
from shoehorn.model.shape import ModelShape
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.plan import Plan, Refusal
from shoehorn.planner.remedies import on_gpus_host
from shoehorn.planner.serving_config import ItemOptions, Limits, ServingConfig, UvaOffload
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
    reason_of,
    refused,
)

SIX = ("invented", 6.0)


def remedy_codes(refusal: Refusal) -> list[str]:
    return [remedy.code for remedy in refusal.remedies]


def settings_remedies(refusal: Refusal) -> list[dict[str, str]]:
    """The settings of all remedies that are settings."""
    return [remedy.value for remedy in refusal.remedies if remedy.code == "set"]


def test_70b_in_nf4_fits_7_gib_but_not_6() -> None:
    assert isinstance(plan_for(machine(SMALL), llama_70b()), Plan)
    refusal = refused(machine(SIX), llama_70b())
    assert refusal.missing == "vram"
    assert refusal.missing_bytes < GIB
    assert "embeddings (1.96 GiB)" in refusal.cause
    assert remedy_codes(refusal)[-2:] == ["larger-gpu", "smaller-model"]
    assert 6 < refusal.remedies[-2].value["gib"] < 7
    error = refusal.as_error()
    assert (error.exit_code, error.code) == (3, "gpu-memory-too-small")
    assert refusal.remedies[0].text in error.remedy
    document = refusal.to_json()
    assert (document["fits"], document["missing_bytes"]) == (False, refusal.missing_bytes)
    assert document["remedies"] == [remedy.text for remedy in refusal.remedies]
    assert document["remedy_codes"][-1] == {"code": "smaller-model", "value": None}


def test_named_gpu_is_large_enough() -> None:
    size = refused(machine(SIX), llama_70b()).remedies[-2].value["gib"]
    assert isinstance(plan_for(machine(("invented", size)), llama_70b()), Plan)
    assert isinstance(plan_for(machine(("invented", size - 0.5)), llama_70b()), Refusal)


TOO_LONG = {"MAX_MODEL_LEN": "24000", "VRAM_PROFILE": "32gb"}


@pytest.mark.parametrize(("hardware", "shape", "environment", "expected"), [
    (machine(HUGE), llama_70b, {"VRAM_LIMIT": "6GiB"}, "VRAM_LIMIT="),
    (machine(HUGE), llama_70b, {"VLLM_EXTRA_ARGS": "--gpu-memory-utilization 0.035", "VRAM_PROFILE": "7gb"},
     "VLLM_EXTRA_ARGS=--gpu-memory-utilization"),
    (machine(LARGE), llama_70b, TOO_LONG, "MAX_MODEL_LEN="),
    (machine(LARGE), llama_70b, TOO_LONG, "MAX_NUM_SEQS=8"),
    (machine(LARGE), llama_70b, TOO_LONG, "VLLM_EXTRA_ARGS=--cpu-offload-gb"),
    (machine(LARGE), llama_70b, TOO_LONG, "VLLM_EXTRA_ARGS=--enforce-eager"),
    (machine(SMALL), llama_8b, {"QUANTIZATION": "none", "VLLM_EXTRA_ARGS": "--cpu-offload-gb 0"},
     "QUANTIZATION=bitsandbytes"),
])
def test_each_remedy_is_enough(hardware: Hardware, shape: Callable[[], ModelShape], environment: dict[str, str],
                               expected: str) -> None:
    refusal = refused(hardware, shape(), **environment)
    [changed] = [dict(settings) for settings in settings_remedies(refusal)
                 if any(f"{name}={value}".startswith(expected) for name, value in settings.items())]
    if "VLLM_EXTRA_ARGS" in changed:
        changed["VLLM_EXTRA_ARGS"] = f"{environment.get('VLLM_EXTRA_ARGS', '')} {changed['VLLM_EXTRA_ARGS']}"
    assert isinstance(plan_for(hardware, shape(), **{**environment, **changed}), Plan), changed


def test_too_little_host_memory_is_refused_with_the_missing_bytes() -> None:
    refusal = refused(machine(MIDDLE, ram=16), llama_70b())
    assert refusal.missing == "host_memory"
    enough = 16 + -(-refusal.missing_bytes // GIB)
    assert isinstance(plan_for(machine(MIDDLE, ram=enough), llama_70b()), Plan)
    assert isinstance(plan_for(machine(MIDDLE, ram=enough - 1), llama_70b()), Refusal)


def test_unknown_host_memory_is_not_checked_and_is_remarked() -> None:
    plan = planned(machine(MIDDLE, ram=0), llama_70b())
    assert reason(plan, "host-memory")[2] == "host-memory-unknown"


def test_host_memory_used_by_others_is_remarked() -> None:
    plan = planned(replace(machine(MIDDLE), host_available_bytes=GIB), llama_70b())
    assert reason(plan, "host-memory")[2] == "host-memory-used"
    assert reason_of(plan, "host-memory").params == {"available": "1.00 GiB"}


def test_full_disk_is_refused_before_anything_is_pulled() -> None:
    refusal = refused(machine(LARGE), llama_70b(), disk=100 * GIB)
    assert (refusal.code, refusal.missing) == ("disk-too-small", "disk")
    assert refusal.missing_bytes == llama_70b().disk_bytes - 100 * GIB
    assert isinstance(plan_for(machine(LARGE), llama_70b(), llama_70b().disk_bytes), Plan)


def test_too_small_cache_on_the_cpu_names_the_context_that_fits() -> None:
    refusal = refused(machine(ram=64), llama_8b(), VRAM_PROFILE="cpu", MAX_MODEL_LEN="9000")
    assert settings_remedies(refusal) == [{"MAX_MODEL_LEN": "7936"}]
    assert isinstance(plan_for(machine(ram=64), llama_8b(), VRAM_PROFILE="cpu", MAX_MODEL_LEN="7936"), Plan)


def test_model_larger_than_host_memory_names_quantization() -> None:
    refusal = refused(machine(ram=16), llama_8b(), VRAM_PROFILE="cpu")
    assert remedy_codes(refusal) == ["more-host-memory", "set", "smaller-model"]
    assert settings_remedies(refusal) == [{"QUANTIZATION": "bitsandbytes"}]
    assert isinstance(plan_for(machine(ram=16), llama_8b(), VRAM_PROFILE="cpu", QUANTIZATION="bitsandbytes"), Plan)


def test_given_cache_size_is_used_as_it_is() -> None:
    plan = planned(machine(MIDDLE), llama_8b(), VLLM_EXTRA_ARGS=f"--kv-cache-memory-bytes {GIB}")
    assert plan.kv_cache_tokens == 8192
    assert refused(machine(MIDDLE), llama_8b(), VLLM_EXTRA_ARGS=f"--kv-cache-memory-bytes {20 * GIB}").missing == "vram"


@pytest.mark.parametrize("name", ["llama-3.1-8b-instruct-gptq", "llama-3.3-70b-instruct-w4a16"])
def test_unsupported_checkpoint_is_an_error_before_it_is_pulled(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        plan_for(machine(HUGE), captured_models.shape(name), MODEL_ID=f"some/{name}")
    assert caught.value.code == "unsupported_checkpoint"
    assert f"some/{name}" in caught.value.cause
    assert "MODEL_ID" in caught.value.remedy
    planned(machine(HUGE), captured_models.shape(f"{name}@unordered"))


@pytest.mark.parametrize(("quantized", "unreadable"), [
    ({"quant_method": "gptq", "desc_act": True, "group_size": -1}, False),
    ({"quant_method": "gptq", "desc_act": False, "group_size": 128,
      "dynamic": {"+:.*down.*": {"desc_act": True}}}, True),
    ({"quant_method": "gptq", "desc_act": True, "group_size": 128}, True),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"actorder": "weight"}}}}, False),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"actorder": "dynamic"}}}}, True),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": None}}}, False),
])
def test_activation_order_is_unsupported_where_the_engine_refuses_it(quantized: dict[str, object],
                                                                 unreadable: bool) -> None:
    config = {**captured_models.config("llama-3.1-8b-instruct"), "quantization_config": quantized}
    shape = checkpoints.shape_of(config, captured_models.tensors("llama-3.1-8b-instruct"), 0)
    assert bool(shape.unreadable) == unreadable


@pytest.mark.parametrize(("missing_gib", "text_only", "offered"), [(1, False, True), (99, False, False),
                                                                  (1, True, False)])
def test_too_little_host_memory_for_offload_offers_to_leave_encoders_out(missing_gib: int, text_only: bool,
                                                                        offered: bool) -> None:
    shape = checkpoints.read(captured_models.files("gemma-3-12b-it"))
    config = ServingConfig(16 * GIB, Limits(8192, 8, 2048), offload=UvaOffload(9 * GIB),
                           items=ItemOptions((), text_only))
    remedies = on_gpus_host(MemoryModel(shape, config), missing_gib * GIB)
    assert ({"VLLM_EXTRA_ARGS": "--language-model-only"} in [remedy.value for remedy in remedies]) == offered
