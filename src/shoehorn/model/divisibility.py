"""Numbers of GPUs that can divide a model's packed matrices.

Rules: weights that share a scale stay on one GPU, so each GPU gets whole groups or blocks; of experts in AWQ and GPTQ
the engine makes the groups smaller, down to 32 weights; experts in FP8 get smaller blocks.

Source: vllm/model_executor/layers/quantization of vLLM 0.32.0 (moe_wna16.py, utils/fp8_utils.py) and
vllm/model_executor/kernels/linear/mixed_precision/marlin.py (can_implement).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from shoehorn.model.division import Division
from shoehorn.model.safetensors import Tensor
from shoehorn.model.tensor_names import COLUMN_SCALES, EXPERTS

_LEAST_GROUP = 32
_BY_COLUMNS = re.compile(
    r"(?:^|.*\.)(?:o_proj|down_proj|w2|out_proj|wo|fc2|linear_fc2|proj|c_proj|dense_4h_to_h)\.weight")
_KEY_VALUE = re.compile(r"(?:^|.*\.)(?:k_proj|v_proj)\.weight")
_IN_LAYER = re.compile(r".*?\.\d+\.(.+)")
_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})


def column_groups(tensors: Sequence[Tensor], quantized: Mapping[str, Any], intermediate: int, division: Division
                  ) -> int:
    """Return a number that the number of GPUs must divide; 0 where every number is possible.

    Args:
        quantized: description of the quantization.
        intermediate: inner width of an expert; 0 without experts.
    """
    method, block = quantized.get("quant_method"), quantized.get("weight_block_size")
    groups = []
    if method == "fp8" and isinstance(block, list) and len(block) == 2 and all(type(size) is int for size in block):
        groups = [*_blocks(tensors, block[0], block[1], division)]
    elif method in ("awq", "gptq"):
        groups = list(_scales(tensor for tensor in tensors if not EXPERTS.fullmatch(tensor.name)))
        groups += [intermediate // _LEAST_GROUP] * bool(intermediate)
    else:
        groups = [*_scales(tensors)]
    return math.gcd(*groups)


def _scales(tensors: Iterable[Tensor]) -> Iterator[int]:
    """Yield the groups of matrices that are divided by columns; a single group per row is not divided."""
    for tensor in tensors:
        match = COLUMN_SCALES.fullmatch(tensor.name) if len(tensor.shape) == 2 else None
        groups = tensor.shape[0 if match[1] == "scales" else 1] if match else 1
        if groups > 1:
            yield groups


def _blocks(tensors: Iterable[Tensor], rows: int, columns: int, division: Division) -> Iterator[int]:
    """Yield the blocks of matrices in FP8, in the direction in which they are divided; 1 where blocks are not whole."""
    for tensor in tensors:
        if tensor.dtype not in _FP8 or len(tensor.shape) != 2 or EXPERTS.fullmatch(tensor.name):
            continue
        match = _IN_LAYER.fullmatch(tensor.name)
        if _KEY_VALUE.fullmatch(tensor.name) or (match and any(gpus == 1 for gpus, _ in division.shares(match[1]))):
            continue
        size, block = (tensor.shape[1], columns) if _BY_COLUMNS.fullmatch(tensor.name) else (tensor.shape[0], rows)
        yield 1 if size % block else size // block
