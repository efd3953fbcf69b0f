"""Kind of each layer's attention, from config.json: full, windowed, chunked, a state, several of them, or none.

Rules: what the config says layer by layer counts; a window without such a list counts only for models whose every layer
has it; a kind that is not understood is counted as full attention, which overestimates, and noted.

Source: the models of vLLM 0.32.0 (vllm/model_executor/models) and the config classes of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Flag, auto
from typing import Any

from shoehorn.model.config_names import DEFAULT_PATTERN


class LayerKind(Flag):
    """Cache of a layer; a layer with attention and a state has both."""

    NONE = 0
    FULL = auto()
    WINDOW = auto()
    CHUNK = auto()
    STATE = auto()


_BY_NAME = {
    "full_attention": LayerKind.FULL, "attention": LayerKind.FULL, "indexed_attention": LayerKind.FULL,
    "sliding_attention": LayerKind.WINDOW,
    "sliding_window": LayerKind.WINDOW, "chunked_attention": LayerKind.CHUNK, "linear_attention": LayerKind.STATE,
    "mamba": LayerKind.STATE, "mamba2": LayerKind.STATE, "conv": LayerKind.STATE, "short_conv": LayerKind.STATE,
    "gated_delta_net": LayerKind.STATE, "kda": LayerKind.STATE, "hybrid": LayerKind.STATE | LayerKind.FULL,
    "mlp": LayerKind.NONE, "moe": LayerKind.NONE, "M": LayerKind.STATE, "*": LayerKind.FULL, "-": LayerKind.NONE,
    "E": LayerKind.NONE, "L": LayerKind.WINDOW, "G": LayerKind.FULL}
"""Layer types by their names in `layer_types`, `layers_block_type` and patterns of one letter per layer."""

_ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "modernbert", "nomic_bert",
                       "distilbert", "electra", "deberta", "deberta-v2", "mpnet", "new", "gte_new"})
_ONLY_STATES = frozenset({"mamba", "mamba2", "falcon_mamba"})
_ALWAYS_WINDOWED = frozenset({"mistral", "mixtral", "phi3", "phi3_v", "phimoe", "starcoder2"})
_PERIODS = ("sliding_window_pattern", "global_attn_every_n_layers")
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2}
"""Every n-th layer of these has full attention, where their config does not say; the others have a window."""


def is_encoder(text: Mapping[str, Any]) -> bool:
    """Return whether attention goes both ways, so that nothing of a sequence is kept."""
    return (text.get("model_type") in _ENCODERS or text.get("is_causal") is False
            or text.get("use_bidirectional_attention") is True)


def layer_kinds(text: Mapping[str, Any], layers: int, notes: list[str]) -> list[LayerKind]:
    """Return the kind of each layer."""
    if is_encoder(text):
        return [LayerKind.NONE] * layers
    kinds = _named(text, layers, notes) or _states(text, layers) or _by_class(text, layers) or _windows(
        text, layers, notes)
    shared = text.get("num_kv_shared_layers")
    if type(shared) is int and 0 < shared < layers:  # read the caches of earlier layers
        kinds = kinds[:-shared] + [LayerKind.NONE] * shared
    return kinds


def window(text: Mapping[str, Any]) -> int:
    """Return the tokens of the window; 0 without one."""
    size = text.get("sliding_window") or text.get("sliding_window_size")
    uses = text.get("use_sliding_window", not str(text.get("model_type", "")).startswith("qwen"))
    if type(size) is not int or size <= 0 or not uses:
        return 0
    return size + str(text.get("model_type", "")).startswith("cohere2")  # vLLM's window excludes the token itself


def _named(text: Mapping[str, Any], layers: int, notes: list[str]) -> list[LayerKind]:
    """Return the kinds that the config lists layer by layer; empty without such a list."""
    if text.get("model_type") == "llama4_text":
        return _chunks(text, layers)
    names = next((text[key] for key in ("layers_block_type", "layer_types") if _is_list(text.get(key), layers)), None)
    pattern = text.get("hybrid_override_pattern")
    if names is None and isinstance(pattern, str) and len(pattern) == layers:
        names = list(pattern)
    if names is not None:
        return [_by_name(str(name), text, notes) for name in names]
    for key, ones, zeros in (("hybrid_layer_pattern", LayerKind.WINDOW, LayerKind.FULL),
                             ("attn_type_list", LayerKind.FULL, LayerKind.STATE)):
        if _is_list(text.get(key), layers):
            return [ones if value else zeros for value in text[key]]
    return []


def _by_name(name: str, text: Mapping[str, Any], notes: list[str]) -> LayerKind:
    kind = _BY_NAME.get(name)
    if kind is None:
        note = f"unknown layer type {name}: its cache is counted as full attention"
        if note not in notes:
            notes.append(note)
        return LayerKind.FULL
    if kind is LayerKind.WINDOW and not window(text):
        return LayerKind.FULL
    return kind


def _states(text: Mapping[str, Any], layers: int) -> list[LayerKind]:
    """Return the kinds of models that describe their states otherwise; empty for other models."""
    model_type, numbers = str(text.get("model_type", "")), range(layers)
    if model_type in _ONLY_STATES:
        return [LayerKind.STATE] * layers
    if model_type == "falcon_h1":
        return [LayerKind.STATE | LayerKind.FULL] * layers
    full: set[int] | None = None
    linear, period = text.get("linear_attn_config"), text.get("attn_layer_period")
    if isinstance(linear, Mapping) and isinstance(linear.get("full_attn_layers"), list):
        full = {number - 1 for number in linear["full_attn_layers"]}
    elif isinstance(text.get("full_attn_idxs"), list) and "conv_L_cache" in text:
        full = set(text["full_attn_idxs"])
    elif isinstance(text.get("attn_layer_indices"), list):
        full = set(text["attn_layer_indices"])
    elif type(period) is int and period > 0:
        full = {number for number in numbers if number % period == text.get("attn_layer_offset", 0)}
    elif "linear_num_value_heads" in text:
        interval = text.get("full_attention_interval") or 4
        full = {number for number in numbers if (number + 1) % interval == 0}
    elif type(size := text.get("layer_group_size")) is int and model_type.startswith("bailing") and size > 1:
        whole = layers // size * size
        full = {number for number in numbers if (number + 1) % size == 0 or number >= whole}
    if full is None:
        return []
    return [LayerKind.FULL if number in full else LayerKind.STATE for number in numbers]


def _chunks(text: Mapping[str, Any], layers: int) -> list[LayerKind]:
    """Return the kinds of Llama 4: chunked attention in layers with rotary embedding, every fourth without."""
    if not text.get("attention_chunk_size"):
        return [LayerKind.FULL] * layers
    rotary = text.get("no_rope_layers")  # despite its name, 1 for those with rotary embedding
    if not isinstance(rotary, list) or len(rotary) != layers:
        interval = text.get("no_rope_layer_interval") or 4
        rotary = [(number + 1) % interval for number in range(layers)]
    return [LayerKind.CHUNK if value else LayerKind.FULL for value in rotary]


def _by_class(text: Mapping[str, Any], layers: int) -> list[LayerKind]:
    """Return the kinds that the configuration class computes; empty if config.json has a rule, or the class none."""
    pattern = text.get(DEFAULT_PATTERN)
    if not pattern or any(text.get(key) for key in _PERIODS):
        return []
    kinds = [_by_name(str(name), text, []) for name in pattern]
    return [kinds[number % len(kinds)] for number in range(layers)]


def _windows(text: Mapping[str, Any], layers: int, notes: list[str]) -> list[LayerKind]:
    """Return the kinds of models with attention alone."""
    if not window(text):
        return [LayerKind.FULL] * layers
    model_type = str(text.get("model_type", ""))
    pattern = next((text[key] for key in _PERIODS if text.get(key)), _PATTERNS.get(model_type))
    if type(pattern) is int:
        return [LayerKind.WINDOW if (number + 1) % pattern else LayerKind.FULL for number in range(layers)]
    if isinstance(pattern, str) and pattern:
        return [_BY_NAME.get(pattern[number % len(pattern)], LayerKind.FULL) for number in range(layers)]
    if model_type in _ALWAYS_WINDOWED:
        return [LayerKind.WINDOW] * layers
    notes.append(f"sliding window of {window(text)} tokens: config.json does not say in which layers; the cache is "
                 "counted as full attention")
    return [LayerKind.FULL] * layers


def _is_list(value: object, layers: int) -> bool:
    return isinstance(value, list) and len(value) == layers
