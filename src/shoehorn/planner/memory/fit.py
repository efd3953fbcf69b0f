"""Bytes that the fullest GPU lacks for a configuration."""

from __future__ import annotations

from shoehorn.model.shape import ModelShape
from shoehorn.planner.memory.activations import compiling_bytes, loading_bytes
from shoehorn.planner.memory.estimate import MARGIN_BYTES, estimate, kv_bytes
from shoehorn.planner.serving_config import Choices


def missing_bytes(shape: ModelShape, choices: Choices, requests: int = 1) -> int:
    """Bytes that the fullest GPU lacks for that many requests of full length; negative where there is room.

    vLLM refuses to start when the KV cache holds less than one request of full length.
    """
    least = kv_bytes(shape, choices, requests)
    loading = loading_bytes(shape, choices)
    lacks = []
    for parts in estimate(shape, choices):
        others = parts.total_bytes - parts.kv_cache_bytes + MARGIN_BYTES
        compiling = parts.total_bytes - parts.kv_cache_bytes - parts.activations_bytes - parts.cuda_graphs_bytes + \
            compiling_bytes(shape, choices)
        lacks.append(compiling + MARGIN_BYTES - choices.limit_bytes)
        lacks.append(parts.weights_bytes + parts.quant_state_bytes + parts.embeddings_bytes + parts.framework_bytes
                     + loading + MARGIN_BYTES - choices.limit_bytes)
        if choices.kv_cache_bytes is not None:
            lacks.append(max(others + choices.kv_cache_bytes - choices.limit_bytes, least - choices.kv_cache_bytes))
        else:
            lacks.append(others + least - choices.limit_bytes)
    return max(lacks)
