"""Reader of what a model's layers keep of a sequence, from config.json.

Rules: sizes are those of vLLM's models, which differ from the config in places: compressed attention (MLA) is known by
model type, and stored in full by other models; values are padded to the size of keys.

Source: vllm/model_executor/models, vllm/model_executor/layers/mamba/mamba_utils.py and
vllm/transformers_utils/model_arch_config_convertor.py of vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shoehorn.model.layer_caches import KvLayers, StateLayers
from shoehorn.model.layer_kinds import LayerKind, layer_kinds, window
from shoehorn.model.state_sizes import state_size

LATENT_TYPES = frozenset({
    "axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "deepseek_v41", "dots3_note", "deepseek_mtp",
    "k3_dspark", "glm5_next", "glm5_next_text", "glm_moe_dsa", "glm4_moe_lite", "kimi_k2", "kimi_linear",
    "longcat_flash", "pangu_ultra_moe", "bailing_hybrid", "hy_v4"})
"""Model types whose compressed attention (MLA) vLLM caches compressed."""

_SPARSE_BLOCK, _COMPRESSED_BLOCK = 64, 256
_SPARSE_FP8_BYTES = 656  # one token of sparse compressed attention in FP8, its scales and rotary part included
_V4_TOKEN_BYTES, _V4_PAGE_MULTIPLE = 584, 576
_V4_OVERLAPPING = 4  # compression ratio whose windows overlap, and whose layers have an indexer


@dataclass(frozen=True)
class Caches:
    """Caches of a model, and the tokens that a block of them has at least."""

    kv: tuple[KvLayers, ...]
    states: tuple[StateLayers, ...]
    block_size: int = 16


def read_caches(text: Mapping[str, Any], layers: int, kv_heads: int, head_dim: int, notes: list[str]) -> Caches:
    """Read the caches of all layers.

    Args:
        text: config of the text model.
        kv_heads, head_dim: of its attention layers, where their kind has no sizes of its own.
    """
    ratios = text.get("compress_ratios")
    if text.get("model_type") == "deepseek_v4" and isinstance(ratios, list):
        return Caches(_compressed(text, [ratio for ratio in ratios[:layers] if type(ratio) is int]), (),
                      _COMPRESSED_BLOCK)
    kinds = layer_kinds(text, layers, notes)
    numbers = {kind: tuple(number for number, each in enumerate(kinds) if kind in each)
               for kind in (LayerKind.FULL, LayerKind.WINDOW, LayerKind.CHUNK, LayerKind.STATE)}
    size = state_size(text) if numbers[LayerKind.STATE] else None
    if numbers[LayerKind.STATE] and size is None:
        notes.append("the states of this model's layers are unknown: counted as full attention")
        numbers[LayerKind.FULL] = tuple(sorted({*numbers[LayerKind.FULL], *numbers[LayerKind.STATE]}))
    kv = [*_full(text, numbers[LayerKind.FULL], kv_heads, head_dim)]
    if text.get("is_encoder_decoder"):
        kv += [replace(layers, encoder=True) for layers in kv]
    if numbers[LayerKind.WINDOW]:
        kv.append(KvLayers(numbers[LayerKind.WINDOW], _number(text, "swa_num_key_value_heads", kv_heads),
                           _width(text, head_dim, "swa_"), window(text)))
    if numbers[LayerKind.CHUNK]:
        kv.append(KvLayers(numbers[LayerKind.CHUNK], kv_heads, 2 * head_dim, text["attention_chunk_size"],
                           chunked=True))
    states = (replace(size, numbers=numbers[LayerKind.STATE]),) if size else ()
    return Caches(tuple(kv), states, _SPARSE_BLOCK if _is_sparse(text) and is_latent(text) else 16)


def is_latent(text: Mapping[str, Any]) -> bool:
    """Return whether vLLM caches this model's attention compressed (MLA)."""
    return bool(text.get("kv_lora_rank")) and text.get("model_type") in LATENT_TYPES


def _is_sparse(text: Mapping[str, Any]) -> bool:
    """Return whether an indexer selects the tokens that compressed attention reads."""
    return bool(text.get("index_topk") and text.get("index_head_dim"))


def _full(text: Mapping[str, Any], numbers: tuple[int, ...], kv_heads: int, head_dim: int) -> Sequence[KvLayers]:
    """Return the caches of layers that keep all tokens."""
    if not numbers:
        return ()
    latent, rotary = _number(text, "kv_lora_rank", 0), _number(text, "qk_rope_head_dim", 64)
    if is_latent(text):
        if text.get("model_type") == "longcat_flash":  # two attentions in every layer
            numbers = tuple(sorted(numbers * 2))
        sparse = _is_sparse(text)
        cache = KvLayers(numbers, 1, latent + rotary, latent=True, fp8_bytes=_SPARSE_FP8_BYTES if sparse else 0)
        return (cache, _indexer(numbers, text)) if sparse else (cache,)
    if latent:
        return (KvLayers(numbers, kv_heads, 2 * (_number(text, "qk_nope_head_dim", 128) + rotary)),)
    shares_value = bool(text.get("attention_k_eq_v"))
    return (KvLayers(numbers, _number(text, "num_global_key_value_heads", kv_heads) if shares_value else kv_heads,
                     _width(text, _number(text, "global_head_dim", head_dim))),)


def _width(text: Mapping[str, Any], head_dim: int, prefix: str = "") -> int:
    """Return the entries of a key and a value together."""
    key = _number(text, f"{prefix}head_dim", head_dim) if prefix else head_dim
    separate = str(text.get("model_type", "")).startswith("mimo_v2")
    return key + (_number(text, f"{prefix}v_head_dim", key) if separate else key)


def _indexer(numbers: tuple[int, ...], text: Mapping[str, Any]) -> KvLayers:
    """Return the cache of an indexer's keys: in FP8, with a 32-bit scale for each 128 entries."""
    size = _number(text, "index_head_dim", 128)
    return KvLayers(numbers, 1, size + size // 128 * 4, latent=True, entry_bytes=1)


def _compressed(text: Mapping[str, Any], ratios: list[int]) -> tuple[KvLayers, ...]:
    """Return the caches of DeepSeek-V4: a window in every layer, and in most a cache that stands for several tokens.

    Source: vllm/models/deepseek_v4/attention.py and compressor.py.
    """
    size = _number(text, "head_dim", 512)
    layout = functools.partial(KvLayers, heads=1, latent=True, page_multiple=_V4_PAGE_MULTIPLE)
    caches = [layout(tuple(range(len(ratios))), width=_V4_TOKEN_BYTES, window=window(text), entry_bytes=1,
                     block_tokens=64)]
    for ratio in sorted({ratio for ratio in ratios if ratio > 1}):
        numbers = tuple(number for number, each in enumerate(ratios) if each == ratio)
        overlap = 2 if ratio == _V4_OVERLAPPING else 1
        compressor = functools.partial(layout, numbers, entry_bytes=4, window=overlap * ratio,
                                       block_tokens=8 // overlap)
        caches += [layout(numbers, width=_V4_TOKEN_BYTES, entry_bytes=1, tokens_per_entry=ratio),
                   compressor(width=2 * overlap * size)]
        if ratio == _V4_OVERLAPPING:
            caches += [replace(_indexer(numbers, text), tokens_per_entry=ratio, page_multiple=_V4_PAGE_MULTIPLE),
                       compressor(width=2 * overlap * _number(text, "index_head_dim", 128))]
    return tuple(caches)


def _number(text: Mapping[str, Any], key: str, default: int) -> int:
    value = text.get(key)
    return value if type(value) is int and value > 0 else default
