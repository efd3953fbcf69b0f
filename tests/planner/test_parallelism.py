"""Division of a model over GPUs: by its matrices where possible, else by its layers, else an error."""

from __future__ import annotations

import pytest

from fakes import captured as captured_models
from shoehorn.common.errors import SettingsError
from shoehorn.model import checkpoint as checkpoints
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
    lite = checkpoints.read(captured_models.converted("deepseek-v2-lite-chat", captured_models.INT4))
    two = planned(machine(TWENTY, TWENTY), lite)
    assert (two.engine_args.get("tensor-parallel-size"), two.engine_args["pipeline-parallel-size"]) == (None, 2)
    assert reason(two, "pipeline-parallel-size") == (2, "machine", "layers-only")
    with pytest.raises(SettingsError) as caught:
        plan_for(machine(TWENTY, TWENTY), lite, VRAM_PROFILE="2x20gb")
    assert caught.value.code == "groups_not_divisible"
    by_layers = caught.value.remedy.partition("'")[2].rstrip("'.")
    assert planned(machine(TWENTY, TWENTY), lite, VLLM_EXTRA_ARGS=by_layers).config.parallelism.pipeline == 2
    awq = checkpoints.read(captured_models.files("qwen2.5-32b-instruct-awq"))
    assert planned(machine(TWENTY, TWENTY), awq).config.parallelism.tensor == 2


def test_indivisible_heads_and_invalid_numbers_of_gpus_are_errors() -> None:
    with pytest.raises(SettingsError) as caught:
        plan_for(machine(LARGE, LARGE, LARGE), tiny(), VLLM_EXTRA_ARGS="--tensor-parallel-size 3")
    assert caught.value.code == "heads_not_divisible"
    with pytest.raises(SettingsError) as caught:
        plan_for(machine(LARGE), tiny(), VLLM_EXTRA_ARGS="--tensor-parallel-size 0")
    assert caught.value.code == "invalid_parallelism"
