"""Quantization of a plan: the settings against the checkpoint's own format."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fakes import captured as captured_models
from shoehorn.common.errors import SettingsError
from shoehorn.int4.layout import BitWidths
from shoehorn.model import checkpoint as checkpoints
from shoehorn.model.shape import ModelShape
from shoehorn.planner.plan import Plan, Refusal
from support.plans import (
    LARGE,
    MIDDLE,
    llama_8b,
    machine,
    plan_for,
    planned,
    quantized,
    reason,
    reason_of,
)


def test_quantization_none_serves_the_checkpoint_as_it_is() -> None:
    plan = planned(machine(MIDDLE), llama_8b(), QUANTIZATION="none")
    assert "quantization" not in plan.engine_args
    assert plan.vram[0].quant_state_bytes == 0
    assert reason(plan, "quantization")[1] == "setting"


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "fp8"])
def test_profile_does_not_quantize_a_quantized_checkpoint(method: str) -> None:
    assert "quantization" not in planned(machine(LARGE), quantized(method)).engine_args
    plan = planned(machine(LARGE), quantized(method), VRAM_PROFILE="32gb")
    assert "quantization" not in plan.engine_args
    assert reason(plan, "quantization")[1] == "model"
    assert reason_of(plan, "quantization").params == {"method": method}


@pytest.mark.parametrize("environment", [
    {"QUANTIZATION": "bitsandbytes"}, {"VLLM_EXTRA_ARGS": "--quantization bitsandbytes"},
])
def test_nf4_of_an_awq_checkpoint_is_an_error_that_names_both(environment: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as caught:
        plan_for(machine(LARGE), quantized("awq"), **environment)
    assert caught.value.code == "already_quantized"
    assert next(iter(environment)) in caught.value.cause
    assert "awq" in caught.value.cause


def test_another_kernel_for_the_same_checkpoint_is_accepted() -> None:
    plan = planned(machine(LARGE), quantized("awq"), VLLM_EXTRA_ARGS="--quantization awq_marlin")
    assert plan.engine_args["quantization"] == "awq_marlin"


def _mixture(bits: int = 16) -> ModelShape:
    return checkpoints.read(captured_models.converted("deepseek-v2-lite-chat", BitWidths(bits, 16)))


def _kernel_code(plan: Plan | Refusal) -> list[str]:
    assert isinstance(plan, Plan)
    return [reason.code for reason in plan.reasons if reason.option == "cpu-kernel"]


def test_cpu_kernel_multiplies_quantized_experts_without_amx() -> None:
    without = machine(ram=64)
    assert _kernel_code(plan_for(without, _mixture(), VRAM_PROFILE="cpu")) == ["cpu-kernel"]
    plain = captured_models.shape("deepseek-v2-lite-chat")
    assert _kernel_code(plan_for(without, plain, VRAM_PROFILE="cpu")) == []


@pytest.mark.parametrize(("hardware", "shape", "setting"), [
    ({"cpu_kernel": False}, {}, "auto"), ({}, {}, "off"), ({}, {"symmetric_int4": False}, "auto"),
    ({}, {"dtype": "float16"}, "auto")])
def test_quantized_experts_need_amx_without_the_cpu_kernel(hardware: dict[str, Any], shape: dict[str, Any],
                                                           setting: str) -> None:
    without, mixture = replace(machine(ram=64), **hardware), replace(_mixture(), **shape)
    with pytest.raises(SettingsError) as caught:
        plan_for(without, mixture, VRAM_PROFILE="cpu", CPU_COMPUTE=setting)
    assert caught.value.code == "unsupported_processor"
    assert "QUANTIZATION=none" in caught.value.remedy
    assert isinstance(plan_for(replace(without, amx=True), mixture, VRAM_PROFILE="cpu", CPU_COMPUTE=setting), Plan)


def test_plan_reports_the_kernel_of_int4_weights() -> None:
    dense = checkpoints.read(captured_models.converted("qwen3-8b", BitWidths(16, 16)))
    for hardware, setting, code in ((machine(ram=64), "auto", "cpu-kernel"),
                                    (machine(ram=64), "off", "cpu-kernel-engine"),
                                    (replace(machine(ram=64), cpu_kernel=False), "auto", "cpu-kernel-torch")):
        assert _kernel_code(plan_for(hardware, dense, VRAM_PROFILE="cpu", CPU_COMPUTE=setting)) == [code]


def test_quantized_embedding_on_a_cpu_needs_the_patch() -> None:
    shape = _mixture(4)
    assert shape.packed_embedding
    assert isinstance(plan_for(machine(ram=64), shape, VRAM_PROFILE="cpu"), Plan)
    with pytest.raises(SettingsError) as caught:
        plan_for(replace(machine(ram=64), amx=True), shape, VRAM_PROFILE="cpu", CPU_COMPUTE="off")
    assert caught.value.code == "unsupported_checkpoint"
