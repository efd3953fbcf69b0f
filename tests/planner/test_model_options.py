"""Options that change the model or the form of its cache: planned with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes import captured
from shoehorn.common.errors import SettingsError
from shoehorn.config import settings
from shoehorn.deployment import inputs
from shoehorn.deployment.served_model import config_overrides
from shoehorn.model import checkpoint
from shoehorn.model.kv_dtype import kv_cache_dtype
from shoehorn.model.shape import ModelShape
from shoehorn.planner.build import make_plan
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from shoehorn.planner.plan import Plan, Refusal
from support.plans import GIB, HUGE, MIDDLE, llama_8b, machine, planned, reason_of

H100 = ("NVIDIA H100 80GB HBM3", 79.2)
YARN = """
model: Qwen/Qwen3-8B
rope-scaling: '{"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":32768}'
max-model-len: LENGTH
"""


def plan_with_config(tmp_path: Path, text: str, gpu: tuple[str, float] = H100, **environment: str) -> Plan | Refusal:
    """Plan Qwen3-8B with vLLM's own configuration file, as a deployment does."""
    path = tmp_path / "own.yaml"
    path.write_text(text)
    loaded = settings.load({"VRAM_PROFILE": str(path), **environment})
    hardware = machine(gpu)
    profile = inputs.select_profile(loaded, hardware)
    shape = checkpoint.read(captured.files("qwen3-8b"), config_overrides(loaded, profile))
    return make_plan(PlanInputs(PlanSettings.of(loaded), hardware, profile, shape))


def test_yarn_of_an_old_configuration_is_planned_and_completed(tmp_path: Path) -> None:
    plan = plan_with_config(tmp_path, YARN.replace("LENGTH", "131072"))
    assert isinstance(plan, Plan)
    assert plan.engine_args["max-model-len"] == 131072
    assert plan.engine_args["hf-overrides"] == {"max_position_embeddings": 131072, "rope_parameters": {
        "rope_theta": 1000000, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    assert reason_of(plan, "hf-overrides").code == "overrides-completed"
    assert plan.kv_cache_tokens > 131072


def test_context_of_an_engine_configuration_is_planned_as_it_stands(tmp_path: Path) -> None:
    plan = plan_with_config(tmp_path, YARN.replace("LENGTH", "131072"), MIDDLE)
    assert isinstance(plan, Plan)
    assert plan.engine_args["max-model-len"] == 131072, "of a profile it would be an upper bound"


def test_context_beyond_the_scaled_limit_is_lowered_with_a_reason(tmp_path: Path) -> None:
    plan = plan_with_config(tmp_path, YARN.replace("LENGTH", "200000"))
    assert isinstance(plan, Plan)
    assert plan.engine_args["max-model-len"] == 131072
    assert reason_of(plan, "max-model-len").code == "model-limit"


def test_variable_of_the_engine_permits_a_longer_context(tmp_path: Path) -> None:
    text = "engine:\n  max-model-len: 60000\nenvironment:\n  VLLM_ALLOW_LONG_MAX_MODEL_LEN: 1\n"
    plan = plan_with_config(tmp_path, text)
    assert isinstance(plan, Plan)
    assert plan.config.limits.max_model_len == 60000
    assert isinstance(plan_with_config(tmp_path, text, MAX_MODEL_LEN="60000"), Plan)
    with pytest.raises(SettingsError, match="60000"):
        plan_with_config(tmp_path, "engine: {}\nmatch: {}\n", MAX_MODEL_LEN="60000")


def test_overrides_of_extra_arguments_win_over_the_profile(tmp_path: Path) -> None:
    plan = plan_with_config(tmp_path, YARN.replace("LENGTH", "40960"),
                            VLLM_EXTRA_ARGS='--hf-overrides \'{"max_position_embeddings": 50000}\'')
    assert isinstance(plan, Plan)
    assert plan.engine_args["hf-overrides"] == {"max_position_embeddings": 50000}
    assert reason_of(plan, "hf-overrides").code == "set"


@pytest.mark.parametrize(("quantization", "dtype"), [
    ({}, "auto"), ({"quant_method": "fp8"}, "auto"), ({"quant_method": "compressed-tensors"}, "auto"),
    ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "fp8"),
    ({"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}}, "fp8_e4m3"),
    ({"quant_method": "modelopt_fp4", "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}},
     "fp8_e4m3"),
    ({"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": True}}, "auto"),
    ({"quant_method": "modelopt_fp4", "quantization": {"kv_cache_quant_algo": "NVFP4"}}, "nvfp4"),
    ({"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "ODD"}}, "auto"),
])
def test_format_of_the_cache_that_a_checkpoint_asks_for(quantization: dict[str, Any], dtype: str) -> None:
    assert kv_cache_dtype(quantization) == dtype


@pytest.mark.parametrize(("shape", "option", "bytes_per_token"), [
    (llama_8b(), "auto", 131072), (llama_8b(), "fp8", 65536), (llama_8b(), "nvfp4", 36864),
    (llama_8b(), "int8_per_token_head", 65536 + 32 * 8 * 8), (llama_8b(), "turboquant_4bit_nc", 131072),
    (replace(llama_8b(), kv_cache_dtype="fp8_e4m3"), "auto", 65536),
    (replace(llama_8b(), kv_cache_dtype="fp8_e4m3"), "bfloat16", 131072)])
def test_format_of_the_cache_determines_its_tokens(shape: ModelShape, option: str, bytes_per_token: int) -> None:
    plan = planned(machine(H100), shape,
                   VLLM_EXTRA_ARGS=f"--kv-cache-dtype {option} --kv-cache-memory-bytes {8 * GIB}")
    assert plan.kv_cache_tokens == pytest.approx(8 * GIB / bytes_per_token, rel=0.001)


def test_without_the_hybrid_manager_windows_keep_all_tokens() -> None:
    shape = captured.shape("gemma-3-12b-it")
    extra = f"--kv-cache-memory-bytes {20 * GIB} --max-model-len 32768"
    hybrid, plain = (planned(machine(H100), shape, VLLM_EXTRA_ARGS=extra + switch).kv_cache_tokens
                     for switch in ("", " --disable-hybrid-kv-cache-manager"))
    assert plain == pytest.approx(20 * GIB / (48 * 16 * 256 * 2 * 2 / 2), rel=0.01)
    assert hybrid > 1.5 * plain


@pytest.mark.parametrize(("name", "each"), [("fp8", 1), ("fp8_per_block", 1), ("mxfp8", 33 / 32),
                                            ("int8_per_channel_weight_only", 1), ("nvfp4_per_token", 9 / 16)])
def test_weights_quantized_while_loading_are_planned_with(name: str, each: float) -> None:
    hardware, shape = machine(MIDDLE), llama_8b()
    whole = planned(machine(HUGE), shape, QUANTIZATION="none")
    plan = planned(hardware, shape, VLLM_EXTRA_ARGS=f"--quantization {name}")
    linears = shape.tensor_bytes.linears.parameters
    saved = whole.vram[0].weights_bytes - plan.vram[0].weights_bytes
    assert saved == pytest.approx(linears * (2 - each), rel=0.02)  # the allocator rounds
    assert plan.engine_args["quantization"] == name
    assert plan.offloaded_bytes == 0
