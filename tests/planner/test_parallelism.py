"""A model divided over GPUs: by its matrices where it can be, else by its layers, else refused."""

from __future__ import annotations

import pytest

from fakes import captured as captured_models
from shoehorn.common.errors import SettingsError
from shoehorn.model import checkpoint as checkpoints
from support.plans import LARGE, TWENTY, machine, nf4_checkpoint, plan_for, planned, reason, tiny


def test_nf4_made_by_others_is_divided_by_layers_and_not_otherwise() -> None:
    assert "quantization" not in planned(machine(LARGE), nf4_checkpoint()).engine_args
    two = planned(machine(TWENTY, TWENTY), nf4_checkpoint())
    assert (two.engine_args.get("tensor-parallel-size"), two.engine_args["pipeline-parallel-size"]) == (None, 2)
    assert two.vram[0].embeddings_bytes == two.vram[1].embeddings_bytes > 0  # the embedding here, the head there
    assert len({parts.kv_cache_bytes for parts in two.vram}) == 1
    with pytest.raises(SettingsError, match="cannot be divided over 2 GPUs") as caught:
        plan_for(machine(TWENTY, TWENTY), nf4_checkpoint(), VRAM_PROFILE="2x20gb")
    assert "--pipeline-parallel-size 2" in caught.value.remedy


def test_groups_of_quantized_weights_are_never_divided() -> None:
    lite = checkpoints.read(captured_models.converted("deepseek-v2-lite-chat", captured_models.INT4))
    two = planned(machine(TWENTY, TWENTY), lite)
    assert (two.engine_args.get("tensor-parallel-size"), two.engine_args["pipeline-parallel-size"]) == (None, 2)
    assert "only its layers" in reason(two, "pipeline-parallel-size")[2]
    with pytest.raises(SettingsError, match="2 GPUs would have to divide one") as caught:
        plan_for(machine(TWENTY, TWENTY), lite, VRAM_PROFILE="2x20gb")
    by_layers = caught.value.remedy.partition("'")[2].rstrip("'.")
    assert planned(machine(TWENTY, TWENTY), lite, VLLM_EXTRA_ARGS=by_layers).choices.pipeline_parallel == 2
    awq = checkpoints.read(captured_models.files("qwen2.5-32b-instruct-awq"))
    assert planned(machine(TWENTY, TWENTY), awq).choices.tensor_parallel == 2


def test_heads_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(SettingsError, match="4 attention heads, 2 of keys and values, cannot be divided over 3 GPUs"):
        plan_for(machine(LARGE, LARGE, LARGE), tiny(), VLLM_EXTRA_ARGS="--tensor-parallel-size 3")
    with pytest.raises(SettingsError, match="less than one"):
        plan_for(machine(LARGE), tiny(), VLLM_EXTRA_ARGS="--tensor-parallel-size 0")
