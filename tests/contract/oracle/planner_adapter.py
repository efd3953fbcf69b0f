"""What Shoehorn's planner says of a stored model: the only file here that imports it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from contract.oracle.patterns import expand_all
from shoehorn import checkpoint, estimate, kv_cache
from shoehorn.errors import ShoehornError
from shoehorn.tensor_files import DTYPE_BITS, Tensor

Figures = dict[str, Any]


def plan(document: Mapping[str, Any], gpus: tuple[int, ...]) -> dict[int, Figures]:
    """The planner's figures under the names of the truth, for each number of GPUs, or `refused` with its words.

    Args:
        document: a stored model with its `tensors`; `files` and `options` are not yet known to the planner.
        gpus: tensor parallel.
    """
    try:
        shape = checkpoint.shape_of(document["config"], _tensors(document), 0)
    except ShoehornError as error:
        return {number: {"refused": str(error)} for number in gpus}
    return {number: _figures(shape, number) for number in gpus}


def _figures(shape: checkpoint.ModelShape, gpus: int) -> Figures:
    choices = estimate.Choices(1 << 50, shape.max_position, 1, 2048, tensor_parallel=gpus, kv_cache_bytes=0)
    parts = estimate.estimate(shape, choices)[0]
    rounding = estimate._rounding_bytes(shape, choices)  # the allocator's, which no parameter has
    layout = kv_cache.layout(shape, shape.max_position, 16, 2, 2048, gpus)
    first = shape.kv_layers[0]
    return {
        "weights_bytes": parts.weights_bytes + parts.embeddings_bytes + parts.quant_state_bytes - rounding,
        "bytes_per_token": sum(_token_bytes(kind, gpus) for kind in shape.kv_layers if not kind.window),
        "state_bytes": 0,
        "request_bytes": layout.blocks_per_request * layout.block_bytes,
        "max_model_len": shape.max_position,
        "heads": shape.heads, "kv_heads": shape.kv_heads, "layers": shape.layers,
        "head_size": first.width if first.latent else shape.head_dim,
        "windows": sorted({kind.window for kind in shape.kv_layers if kind.window}),
    }


def _token_bytes(kind: checkpoint.KvLayers, gpus: int) -> int:
    heads = kind.heads if kind.latent else max(1, -(-kind.heads // gpus))
    return kind.layers * heads * kind.width * 2


def _tensors(document: Mapping[str, Any]) -> Iterator[Tensor]:
    for name, (dtype, shape) in expand_all(document["tensors"]).items():
        yield Tensor(name, dtype, tuple(shape), (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8)
