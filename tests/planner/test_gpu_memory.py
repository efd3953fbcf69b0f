"""Use of the GPUs by a plan: share, limit, KV cache, dtype, CUDA graphs, allocator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fakes import captured as captured_models
from shoehorn.common.errors import SettingsError
from shoehorn.engine.environment import engine_environment
from shoehorn.planner.gpu_share import ALLOCATOR
from shoehorn.planner.memory.model import CONTEXT_BYTES, MARGIN_BYTES
from support.plans import (
    CPU_ONLY,
    GIB,
    HUGE,
    LARGE,
    MIDDLE,
    TWENTY,
    llama_8b,
    machine,
    plan_for,
    planned,
    reason,
    reason_of,
    tiny,
)


def test_larger_share_is_used_where_that_keeps_all_weights_on_the_gpus() -> None:
    shape = captured_models.shape("deepseek-r1-distill-llama-70b@int4")
    plan = planned(machine(TWENTY, TWENTY), shape)
    assert reason(plan, "gpu-memory-utilization") == (0.97, "machine", "keeps-weights-on-gpu")
    assert (plan.offloaded_bytes, plan.config.limits.max_model_len) == (0, 4096)
    assert all(parts.total_bytes <= parts.limit_bytes < 19.7 * GIB for parts in plan.vram)
    by_user = planned(machine(TWENTY, TWENTY), shape, VLLM_EXTRA_ARGS="--gpu-memory-utilization 0.92")
    assert by_user.offloaded_bytes
    assert planned(machine(TWENTY), shape).engine_args["gpu-memory-utilization"] == 0.92, "it would not be enough"


def test_fewer_cuda_graphs_are_preferred_to_none() -> None:
    shape = captured_models.shape("deepseek-r1-distill-llama-70b@int4")
    gpu = (TWENTY[0], 21_023_948_800 / GIB)  # a modified RTX 3080, which has not quite 20 GiB
    plan = planned(machine(gpu, gpu), shape)
    assert plan.engine_args["enforce-eager"] is False
    assert reason(plan, "max-cudagraph-capture-size") == (4, "machine", "capture-fewer")
    none = planned(machine(gpu, gpu), shape, VLLM_EXTRA_ARGS="--enforce-eager")
    one, eight = (tuple(float(each.expected_tokens_per_second[batch] or 0) for each in (plan, none))
                  for batch in ("batch_1", "batch_8"))
    assert one[0] > 1.5 * one[1] > 0
    assert eight[0] == pytest.approx(max(eight[1], one[0]), rel=0.05), "eight requests have no graph"
    fixed = planned(machine(gpu, gpu), shape, VLLM_EXTRA_ARGS="--max-cudagraph-capture-size 8")
    assert fixed.engine_args["enforce-eager"] is True, "the user's value is not changed, and does not fit with graphs"


@pytest.mark.parametrize("profile", ["auto", "7gb", "2x20gb"])
def test_missing_gpu_is_an_error_that_names_the_option(profile: str) -> None:
    with pytest.raises(SettingsError, match="GPU") as caught:
        plan_for(CPU_ONLY, tiny(), VRAM_PROFILE=profile)
    assert "--gpus" in caught.value.remedy


def test_one_gpu_is_too_few_for_a_profile_of_two() -> None:
    with pytest.raises(SettingsError, match="needs 2 GPUs"):
        plan_for(machine(LARGE), llama_8b(), VRAM_PROFILE="2x20gb")


def test_gpu_without_bf16_gets_float16() -> None:
    turing = captured_models.machine("t4-16-ram64")
    plan = planned(turing, llama_8b())
    assert reason(plan, "dtype") == ("float16", "machine", "no-bfloat16")
    named = planned(turing, llama_8b(), VRAM_PROFILE="7gb")
    assert named.engine_args["dtype"] == "float16", "a profile's bfloat16 is replaced"
    with pytest.raises(SettingsError, match="Tesla T4") as caught:
        plan_for(turing, llama_8b(), VLLM_EXTRA_ARGS="--dtype bfloat16")
    assert caught.value.code == "unsupported_dtype"
    with pytest.raises(SettingsError, match="Gemma3ForConditionalGeneration") as caught:
        plan_for(turing, captured_models.shape("gemma-3-12b-it"))
    assert caught.value.code == "unsupported_dtype"


def test_cache_size_is_fixed_unless_the_share_of_the_gpu_is() -> None:
    plan = planned(machine(MIDDLE), llama_8b())
    assert plan.engine_args["kv-cache-memory-bytes"] == plan.vram[0].kv_cache_bytes > GIB
    by_share = planned(machine(MIDDLE), llama_8b(), VLLM_EXTRA_ARGS="--gpu-memory-utilization 0.8")
    assert "kv-cache-memory-bytes" not in by_share.engine_args


def test_small_gpu_gets_one_request_without_offload_rather_than_two_with_it() -> None:
    plan = planned(captured_models.machine("rtx4060-8-ram64"), llama_8b())
    assert not plan.offloaded_bytes
    assert plan.engine_args["max-model-len"] == 4096


def test_mig_is_unsupported() -> None:
    hardware = machine(LARGE)
    divided = replace(hardware, gpus=(replace(hardware.gpus[0], mig=True),))
    with pytest.raises(SettingsError) as caught:
        plan_for(divided, tiny())
    assert caught.value.code == "unsupported_mig"


def test_vram_limit_contradicts_the_cpu_profile() -> None:
    with pytest.raises(SettingsError) as caught:
        plan_for(CPU_ONLY, tiny(), VRAM_PROFILE="cpu", VRAM_LIMIT="7GiB")
    assert caught.value.code == "vram_limit_without_gpu"


@pytest.mark.parametrize("limit", [7, 10, 24])
def test_context_and_share_together_never_exceed_the_limit(limit: int) -> None:
    plan = planned(machine(HUGE), llama_8b(), VRAM_LIMIT=f"{limit}GiB")
    share, source, code = reason(plan, "gpu-memory-utilization")
    assert isinstance(share, float)
    assert share * 139.8 * GIB + CONTEXT_BYTES <= limit * GIB
    assert (source, code) == ("setting", "vram-limit")
    assert plan.vram[0].total_bytes <= plan.vram[0].limit_bytes <= limit * GIB


def test_memory_used_by_another_process_is_left_alone() -> None:
    hardware = machine(LARGE)
    shared = replace(hardware, gpus=(replace(hardware.gpus[0], free_bytes=20 * GIB),))
    plan = planned(shared, llama_8b())
    assert plan.vram[0].total_bytes <= 20 * GIB
    assert reason(plan, "gpu-memory-utilization")[1:] == ("machine", "free-memory")
    assert reason_of(plan, "gpu-memory-utilization").params == {"limit": "20.00 GiB", "context": "528 MiB"}


def test_given_share_is_used_and_the_contradiction_is_noted() -> None:
    plan = planned(machine(HUGE), llama_8b(), VRAM_LIMIT="10GiB", VLLM_EXTRA_ARGS="--gpu-memory-utilization 0.5")
    share = reason_of(plan, "gpu-memory-utilization")
    assert (share.value, share.source, share.notes) == (0.5, "setting", ("exceeds-vram-limit",))
    assert "10.00 GiB" in share.text


def test_fp8_kv_cache_doubles_the_tokens() -> None:
    fixed = "--max-num-seqs 16 --max-num-batched-tokens 2048 --max-model-len 8192"
    plain = planned(machine(MIDDLE), llama_8b(), VLLM_EXTRA_ARGS=fixed)
    small = planned(machine(MIDDLE), llama_8b(), VLLM_EXTRA_ARGS=f"{fixed} --kv-cache-dtype fp8")
    assert small.kv_cache_tokens == pytest.approx(2 * plain.kv_cache_tokens, rel=0.01)


def test_allocator_is_bounded_by_the_limit() -> None:
    limited = planned(machine(HUGE, ram=200), llama_8b(), VRAM_LIMIT="8GiB").engine_environment
    assert limited == {ALLOCATOR: "expandable_segments:True,per_process_memory_fraction:0.0535",
                       "CUDA_VISIBLE_DEVICES": "GPU-0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert float(limited[ALLOCATOR].rpartition(":")[2]) * 139.8 <= 8 - 0.515
    whole = planned(machine(LARGE), llama_8b()).engine_environment[ALLOCATOR]
    assert 0.85 < float(whole.rpartition(":")[2]) <= 0.93
    assert planned(CPU_ONLY, tiny(), VRAM_PROFILE="cpu").engine_environment == {}


def test_users_allocator_wins_over_the_plans(tmp_path: Path) -> None:
    plan = {ALLOCATOR: "expandable_segments:True"}
    for name in (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF"):
        environment = {name: "max_split_size_mb:64"}
        result = engine_environment(environment, plan, tmp_path)
        assert {key: value for key, value in result.items() if "ALLOC_CONF" in key} == environment
    assert engine_environment({}, plan, tmp_path)[ALLOCATOR] == plan[ALLOCATOR]


def test_share_leaves_a_margin_for_the_context() -> None:
    plan = planned(machine(HUGE, ram=200), llama_8b(), VRAM_LIMIT="8GiB")
    share = plan.engine_args["gpu-memory-utilization"]
    assert isinstance(share, float)
    assert share * 139.8 * GIB <= 8 * GIB - CONTEXT_BYTES - MARGIN_BYTES
