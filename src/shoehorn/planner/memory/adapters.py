"""Memory of LoRA adapters: vLLM allocates the matrices of `max-loras` adapters for every linear layer at its start.

Source: vllm/lora/layers (base_linear.py, fused_moe.py, logits_processor.py) and vllm/lora/model_manager.py of vLLM
0.32.0; `_PACKED` are the names of projections that vLLM fuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shoehorn.model.shape import ModelShape
from shoehorn.planner.serving_config import Adapters

_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": (), "gate_up_proj": ("gate_proj", "up_proj"),
           "down_proj": (), "experts": ("gate_proj", "up_proj", "down_proj"), "lm_head": ()}


@dataclass(frozen=True)
class _Matrix:
    """A matrix with adapters.

    Attributes:
        inputs: of each of its slices; outputs: of all slices together.
        by_columns: the outputs are divided over GPUs, otherwise the inputs.
        count: of experts; 1 otherwise.
    """

    inputs: int
    outputs: int
    slices: int
    by_columns: bool
    count: int = 1


def is_estimated(shape: ModelShape) -> bool:
    """Return whether the linear layers of a model are those of ordinary attention and MLPs."""
    return not shape.state_layers and not any(cache.latent for cache in shape.kv_layers)


def layer_bytes(shape: ModelShape, adapters: Adapters, tensor: int, dtype_bytes: int) -> int:
    """Return the bytes in one layer on one of `tensor` GPUs."""
    entries = sum(_entries(matrix, adapters, tensor) for matrix in _matrices(shape, adapters, tensor))
    return entries * adapters.rank * adapters.count * dtype_bytes


def head_bytes(shape: ModelShape, adapters: Adapters, dtype_bytes: int) -> int:
    """Return the bytes of the output head, on each GPU of the last stage."""
    if not adapters.targets_any("lm_head"):
        return 0
    return (shape.hidden + shape.vocab) * adapters.rank * adapters.count * dtype_bytes


def _matrices(shape: ModelShape, adapters: Adapters, tensor: int) -> Iterator[_Matrix]:
    """Yield the matrices of a layer that have adapters; a mixture counts as one in every layer."""
    hidden, query, key = shape.hidden, shape.heads * shape.head_dim, max(shape.kv_heads, tensor) * shape.head_dim
    matrices = {"qkv_proj": _Matrix(hidden, query + 2 * key, 3, True), "o_proj": _Matrix(query, hidden, 1, False)}
    if shape.experts:
        inner, count = shape.experts.intermediate, shape.experts.count
        if adapters.targets_any("experts", *_PACKED["experts"]):
            yield _Matrix(hidden, 2 * inner, 2, True, count)
            yield _Matrix(inner, hidden, 1, False, count)
    else:
        matrices |= {"gate_up_proj": _Matrix(hidden, 2 * shape.intermediate, 2, True),
                     "down_proj": _Matrix(shape.intermediate, hidden, 1, False)}
    yield from (matrix for name, matrix in matrices.items() if adapters.targets_any(name, *_PACKED[name]))


def _entries(matrix: _Matrix, adapters: Adapters, tensor: int) -> int:
    """Return the entries for each rank of an adapter."""
    shared = tensor if adapters.fully_sharded else 1
    if matrix.by_columns:
        return matrix.count * (matrix.slices * matrix.inputs // shared + matrix.outputs // tensor)
    return matrix.count * (matrix.inputs // tensor + matrix.outputs // shared)
