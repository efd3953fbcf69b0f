"""Towers that the engine quantizes although the checkpoint does not."""

from __future__ import annotations

from typing import Any

import pytest

from shoehorn.model.safetensors import Tensor
from shoehorn.model.tower_quantization import as_loaded

FUSED = Tensor("vision_tower.layers.0.attn.q_proj.weight", "BF16", (64, 64), 8192)
MATRIX = Tensor("vision_tower.layers.0.fc1.weight", "BF16", (64, 64), 8192)
TABLE = Tensor("vision_tower.pos_embed.weight", "BF16", (64, 64), 8192)
TEXT = Tensor("model.layers.0.q_proj.weight", "BF16", (64, 64), 8192)
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(("quantized", "expected"), [
    ({}, [8192, 8192]), ({"quant_method": "fp8"}, [4096, 4096]),
    ({"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}, [4096, 4096]),
    ({"quant_method": "fp8", "modules_to_not_convert": ["model.visual.blocks.0.mlp"]}, [8192, 8192]),
    (BNB, [2304, 8192]), ({**BNB, "llm_int8_skip_modules": ["vision_tower.layers.0.attn.q_proj"]}, [2304, 8192]),
    ({**BNB, "llm_int8_skip_modules": ["vision_tower"]}, [8192, 8192]),
    ({**BNB, "llm_int8_skip_modules": ["vision_tower.layers.0.attn"]}, [8192, 8192]),
    ({**BNB, "load_in_4bit": False}, [8192, 8192])])
def test_matrices_that_no_list_exempts_are_quantized(quantized: dict[str, Any], expected: list[int]) -> None:
    loaded = as_loaded([FUSED, MATRIX, TABLE, TEXT], quantized)
    assert [tensor.bytes for tensor in loaded] == [*expected, 8192, 8192]
