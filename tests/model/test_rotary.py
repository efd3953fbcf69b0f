"""Entries of the rotary tables of models of every kind."""

from __future__ import annotations

import pytest

from shoehorn.model.rotary import rotary_entries

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(("change", "rows"), [
    ({}, 512), ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 512), ({"rope_scaling": YARN}, 512),
    ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 4096),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, 512),
    ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "model_type": "gemma3_text"}, 4096 + 512),
    ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 128}, 512 + 128),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, 4 * 512),
    ({"rope_scaling": {"mrope_section": [16, 24, 24]}, "model_type": "qwen3_vl_text"}, 512),
    ({"local_rope_theta": 1e4}, 2 * 512), ({"model_max_length": 2048}, 2048), ({"model_type": "gpt_oss"}, 1024),
    ({"model_type": "jamba"}, 0), ({"position_embedding_type": "nope"}, 0)])
def test_rows(change: dict[str, object], rows: int) -> None:
    assert rotary_entries({"max_position_embeddings": 512, **change}, "LlamaForCausalLM", 128) == rows * 128


@pytest.mark.parametrize(("change", "width"), [
    ({"partial_rotary_factor": 0.25}, 32), ({"rotary_dim": 64}, 64), ({"model_type": "glm4"}, 64),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, 64), ({"qk_rope_head_dim": 64}, 64)])
def test_only_the_rotated_part_of_a_head_counts(change: dict[str, object], width: int) -> None:
    assert rotary_entries({"max_position_embeddings": 512, **change}, "LlamaForCausalLM", 128) == 512 * width


def test_global_layers_of_other_width_have_their_own_table() -> None:
    text = {"max_position_embeddings": 512, "global_head_dim": 256, "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default"}}}
    assert rotary_entries(text, "Gemma4ForConditionalGeneration", 128) == 512 * (256 + 128)


def test_transformers_code_has_no_tables() -> None:
    assert rotary_entries({"max_position_embeddings": 512}, "SeedOssForCausalLM", 128) == 0
