"""Division of tensors: replicated layers, Mamba-2's groups, towers of vLLM and of transformers, projectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from shoehorn.model.division import Division, read_division
from shoehorn.model.layer_caches import StateLayers
from shoehorn.model.safetensors import Tensor


def division(config: Mapping[str, Any], architecture: str = "LlamaForCausalLM",
             states: tuple[StateLayers, ...] = ()) -> Division:
    return read_division(config, architecture, 8, 2, states)


def divides(config: Mapping[str, Any], name: str, *shape: int, numbered: bool = True) -> bool:
    tensor = Tensor(name, "BF16", shape or (64, 64), 2 * math.prod(shape or (64, 64)))
    return division(config).divides_outside(tensor, numbered, packed=False)


@pytest.mark.parametrize(("name", "shares"), [
    ("mlp.gate.weight", [(1, 1.0)]), ("linear.weight", [(1, 1.0)]), ("mlp.up_proj.weight", []),
    ("mamba.linear.weight", []), ("self_attn.v_proj.qweight", [(2, 1.0)]), ("attn.c_attn.weight", [(2, 4 / 12)]),
    ("mamba.in_proj.weight", [])])
def test_few_gpus_divide(name: str, shares: list[tuple[int, float]]) -> None:
    assert list(division({}).shares(name)) == shares


def test_groups_of_mamba2_are_divided_over_as_many_gpus() -> None:
    states = (StateLayers((0,), channels=100, rows=3, groups=2, group_channels=50),)
    shares = division({}, states=states).shares
    assert list(shares("mamba.in_proj.weight")) == [(2, 100 / 300)]
    assert list(shares("mamba.conv1d.weight")) == [(2, 100 / 200)]


@pytest.mark.parametrize(("architecture", "name", "shares"), [
    ("GPTBigCodeForCausalLM", "mlp.c_fc.weight", [(1, 1.0)]), ("GPTBigCodeForCausalLM", "attn.c_proj.weight", []),
    ("HunYuanDenseV1ForCausalLM", "mlp.down_proj.weight", []), ("Starcoder2ForCausalLM", "mlp.c_fc.weight", [])])
def test_code_without_a_plan_divides_only_what_vllm_recognizes(architecture: str, name: str,
                                                              shares: list[tuple[int, float]]) -> None:
    assert list(division({}, architecture).shares(name)) == shares


@pytest.mark.parametrize(("section", "model_type", "name", "divided"), [
    ("vision_config", "siglip_vision_model", "vision_tower.layers.0.fc1.weight", True),
    ("vision_config", "gemma4_vision", "vision_tower.layers.0.fc1.weight", False),
    ("vision_config", "unheard_of", "vision_tower.layers.0.fc1.weight", False),
    ("audio_config", "qwen2_audio_encoder", "audio_tower.layers.0.fc1.weight", False),
    ("vision_config", "siglip_vision_model", "audio_tower.layers.0.fc1.weight", False),
    ("vision_config", "internvl_vision", "vision_tower.layer.0.attention.q_proj.weight", False),
    ("vision_config", "internvl_vision", "vision_tower.layer.0.mlp.fc1.weight", True),
    ("vision_config", "glm4v", "visual.downsample.weight", False),
    ("vision_config", "siglip_vision_model", "model.encoder.layers.0.fc1.weight", True)])
def test_towers_of_vllm_are_divided_and_others_whole(section: str, model_type: str, name: str, divided: bool) -> None:
    assert divides({section: {"model_type": model_type}}, name) == divided


@pytest.mark.parametrize(("config", "divided"), [
    ({"model_type": "qwen2_vl", "vision_config": {"depth": 32}}, True),
    ({"model_type": "unheard_of", "vision_config": {"depth": 32}}, False),
    ({"model_type": "x", "thinker_config": {"vision_config": {"model_type": "qwen3_vl"}}}, True)])
def test_type_of_a_tower_is_that_of_its_class(config: dict[str, Any], divided: bool) -> None:
    assert divides(config, "visual.blocks.0.mlp.fc1.weight") == divided


@pytest.mark.parametrize(("model_type", "divided"), [("llava", True), ("kimi_vl", False)])
def test_projectors_are_divided_where_vllm_does(model_type: str, divided: bool) -> None:
    assert divides({"model_type": model_type}, "multi_modal_projector.linear_1.weight", numbered=False) == divided


@pytest.mark.parametrize(("model_type", "divided"), [("bert", True), ("opt", False)])
def test_tables_of_encoders_are_divided(model_type: str, divided: bool) -> None:
    assert divides({"model_type": model_type}, "embeddings.position_embeddings.weight", numbered=False) == divided
