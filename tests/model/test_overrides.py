"""Changes of config.json by the user: completed for the model, and part of the shape."""

from __future__ import annotations

from typing import Any

import pytest

from fakes import captured
from shoehorn.model import checkpoint
from shoehorn.model.overrides import apply_overrides, complete_overrides

QWEN = {"model_type": "qwen3", "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rope_scaling": None}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
COMPLETE = {"rope_parameters": {"rope_theta": 1000000.0, **YARN}, "max_position_embeddings": 131072}


@pytest.mark.parametrize(("overrides", "completed"), [
    ({"rope_scaling": YARN}, COMPLETE),
    ({"rope_parameters": YARN}, COMPLETE),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, COMPLETE),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
     {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "yarn", "factor": 4.0,
                          "original_max_position_embeddings": 40960}, "max_position_embeddings": 163840}),
    ({"rope_scaling": YARN, "max_position_embeddings": 65536}, {**COMPLETE, "max_position_embeddings": 65536}),
    ({"rope_parameters": {**YARN, "rope_theta": 5}, "max_position_embeddings": 131072},
     {"rope_parameters": {**YARN, "rope_theta": 5}, "max_position_embeddings": 131072}),
    ({"rope_scaling": YARN, "rope_theta": 7}, {**COMPLETE, "rope_parameters": {"rope_theta": 7, **YARN}}),
    ({"rope_theta": 7}, {"rope_parameters": {"rope_theta": 7, "rope_type": "default"}}),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
     {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "linear", "factor": 2.0}}),
    ({"rope_scaling": None}, {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}}),
    ({"num_experts": 4}, {"num_experts": 4}), ({}, {}),
])
def test_rotary_overrides_are_completed(overrides: dict[str, Any], completed: dict[str, Any]) -> None:
    assert complete_overrides(QWEN, overrides) == completed
    assert complete_overrides(QWEN, completed) == completed, "complete once"


def test_a_base_frequency_keeps_the_scaling_of_the_checkpoint() -> None:
    text = {**QWEN, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    assert complete_overrides(text, {"rope_theta": 7})["rope_parameters"] == {
        "rope_type": "llama3", "factor": 8.0, "rope_theta": 7}


def test_scaling_by_type_of_layer_is_left_alone() -> None:
    layered = {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}}
    assert complete_overrides(QWEN, layered) == layered


def test_the_text_model_of_a_multimodal_one_is_meant() -> None:
    config = {"model_type": "odd", "text_config": QWEN, "vision_config": {"depth": 2}}
    assert complete_overrides(config, {"rope_scaling": YARN, "depth": 1}) == {"depth": 1, "text_config": COMPLETE}
    assert complete_overrides(config, {"text_config": {"rope_scaling": YARN}}) == {"text_config": COMPLETE}
    assert complete_overrides(config, {"vision_config": {"depth": 1}}) == {"vision_config": {"depth": 1}}


def test_sections_are_merged_and_other_values_replaced() -> None:
    config = {"text_config": QWEN, "rope_parameters": {"a": 1}, "rope_scaling": {"b": 2}}
    changed = apply_overrides(config, {"text_config": {"max_position_embeddings": 5}, "rope_parameters": {"c": 3}})
    assert changed == {"text_config": {**QWEN, "max_position_embeddings": 5}, "rope_parameters": {"c": 3}}


def test_overrides_are_part_of_the_shape() -> None:
    plain = captured.shape("qwen3-8b")
    longer = checkpoint.read(captured.files("qwen3-8b"), {"rope_scaling": YARN})
    assert (plain.max_position, longer.max_position) == (40960, 131072)
    assert longer.overrides == COMPLETE | {"rope_parameters": {**YARN, "rope_theta": 1000000}}
    assert checkpoint.read(captured.files("qwen3-8b"), {"num_hidden_layers": 18}).layers == 18
