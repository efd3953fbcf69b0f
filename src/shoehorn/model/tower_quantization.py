"""Towers for images and sound whose matrices the engine quantizes although the checkpoint holds them unquantized.

Rules: the engine quantizes every linear layer that the checkpoint's description does not exempt by name; FP8 covers all
of a tower's matrices, bitsandbytes those of queries, keys and values, whose fused name no list of single ones holds.

Source: vllm/model_executor/layers/quantization/fp8.py and utils/quant_utils.py of vLLM 0.32.0, and
vllm_bnb_plugin/quantization/utils.py (is_layer_skipped_bnb).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shoehorn.model.division import TOWER
from shoehorn.model.safetensors import Tensor

_NUMBERED_MATRIX = re.compile(r".*\.(?:\d+\..*|merger\..*)\.weight")
_FUSED = re.compile(r"(.*)\.(?:q_proj|k_proj|v_proj)\.weight")
_UNQUANTIZED = frozenset({"BF16", "F16", "F32"})
_NF4_BYTES = 0.5 + 4 / 64  # of one weight, with its share of an absmax


def as_loaded(tensors: Sequence[Tensor], quantized: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors with the dtypes that the engine gives those of towers."""
    method = quantized.get("quant_method")
    if method == "fp8":
        exempt = _names(quantized, "modules_to_not_convert") + _names(quantized, "ignored_layers")
        if not any(TOWER.search(name) for name in exempt):
            return [replace(tensor, dtype="F8_E4M3", bytes=tensor.elements)
                    if _is_matrix(tensor) and _NUMBERED_MATRIX.fullmatch(tensor.name) else tensor
                    for tensor in tensors]
    if method == "bitsandbytes" and quantized.get("load_in_4bit"):
        skipped = frozenset(_names(quantized, "llm_int8_skip_modules"))
        return [replace(tensor, dtype="U8", bytes=round(tensor.elements * _NF4_BYTES))
                if _is_matrix(tensor) and (match := _FUSED.fullmatch(tensor.name)) and not _skips(match[1], skipped)
                else tensor for tensor in tensors]
    return list(tensors)


def _is_matrix(tensor: Tensor) -> bool:
    return len(tensor.shape) == 2 and tensor.dtype in _UNQUANTIZED and bool(TOWER.search(tensor.name))


def _skips(module: str, skipped: frozenset[str]) -> bool:
    """Return whether the list holds a part of the module's name, or its beginning."""
    parts = module.split(".")
    return not skipped.isdisjoint((*parts, *(".".join(parts[:end]) for end in range(1, len(parts) + 1))))


def _names(quantized: Mapping[str, Any], key: str) -> list[str]:
    names = quantized.get(key)
    return [str(name) for name in names] if isinstance(names, list) else []
