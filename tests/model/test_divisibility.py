"""Numbers of GPUs that divide packed matrices: groups of INT4, blocks of FP8, experts with smaller groups."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shoehorn.model.divisibility import column_groups
from shoehorn.model.division import Division
from shoehorn.model.safetensors import Tensor

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def tensor(name: str, *shape: int, dtype: str = "F16") -> Tensor:
    return Tensor(name, dtype, shape, math.prod(shape))


@pytest.mark.parametrize(("quantized", "tensors", "expected"), [
    ({}, [tensor("l.0.down_proj.weight", 8, 8)], 0),
    ({"quant_method": "awq"}, [tensor("l.0.down_proj.scales", 12, 8), tensor("l.0.o_proj.scales", 8, 8)], 4),
    ({"quant_method": "awq"}, [tensor("l.0.down_proj.scales", 1, 8)], 0),
    ({"quant_method": "awq"}, [tensor("l.0.mlp.experts.0.down_proj.scales", 6, 8)], 0),
    ({"quant_method": "compressed-tensors"}, [tensor("l.0.mlp.experts.0.down_proj.weight_scale", 8, 6)], 6),
    (FP8, [tensor("l.0.down_proj.weight", 100, 512, dtype="F8_E4M3")], 4),
    (FP8, [tensor("l.0.up_proj.weight", 768, 100, dtype="F8_E4M3")], 6),
    (FP8, [tensor("l.0.in_proj_ba.weight", 64, 2048, dtype="F8_E4M3")], 1),
    (FP8, [tensor("l.0.q_a_proj.weight", 100, 2048, dtype="F8_E4M3")], 0),
    (FP8, [tensor("l.0.k_proj.weight", 100, 2048, dtype="F8_E4M3")], 0),
    (FP8, [tensor("l.0.mlp.experts.0.up_proj.weight", 100, 8, dtype="F8_E4M3")], 0),
    (FP8, [tensor("l.0.up_proj.weight", 100, 8, dtype="BF16")], 0)])
def test_number_that_gpus_must_divide(quantized: dict[str, Any], tensors: list[Tensor], expected: int) -> None:
    assert column_groups(tensors, quantized, 0, Division(2)) == expected


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_experts_have_groups_of_at_least_32_weights(method: str) -> None:
    assert column_groups([], {"quant_method": method}, 768, Division()) == 24
