"""Pages of the KV cache on one GPU: what one layer takes of one block, for every kind of layer.

Rules: a page of keys and values grows with the tokens of a block; a state has one size, so in a model with both the
tokens of a block are raised until its pages hold a state, and the states' pages are padded to them.

Source: vllm/v1/kv_cache_interface.py and vllm/platforms/interface.py (_align_hybrid_block_size) of vLLM 0.32.0.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from shoehorn.common.units import ceil_div
from shoehorn.model.layer_caches import KvLayers, StateLayers
from shoehorn.planner.serving_config import CacheOptions

_LATENT_BLOCK_TOKENS = 128
"""Blocks of a model with compressed attention and states are multiples of this."""


class PageKind(Enum):
    """Rule by which a request takes pages."""

    FULL = "full"
    WINDOW = "window"
    CHUNK = "chunk"
    ENCODER = "encoder"
    STATE = "state"


@dataclass(frozen=True)
class Pages:
    """Caches of the same kind on one GPU.

    Attributes:
        numbers: layer number of each cache.
        bytes: of one layer's page.
        block_tokens: tokens of a block.
        window: tokens of a window or chunk, or of the encoder's output; of states, their number per sequence.
        spec: what else distinguishes caches that cannot share a group.
    """

    numbers: tuple[int, ...]
    kind: PageKind
    bytes: int
    block_tokens: int
    window: int = 0
    latent: bool = False
    spec: tuple[float, ...] = ()

    def blocks(self, length: int, in_flight: int) -> int:
        """Count the blocks of one request.

        Args:
            length: tokens of the request.
            in_flight: tokens that are scheduled and not yet computed.
        """
        if self.kind is PageKind.STATE:
            return self.window
        if self.kind in (PageKind.FULL, PageKind.ENCODER):
            return ceil_div(self.window or length, self.block_tokens)
        tokens = self.window + in_flight - (self.kind is PageKind.WINDOW)
        return ceil_div(min(tokens, length), self.block_tokens) + (self.kind is PageKind.WINDOW)


@functools.lru_cache(maxsize=4096)  # a search asks for few of them, thousands of times
def pages(kv_layers: tuple[KvLayers, ...], state_layers: tuple[StateLayers, ...], options: CacheOptions,
          tensor_parallel: int, draft_tokens: int, dtype_bytes: int, batch_tokens: int) -> tuple[Pages, ...]:
    """Compute the pages of all layers, one entry per kind.

    Args:
        draft_tokens: of speculative decoding; each keeps one more state.
        dtype_bytes: of the model's activations.
        batch_tokens: tokens of a batch; the engine reserves as many for the output of an encoder.
    """
    states = [layers.bytes(tensor_parallel, draft_tokens, options.convolution_bytes or dtype_bytes,
                           options.recurrent_bytes) for layers in state_layers]
    block_tokens, padded = options.block_size, 0
    if states and kv_layers:
        block_tokens, padded = _aligned(kv_layers, max(states), options, tensor_parallel)
    caches_prefixes = options.caches_prefixes and bool(kv_layers)  # never of models without attention
    return _merged([
        *(_token_pages(layers, block_tokens, options, tensor_parallel, batch_tokens) for layers in kv_layers),
        *(Pages(layers.numbers, PageKind.STATE, max(size, padded), block_tokens,
                1 + draft_tokens + caches_prefixes * (1 + layers.checkpoints))
          for layers, size in zip(state_layers, states, strict=True))])


def _aligned(kv_layers: Sequence[KvLayers], state_bytes: int, options: CacheOptions,
             tensor_parallel: int) -> tuple[int, int]:
    """Return tokens of a block whose page holds a state, and the bytes of that page."""
    first = next((layers for layers in kv_layers if not layers.window), kv_layers[0])
    token_bytes = first.token_bytes(tensor_parallel, options.kv_dtype_bytes, options.head_bytes)
    multiple = max(options.block_size, _LATENT_BLOCK_TOKENS if first.latent else 0)
    block_tokens = max(options.block_size, multiple * math.ceil(state_bytes / (multiple * token_bytes)))
    return block_tokens, round(block_tokens * token_bytes)


def _token_pages(layers: KvLayers, block_tokens: int, options: CacheOptions, tensor_parallel: int,
                 batch_tokens: int) -> Pages:
    block = layers.block_tokens or block_tokens
    token_bytes = layers.token_bytes(tensor_parallel, options.kv_dtype_bytes, options.head_bytes)
    size = ceil_div(round(block * token_bytes), layers.page_multiple) * layers.page_multiple
    kind = PageKind.ENCODER if layers.encoder else PageKind.FULL
    if layers.window and options.frees_windows:
        kind = PageKind.CHUNK if layers.chunked else PageKind.WINDOW
    window = batch_tokens if layers.encoder else layers.window * (kind is not PageKind.FULL)
    return Pages(layers.numbers, kind, size, block, window, layers.latent,
                 (layers.heads, token_bytes))


def _merged(kinds: list[Pages]) -> tuple[Pages, ...]:
    """Join kinds that differ only in their layers, as a draft model's and the model's may."""
    numbers: defaultdict[Pages, tuple[int, ...]] = defaultdict(tuple)
    for kind in kinds:
        numbers[replace(kind, numbers=())] += kind.numbers
    return tuple(replace(kind, numbers=layers) for kind, layers in numbers.items())
