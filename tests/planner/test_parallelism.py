"""Division of a model over GPUs: by its matrices where possible, else by its layers, else an error."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes import captured as captured_models
from shoehorn.common.errors import SettingsError
from shoehorn.hardware.types import Hardware
from support.plans import LARGE, TWENTY, machine, nf4_checkpoint, plan_for, planned, reason, tiny


def test_nf4_checkpoint_is_divided_by_layers_only() -> None:
    assert "quantization" not in planned(machine(LARGE), nf4_checkpoint()).engine_args
    two = planned(machine(TWENTY, TWENTY), nf4_checkpoint())
    assert (two.engine_args.get("tensor-parallel-size"), two.engine_args["pipeline-parallel-size"]) == (None, 2)
    assert two.vram[0].embeddings_bytes == two.vram[1].embeddings_bytes > 0  # the embedding here, the head there
    assert len({parts.kv_cache_bytes for parts in two.vram}) == 1
    with pytest.raises(SettingsError) as caught:
        plan_for(machine(TWENTY, TWENTY), nf4_checkpoint(), VRAM_PROFILE="2x20gb")
    assert caught.value.code == "nf4_checkpoint_not_divisible"
    assert "--pipeline-parallel-size 2" in caught.value.remedy


def test_groups_of_quantized_weights_stay_whole() -> None:
    lite = captured_models.shape("deepseek-v2-lite-chat@int4")
    two = planned(machine(TWENTY, TWENTY), lite)
    assert (two.engine_args.get("tensor-parallel-size"), two.engine_args["pipeline-parallel-size"]) == (None, 2)
    assert reason(two, "pipeline-parallel-size") == (2, "machine", "layers-only")
    with pytest.raises(SettingsError) as caught:
        plan_for(machine(TWENTY, TWENTY), lite, VRAM_PROFILE="2x20gb")
    assert caught.value.code == "groups_not_divisible"
    by_layers = caught.value.remedy.partition("'")[2].rstrip("'.")
    assert planned(machine(TWENTY, TWENTY), lite, VLLM_EXTRA_ARGS=by_layers).config.parallelism.pipeline == 2
    awq = captured_models.shape("qwen2.5-32b-instruct-awq")
    assert planned(machine(TWENTY, TWENTY), awq).config.parallelism.tensor == 2


def test_indivisible_heads_and_invalid_numbers_of_gpus_are_errors() -> None:
    with pytest.raises(SettingsError) as caught:
        plan_for(machine(LARGE, LARGE, LARGE), tiny(), VLLM_EXTRA_ARGS="--tensor-parallel-size 3")
    assert caught.value.code == "heads_not_divisible"
    with pytest.raises(SettingsError) as caught:
        plan_for(machine(LARGE), tiny(), VLLM_EXTRA_ARGS="--tensor-parallel-size 0")
    assert caught.value.code == "invalid_parallelism"


def _distinct(*gpus: tuple[str, float]) -> Hardware:
    """A machine whose GPUs have other numbers for NVML than for CUDA."""
    hardware = machine(*gpus)
    return replace(hardware, gpus=tuple(replace(gpu, index=number + 4, ordinal=number)
                                        for number, gpu in enumerate(hardware.gpus)))


@pytest.mark.parametrize(("named", "uuids"), [("1", "GPU-1"), ("GPU-1", "GPU-1"), ("2, 1", "GPU-2,GPU-1")])
def test_device_ids_select_the_gpus_and_reach_the_engine_by_uuid(named: str, uuids: str) -> None:
    plan = planned(_distinct(TWENTY, TWENTY, TWENTY), tiny(), VLLM_EXTRA_ARGS=f"--device-ids '{named}'")
    assert plan.engine_args["device-ids"] == plan.engine_environment["CUDA_VISIBLE_DEVICES"] == uuids
    assert [gpu["uuid"] for gpu in plan.to_json()["gpus"]] == uuids.split(",")
    assert [gpu.index for gpu in plan.gpus] == [4 + int(uuid[-1]) for uuid in uuids.split(",")]


@pytest.mark.parametrize("named", ["7", "GPU-9", "1,1", "4"])
def test_unknown_device_ids_are_errors_that_list_the_gpus(named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        plan_for(_distinct(TWENTY, TWENTY), tiny(), VLLM_EXTRA_ARGS=f"--device-ids {named}")
    assert caught.value.code == "unknown_device"
    assert "0: NVIDIA" in caught.value.cause


def test_plan_names_idle_gpus_and_those_left_out() -> None:
    remark = "GPU 7 (Tesla P4) is not used: too old"
    plan = planned(replace(_distinct(TWENTY, TWENTY), gpu_remarks=(remark,)), tiny(), VRAM_PROFILE="24gb")
    texts = [each.text for each in plan.reasons]
    assert remark in texts
    assert any("GPU 5" in text for text in texts)
    assert plan.engine_environment["CUDA_VISIBLE_DEVICES"] == "GPU-0"
