"""Quantization of a plan: the settings against the checkpoint's own format."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes import captured as captured_models
from shoehorn.common.errors import SettingsError
from shoehorn.int4.layout import BitWidths
from shoehorn.model import checkpoint as checkpoints
from shoehorn.planner.plan import Plan
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


def test_quantized_experts_on_a_cpu_need_amx() -> None:
    lite = checkpoints.read(captured_models.converted("deepseek-v2-lite-chat", BitWidths(16, 16)))
    without = machine(ram=64)
    with pytest.raises(SettingsError) as caught:
        plan_for(without, lite, VRAM_PROFILE="cpu")
    assert caught.value.code == "unsupported_processor"
    assert "QUANTIZATION=none" in caught.value.remedy
    plain = checkpoints.read(captured_models.files("deepseek-v2-lite-chat"))
    for hardware, shape in ((without, plain), (replace(without, amx=True), lite)):
        assert isinstance(plan_for(hardware, shape, VRAM_PROFILE="cpu"), Plan)
