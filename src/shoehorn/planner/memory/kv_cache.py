"""The KV cache: bytes, blocks and tokens for layers of every kind, as vLLM 0.32.0 lays them out.

Rules: one pool of blocks serves all groups of layers; the engine never uses one of the blocks. With states, CUDA graphs
need one block per sequence.

Source: vllm/v1/core/kv_cache_utils.py (get_kv_cache_configs, get_max_concurrency_for_kv_cache_config) and
vllm/config/compilation.py (resolve_cudagraph_mode_and_sizes).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from shoehorn.planner.memory.kv_groups import group
from shoehorn.planner.memory.kv_pages import PageKind, Pages

_UNUSED_BLOCKS = 1
"""The block that stands for tokens without keys and values."""


@dataclass(frozen=True)
class KvLayout:
    """Division of the KV cache on one GPU.

    Attributes:
        block_bytes: of one block of the pool; 0 for a model without a cache.
        blocks_per_request: of a request of full length.
        least_blocks: of the shortest request.
        max_model_len: tokens of a request of full length.
        state_bytes: of one sequence, all states together; 0 for a model without states.
        states: kept of one sequence by each of its layers.
    """

    block_bytes: int
    blocks_per_request: int
    least_blocks: int
    max_model_len: int
    state_bytes: int = 0
    states: int = 0

    def blocks(self, cache_bytes: int) -> int:
        """Blocks of a cache of that size."""
        return cache_bytes // self.block_bytes if self.block_bytes else 0

    def tokens(self, cache_bytes: int) -> int:
        """Tokens of all requests together that a cache of that size holds, as vLLM reports it."""
        return self.blocks(cache_bytes) * self.max_model_len // max(1, self.blocks_per_request)

    def bytes_for(self, requests: int, sequences: int = 0) -> int:
        """Size of the KV cache for that many requests of full length.

        Args:
            sequences: at a time; each needs a block of its own.
        """
        return max(requests * self.blocks_per_request + _UNUSED_BLOCKS, sequences) * self.block_bytes

    def sequences(self, cache_bytes: int) -> int:
        """Sequences that a cache of that size serves at a time, when all are short; at least one."""
        return max(1, (self.blocks(cache_bytes) - _UNUSED_BLOCKS) // max(1, self.least_blocks))


@functools.lru_cache(maxsize=4096)  # a search asks for few of them, thousands of times
def layouts(kinds: tuple[Pages, ...], max_model_len: int, in_flight: int,
            stages: tuple[range, ...]) -> tuple[KvLayout, ...]:
    """Compute the layout of the KV cache on one GPU of every pipeline stage.

    Args:
        in_flight: tokens that are scheduled and not yet computed.
        stages: layer numbers of each stage.
    """
    groups = group(kinds)
    blocks = [sum(each.blocks(length, in_flight) for each in groups) for length in (max_model_len, 1)]
    states = [kind for kind in kinds if kind.kind is PageKind.STATE]
    return tuple(KvLayout(max((each.bytes(stage) for each in groups), default=0), blocks[0], blocks[1], max_model_len,
                          sum(kind.bytes * kind.window * sum(number in stage for number in kind.numbers)
                              for kind in states), max((kind.window for kind in states), default=0))
                 for stage in stages)
