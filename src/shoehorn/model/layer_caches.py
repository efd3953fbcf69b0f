"""Caches of a model's layers: keys and values of a sequence's tokens, or states of fixed size.

Rules: one entry per kind of cache; a layer that has several caches appears in several entries, or twice in one.

Source: vllm/v1/kv_cache_interface.py and vllm/model_executor/layers/mamba/mamba_utils.py of vLLM 0.32.0.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoehorn.common.units import ceil_div


@dataclass(frozen=True)
class KvLayers:
    """Layers whose caches hold keys and values of tokens in the same form.

    Attributes:
        numbers: layer number of each cache, ascending.
        heads: KV heads; 1 for a compressed cache (MLA), which every GPU stores completely.
        width: entries of one head and token, key and value together.
        window: cached tokens; 0 for all.
        chunked: the window starts at multiples of its size (chunked local attention).
        latent: compressed cache (MLA).
        entry_bytes: of one entry, where `kv-cache-dtype` does not apply; 0 where it does.
        fp8_bytes: of one token, where a cache in FP8 has a format of its own; 0 where entries take one byte.
        tokens_per_entry: tokens that one entry of the cache stands for.
        block_tokens: tokens of a block, where the model determines them; 0 where `block-size` does.
        page_multiple: a page's size is rounded up to a multiple of this many bytes.
        encoder: keys and values of the encoder's output (cross-attention) instead of a sequence's tokens.
    """

    numbers: tuple[int, ...]
    heads: int
    width: int
    window: int = 0
    chunked: bool = False
    latent: bool = False
    entry_bytes: int = 0
    fp8_bytes: int = 0
    tokens_per_entry: int = 1
    block_tokens: int = 0
    page_multiple: int = 1
    encoder: bool = False

    @property
    def layers(self) -> int:
        """Number of caches."""
        return len(self.numbers)

    def token_bytes(self, tensor_parallel: int, dtype_bytes: float, head_bytes: int = 0) -> float:
        """Bytes of one token in one cache on one GPU.

        Args:
            dtype_bytes: of one entry by `kv-cache-dtype`.
            head_bytes: of the scales of one head by `kv-cache-dtype`.
        """
        heads = self.heads if self.latent else max(1, ceil_div(self.heads, tensor_parallel))
        if self.fp8_bytes and dtype_bytes == 1:
            return self.fp8_bytes / self.tokens_per_entry
        content = self.width * self.entry_bytes if self.entry_bytes else self.width * dtype_bytes + head_bytes
        return heads * content / self.tokens_per_entry


@dataclass(frozen=True)
class StateLayers:
    """Layers that keep a state of fixed size of every sequence: Mamba, Gated DeltaNet, KDA, short convolutions.

    Attributes:
        numbers: layer number of each state, ascending.
        channels: of the convolution, those of groups excluded.
        rows: inputs that the convolution keeps: its kernel's size less one.
        groups, group_channels: of Mamba-2, which each GPU completes to at least one group per GPU.
        recurrent: entries of the recurrent state.
        recurrent_bytes: of one such entry; 0 for the model's dtype.
        keeps_drafts: draft tokens add rows to the convolution.
        checkpoints: further states that a prompt leaves behind for prefix caching.
    """

    numbers: tuple[int, ...]
    channels: int
    rows: int
    groups: int = 0
    group_channels: int = 0
    recurrent: int = 0
    recurrent_bytes: int = 0
    keeps_drafts: bool = True
    checkpoints: int = 0

    @property
    def layers(self) -> int:
        """Number of states."""
        return len(self.numbers)

    def bytes(self, tensor_parallel: int, draft_tokens: int, dtype_bytes: int, recurrent_bytes: int = 0) -> int:
        """Bytes of one state on one GPU.

        Args:
            dtype_bytes: of one entry of the convolution.
            recurrent_bytes: of one entry of the recurrent state; 0 leaves it to the model.
        """
        groups = self.groups if self.groups % tensor_parallel == 0 else tensor_parallel
        channels = ceil_div(self.channels + groups * self.group_channels, tensor_parallel)
        rows = self.rows + draft_tokens * self.keeps_drafts
        return channels * rows * dtype_bytes + ceil_div(self.recurrent, tensor_parallel) * (
            recurrent_bytes or self.recurrent_bytes or dtype_bytes)
