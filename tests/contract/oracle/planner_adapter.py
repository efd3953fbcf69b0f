"""What Shoehorn's planner says of a stored model: the only file here that imports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from contract.oracle.patterns import expand_all
from shoehorn import checkpoint, estimate, kv_cache
from shoehorn.errors import ShoehornError
from shoehorn.tensor_files import DTYPE_BITS, Tensor


def plan(document: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """The planner's figures under the names of the truth, or `refused` with its words.

    Args:
        document: a stored model with its `tensors`.
        gpus: tensor parallel.
    """
    try:
        shape = checkpoint.shape_of(document["config"], tensors(document), 0)
    except ShoehornError as error:
        return {"refused": str(error)}
    choices = estimate.Choices(1 << 50, shape.max_position, 1, 2048, tensor_parallel=gpus,
                               dtype_bytes=2, kv_cache_bytes=0)
    parts = estimate.estimate(shape, choices)[0]
    rounding = estimate._rounding_bytes(shape, choices)  # the allocator's, which no parameter has
    layout = kv_cache.layout(shape, shape.max_position, 16, 2, 2048, gpus)
    return {
        "weights_bytes": parts.weights_bytes + parts.embeddings_bytes + parts.quant_state_bytes - rounding,
        "bytes_per_token": sum(_token_bytes(kind, gpus) for kind in shape.kv_layers if not kind.window),
        "state_bytes": 0,
        "request_bytes": layout.blocks_per_request * layout.block_bytes,
        "max_model_len": shape.max_position,
        "heads": shape.heads, "kv_heads": shape.kv_heads, "layers": shape.layers,
        "head_size": shape.kv_layers[0].width if shape.kv_layers[0].latent else shape.head_dim,
        "windows": sorted({kind.window for kind in shape.kv_layers if kind.window}),
        "understood": shape.understood,
        "notes": list(shape.notes),
    }


def tensors(document: Mapping[str, Any]) -> list[Tensor]:
    """The checkpoint's tensors."""
    found = []
    for name, (dtype, shape) in expand_all(document["tensors"]).items():
        elements = 1
        for size in shape:
            elements *= size
        found.append(Tensor(name, dtype, tuple(shape), (elements * DTYPE_BITS[dtype] + 7) // 8))
    return found


def _token_bytes(kind: checkpoint.KvLayers, gpus: int) -> int:
    heads = kind.heads if kind.latent else max(1, -(-kind.heads // gpus))
    return kind.layers * heads * kind.width * 2
