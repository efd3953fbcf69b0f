"""The KV cache: bytes and tokens for layers of every kind, in whole blocks, as vLLM 0.32.0 lays them out.

Rules: one pool of blocks serves all layers. Layers of one kind form groups of equal size; a block holds one group's
layers, so a model with windowed layers needs several blocks where one of plain attention needs one, but far fewer of
them for a long request.

Source: vllm/v1/core/kv_cache_utils.py (_get_kv_cache_groups_uniform_page_size, get_max_concurrency_for_kv_cache_config)
and vllm/v1/kv_cache_interface.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoehorn.common.units import ceil_div
from shoehorn.model.shape import KvLayers, ModelShape

_BATCHES_IN_FLIGHT = 2
"""Batches whose tokens are scheduled but not yet computed: asynchronous scheduling overlaps two."""


@dataclass(frozen=True)
class KvLayout:
    """Division of the KV cache on one GPU.

    Attributes:
        block_bytes: of one block of the pool.
        blocks_per_request: of a request of full length.
        max_model_len: tokens of such a request.
    """

    block_bytes: int
    blocks_per_request: int
    max_model_len: int

    def tokens(self, cache_bytes: int) -> int:
        """Tokens of all requests together that a cache of that size holds, as vLLM reports it."""
        return cache_bytes // self.block_bytes * self.max_model_len // self.blocks_per_request

    def bytes_for(self, requests: int) -> int:
        """Size of the KV cache for that many requests of full length."""
        return requests * self.blocks_per_request * self.block_bytes


def layout(shape: ModelShape, max_model_len: int, block_size: int, entry_bytes: float, max_num_batched_tokens: int,
           tensor_parallel: int = 1, share: float = 1.0) -> KvLayout:
    """Compute the layout of the KV cache on one GPU.

    Args:
        entry_bytes: of one key or value entry; a half for 4-bit formats.
        share: of the layers that this GPU holds (pipeline parallelism).
    """
    kinds = [(max(1, round(kind.layers * share)), kind) for kind in shape.kv_layers]
    size = group_size([layers for layers, _ in kinds])

    def page(kind: KvLayers) -> int:
        heads = kind.heads if kind.latent else max(1, ceil_div(kind.heads, tensor_parallel))
        return round(block_size * heads * kind.width * entry_bytes)

    blocks = 0
    for layers, kind in kinds:
        tokens = max_model_len
        if kind.window:
            tokens = min(kind.window - 1 + _BATCHES_IN_FLIGHT * max_num_batched_tokens, max_model_len)
        blocks += ceil_div(layers, size) * (ceil_div(tokens, block_size) + bool(kind.window))
    return KvLayout(size * max(page(kind) for _, kind in kinds), blocks, max_model_len)


def group_size(layers: list[int]) -> int:
    """Number of layers in each group: the fewest of a kind, or the most where both are nearly as many."""
    return max(layers) if max(layers) < min(layers) * 1.5 else min(layers)
