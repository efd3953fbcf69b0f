"""Figures of Shoehorn's planner for a stored model: the only file here that imports the planner."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from contract.oracle.patterns import expand_all
from shoehorn.common.errors import ShoehornError
from shoehorn.common.units import ceil_div
from shoehorn.model import checkpoint
from shoehorn.model.safetensors import DTYPE_BITS, Tensor
from shoehorn.model.shape import KvLayers, ModelShape
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.serving_config import BITSANDBYTES, Limits, Parallelism, ServingConfig

Figures = dict[str, Any]

_LIMIT_BYTES = 1 << 50  # more than any model needs
_BATCH_TOKENS = 2048  # of the recorded engine


def plan(document: Mapping[str, Any], gpus: tuple[int, ...]) -> dict[int, Figures]:
    """Return the planner's figures under the oracle's names, for each number of GPUs, or `refused` with the error.

    Args:
        document: a stored model with its `tensors`; of `options`, those that Shoehorn has settings for are passed on.
        gpus: degrees of tensor parallelism.
    """
    try:
        shape = checkpoint.shape_of(document["config"], _tensors(document), 0)
    except ShoehornError as error:
        return {number: {"refused": str(error)} for number in gpus}
    return {number: _figures(shape, number, document.get("options", {})) for number in gpus}


def _figures(shape: ModelShape, gpus: int, options: Mapping[str, Any]) -> Figures:
    kv_entry_bytes = 1 if options.get("kv_cache_dtype") == "fp8" else 2
    config = ServingConfig(_LIMIT_BYTES, Limits(shape.max_position, 1, _BATCH_TOKENS), kv_cache_bytes=0,
                           parallelism=Parallelism(tensor=gpus), kv_dtype_bytes=kv_entry_bytes,
                           nf4=options.get("quantization") == BITSANDBYTES)
    model = MemoryModel(shape, config)
    memory, first = model.gpus[0], shape.kv_layers[0]
    stored = memory.weights_bytes + memory.embeddings_bytes + memory.quant_state_bytes
    return {
        "weights_bytes": stored - model.weights.rounding_bytes,  # the allocator's rounding is in no parameter
        "bytes_per_token": sum(_token_bytes(kind, gpus, kv_entry_bytes) for kind in shape.kv_layers if not kind.window),
        "state_bytes": 0,
        "request_bytes": model.kv_bytes(),
        "max_model_len": shape.max_position,
        "heads": shape.heads, "kv_heads": shape.kv_heads, "layers": shape.layers,
        "head_size": first.width if first.latent else shape.head_dim,
        "windows": sorted({kind.window for kind in shape.kv_layers if kind.window}),
    }


def _token_bytes(kind: KvLayers, gpus: int, entry_bytes: int) -> int:
    heads = kind.heads if kind.latent else max(1, ceil_div(kind.heads, gpus))
    return kind.layers * heads * kind.width * entry_bytes


def _tensors(document: Mapping[str, Any]) -> Iterator[Tensor]:
    for name, (dtype, shape) in expand_all(document["tensors"]).items():
        yield Tensor(name, dtype, tuple(shape), (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8)
