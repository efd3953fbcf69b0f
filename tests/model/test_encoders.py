"""Largest items of encoders, by config.json and preprocessor_config.json."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shoehorn.model.division import Division
from shoehorn.model.encoders import read_encoders, with_tensors
from shoehorn.model.safetensors import Tensor
from shoehorn.model.shape import Encoder

QWEN = {"model_type": "qwen2_vl", "vision_config": {"embed_dim": 1280, "mlp_ratio": 4, "patch_size": 14,
                                                    "spatial_merge_size": 2}}


def encoder(config: dict[str, Any], processor: dict[str, Any] | None = None) -> Encoder:
    return next(read_encoders(config, 4096, processor or {}))


@pytest.mark.parametrize(("config", "tokens", "patches"), [
    ({"mm_tokens_per_image": 256, "vision_config": {"image_size": 896, "patch_size": 14}}, 256, 16),
    ({"vision_config": {"image_size": 336, "patch_size": 14}}, 576, 1),
    ({"vision_config": {"image_size": 336, "patch_size": 14},
      "image_grid_pinpoints": [[336, 672], [672, 672]]}, 2928, 2880 / 2928),
    ({"vision_config": {"image_size": 1024, "patch_size": 14, "model_type": "pixtral"}}, 74 ** 2, 1),
    ({"model_type": "internvl", "downsample_ratio": 0.5,
      "vision_config": {"image_size": [448, 448], "patch_size": [14, 14]}}, 13 * 256, 4),
    ({"spatial_merge_size": 2, "vision_config": {"image_size": 1540, "patch_size": 14}}, 3025, 4),
    ({"vision_config": {"model_type": "gemma4_vision", "patch_size": 16}}, 280, 9),
    ({"vision_config": {"patch_size": 14}}, 0, 1), (QWEN, 16_384, 4)])
def test_largest_image(config: dict[str, Any], tokens: int, patches: float) -> None:
    assert (encoder(config).item_tokens, encoder(config).patches) == (tokens, patches)


@pytest.mark.parametrize("processor", [{"max_pixels": 1_003_520}, {"size": {"longest_edge": 1_003_520}}])
def test_limit_of_pixels_of_the_checkpoint_counts(processor: dict[str, Any]) -> None:
    assert encoder(QWEN, processor).item_tokens == 1280


def test_widths_and_modalities() -> None:
    qwen = encoder(QWEN)
    assert (qwen.width, qwen.inner, qwen.token_width, qwen.modalities) == (1280, 5120, 4096, ("image", "video"))
    deep = encoder({"vision_config": {"hidden_size": 1152, "deepstack_visual_indexes": [8, 16, 24]}})
    assert (deep.token_width, deep.modalities) == (4 * 4096, ("image",))


@pytest.mark.parametrize("config", [{"audio_config": {"d_model": 1280, "max_source_positions": 1500}},
                                    {"is_encoder_decoder": True, "d_model": 1280, "max_source_positions": 1500},
                                    {"thinker_config": {"audio_config": {"d_model": 1280}}}])
def test_sound(config: dict[str, Any]) -> None:
    assert (encoder(config).modalities, encoder(config).item_tokens) == (("audio",), 1500)


def test_tensors_of_a_tower_count_by_division_and_give_the_inner_width() -> None:
    def tensor(name: str, *shape: int) -> Tensor:
        return Tensor(name, "BF16", shape, 2 * math.prod(shape))

    tower, = with_tensors([encoder({"vision_config": {"hidden_size": 8, "intermediate_size": 99}})], [
        tensor("visual.blocks.0.mlp.fc1.weight", 16, 8), tensor("visual.pos_embed.weight", 4, 8),
        tensor("audio_tower.layers.0.fc1.weight", 64, 8), tensor("model.layers.0.mlp.up_proj.weight", 64, 8)],
        Division())
    assert (tower.divided.bytes, tower.whole.bytes, tower.inner) == (16 * 8 * 2, 4 * 8 * 2, 16)
