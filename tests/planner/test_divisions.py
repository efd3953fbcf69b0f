"""Odd and unequal GPUs: the division that is expected to be the fastest, layers of each stage, and idle GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes import captured
from shoehorn.common.errors import SettingsError
from shoehorn.hardware.types import Hardware
from shoehorn.model.shape import ModelShape
from shoehorn.planner import throughput
from shoehorn.planner.plan import Plan
from shoehorn.planner.step_down import FailedStart, StepDown
from support.plans import GIB, LARGE, MIDDLE, TWENTY, llama_70b, machine, plan_for, planned, reason, tiny

SIXTEEN, TWELVE = ("NVIDIA GeForce RTX 4080", 15.6), ("NVIDIA GeForce RTX 3060", 11.6)
EIGHT = ("NVIDIA GeForce RTX 4060", 7.6)


@pytest.fixture(scope="module")
def int4() -> ModelShape:
    """A 70B in INT4: 36 GiB, 64 heads, 8 of keys and values."""
    return captured.shape("deepseek-r1-distill-llama-70b@int4")


def _division(plan: Plan) -> tuple[int, int]:
    return plan.config.parallelism.tensor, plan.config.parallelism.pipeline


@pytest.mark.parametrize(("gpus", "division"), [
    ((SIXTEEN,) * 2, (2, 1)), ((SIXTEEN,) * 3, (1, 3)), ((SIXTEEN,) * 4, (4, 1)), ((SIXTEEN,) * 5, (4, 1)),
    ((SIXTEEN,) * 7, (4, 1)), ((SIXTEEN,) * 8, (8, 1)), ((EIGHT,) * 7, (1, 7)), ((TWELVE,) * 5, (4, 1)),
    ((MIDDLE, SIXTEEN, EIGHT), (1, 3)), ((MIDDLE, MIDDLE, EIGHT), (2, 1))])
def test_odd_and_unequal_gpus_get_the_fastest_division(int4: ModelShape, gpus: tuple[tuple[str, float], ...],
                                                       division: tuple[int, int]) -> None:
    hardware = machine(*gpus)
    plan = planned(hardware, int4)
    assert _division(plan) == division
    others = [plan_for(hardware, int4, VLLM_EXTRA_ARGS=f"--tensor-parallel-size {tensor} "
                       f"--pipeline-parallel-size {stages}")
              for tensor in (1, 2, 4, 8) for stages in range(1, len(gpus) // tensor + 1)]
    speeds = [other.expected_tokens_per_second["batch_1"] for other in others if isinstance(other, Plan)]
    assert plan.expected_tokens_per_second["batch_1"] * 1.1 >= max(speeds)
    idle = len(gpus) - len(plan.gpus)
    assert [each.value for each in plan.reasons if each.option == "idle-gpus"] == [idle] * bool(idle)


def test_three_gpus_hold_what_two_would_offload(int4: ModelShape) -> None:
    three = planned(machine(SIXTEEN, SIXTEEN, SIXTEEN), int4)
    two = planned(machine(SIXTEEN, SIXTEEN), int4)
    assert three.offloaded_bytes == 0 < two.offloaded_bytes
    assert three.expected_tokens_per_second["batch_1"] > 4 * two.expected_tokens_per_second["batch_1"]
    assert reason(three, "pipeline-parallel-size") == (3, "machine", "fastest-division")


@pytest.mark.parametrize("gpus", [(MIDDLE, TWELVE), (TWELVE, MIDDLE), (LARGE, TWENTY, EIGHT), (TWELVE, EIGHT, MIDDLE)])
def test_layers_follow_the_memory_of_each_stage(gpus: tuple[tuple[str, float], ...]) -> None:
    shape = captured.shape("qwen2.5-32b-instruct-awq")
    options = f"--pipeline-parallel-size {len(gpus)}"
    plan = planned(machine(*gpus), shape, VLLM_EXTRA_ARGS=options)
    layers = [int(word) for word in plan.engine_environment["VLLM_PP_LAYER_PARTITION"].split(",")]
    assert sum(layers) == shape.layers
    assert layers == sorted(layers, reverse=True)
    assert [gpu.name for gpu in plan.gpus] == [name for name, _ in sorted(gpus, key=lambda gpu: -gpu[1])]
    assert all(parts.total_bytes <= parts.limit_bytes <= gpu.free_bytes
               for parts, gpu in zip(plan.vram, plan.gpus, strict=True))
    groups = [group.layers for group in plan.placement.groups]
    assert [len(group) for group in groups if group] == layers or plan.offloaded_bytes
    assert plan.engine_args["kv-cache-memory-bytes"] == max(parts.kv_cache_bytes for parts in plan.vram)
    share = plan.engine_args["gpu-memory-utilization"]
    assert all(share * gpu.total_bytes <= gpu.free_bytes for gpu in plan.gpus)


def test_even_pipeline_of_two_keeps_vllms_own_division() -> None:
    plan = planned(machine(TWENTY, TWENTY), llama_70b(), VLLM_EXTRA_ARGS="--pipeline-parallel-size 2")
    assert "VLLM_PP_LAYER_PARTITION" not in plan.engine_environment


@pytest.mark.parametrize("arguments", ["", "--pipeline-parallel-size 2"])
def test_own_partition_is_planned_with(int4: ModelShape, arguments: str) -> None:
    plan = planned(machine(LARGE, TWENTY), int4, VLLM_PP_LAYER_PARTITION="50,30", VLLM_EXTRA_ARGS=arguments)
    assert plan.engine_environment["VLLM_PP_LAYER_PARTITION"] == "50,30"
    assert plan.vram[0].weights_bytes > 1.5 * plan.vram[1].weights_bytes


@pytest.mark.parametrize("value", ["50,31", "80", "40,20,20"])
def test_impossible_partition_is_refused_before_the_engine_would(int4: ModelShape, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        plan_for(machine(LARGE, TWENTY), int4, VLLM_PP_LAYER_PARTITION=value,
                 VLLM_EXTRA_ARGS="--pipeline-parallel-size 2")
    assert caught.value.code == "invalid_partition"
    assert "80" in caught.value.remedy


def test_gpu_in_use_by_others_is_left_idle_or_gets_less(int4: ModelShape) -> None:
    hardware = machine(TWENTY, TWENTY, TWENTY)
    used = replace(hardware, gpus=(replace(hardware.gpus[0], free_bytes=4 * GIB), *hardware.gpus[1:]))
    plan = planned(used, int4)
    assert _division(plan) == (2, 1)
    assert [gpu.index for gpu in plan.gpus] == [1, 2]
    assert reason(plan, "idle-gpus")[0] == 1


def test_memory_in_use_on_one_gpu_does_not_limit_the_others(int4: ModelShape) -> None:
    hardware = machine(LARGE, TWENTY)
    used = replace(hardware, gpus=(hardware.gpus[0], replace(hardware.gpus[1], free_bytes=14 * GIB)))
    plan = planned(used, int4, VLLM_EXTRA_ARGS="--pipeline-parallel-size 2")
    assert [parts.limit_bytes // GIB for parts in plan.vram] == [29, 14]
    assert plan.engine_args["gpu-memory-utilization"] * hardware.gpus[1].total_bytes < 14 * GIB


def test_matrices_are_not_divided_over_gpus_of_two_generations(int4: ModelShape) -> None:
    hardware = machine(MIDDLE, MIDDLE)
    mixed = replace(hardware, gpus=(hardware.gpus[0], replace(hardware.gpus[1], name="NVIDIA GeForce RTX 3090",
                                                             compute_capability=(8, 6), total_bytes=23 * GIB,
                                                             free_bytes=23 * GIB)))
    assert _division(planned(hardware, int4)) == (2, 1)
    assert _division(planned(mixed, int4)) == (1, 2)


def test_stages_run_at_the_speed_of_their_gpus(int4: ModelShape) -> None:
    plan = planned(machine(LARGE, TWENTY), int4, VLLM_EXTRA_ARGS="--pipeline-parallel-size 2",
                   VLLM_PP_LAYER_PARTITION="50,30")
    model = _model(plan, int4)
    both = throughput.tokens_per_second(model, plan.gpus, 1)
    fast, slow = (throughput.tokens_per_second(model, (gpu,), 1) for gpu in plan.gpus)
    assert slow < both < fast
    assert 1 / both == pytest.approx(50 / 80 / fast + 30 / 80 / slow)


def test_step_down_frees_memory_of_the_fullest_unequal_gpu(int4: ModelShape) -> None:
    hardware: Hardware = machine(LARGE, TWENTY)
    plan = planned(hardware, int4, VLLM_EXTRA_ARGS="--pipeline-parallel-size 2")
    step = StepDown(_model(plan, int4), plan.fixed, plan.engine_args, min(gpu.total_bytes for gpu in plan.gpus),
                    64 * GIB).next_step(FailedStart(True, False, False, False, 0), 0)
    assert step is not None
    assert set(step.options) == {"gpu-memory-utilization"}, "the KV cache shrinks, nothing else"


def _model(plan: Plan, shape: ModelShape) -> throughput.MemoryModel:
    return throughput.MemoryModel(shape, plan.config)


def test_tiny_model_stays_on_one_gpu() -> None:
    assert _division(planned(machine(TWENTY, TWENTY, TWENTY), tiny())) == (1, 1)
