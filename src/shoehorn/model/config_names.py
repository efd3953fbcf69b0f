"""config.json under one set of key names, completed with the defaults of the model's configuration class.

Rules: what the file says counts before a default; null counts as missing for sizes and as null for all else; a list of
sizes by layer counts with its largest; keys keep their own names besides the common ones, so a reader may use either.

Source: the configuration classes of transformers and of vLLM 0.32.0, recorded in model_defaults.json by
tools/record_model_defaults.py, and vllm/transformers_utils/model_arch_config_convertor.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "decoder_layers"),
    "hidden_size": ("n_embd", "d_model", "n_embed", "model_dim"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    "num_key_value_heads": ("n_head_kv", "num_kv_heads", "multi_query_group_num", "num_attention_groups", "n_kv_heads"),
    "head_dim": ("kv_channels", "hidden_size_per_head", "attention_head_dim"),
    "intermediate_size": ("n_inner", "ffn_hidden_size", "ffn_dim", "decoder_ffn_dim", "feed_forward_length"),
    "vocab_size": ("padded_vocab_size", "n_vocab"),
    "num_experts": ("moe_num_experts", "n_routed_experts", "num_local_experts"),
    "num_experts_per_tok": ("num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "experts_per_token",
                            "moe_k"),
    "moe_intermediate_size": ("expert_ffn_hidden_size", "moe_ffn_hidden_size"),
}
"""Common key -> the names that models give it, in vLLM's order where it has one."""

_COMMON_FIRST = frozenset({"num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim", "intermediate_size",
                           "vocab_size", "num_experts_per_tok", "moe_intermediate_size"})
"""Keys whose common name counts before the others; the others' come first as in vLLM."""

ATTRIBUTES = frozenset({*_OTHER_NAMES, *(name for names in _OTHER_NAMES.values() for name in names)} | {
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len", "original_max_position_embeddings", "sliding_window",
    "use_sliding_window", "sliding_window_pattern", "global_attn_every_n_layers", "full_attention_interval",
    "attention_chunk_size", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
    "tie_word_embeddings", "multi_query", "new_decoder_architecture", "num_kv_shared_layers", "global_head_dim",
    "rope_local_base_freq", "index_topk", "index_head_dim", "is_causal", "use_bidirectional_attention",
    "num_global_key_value_heads", "attention_k_eq_v", "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim",
    "no_rope_layer_interval", "attn_layer_period", "attn_layer_offset", "layer_group_size",
    "linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim",
    "linear_conv_kernel_dim", "conv_L_cache", "n_mamba_heads", "mamba_headdim", "mamba_ngroups", "mamba_d_state",
    "mamba_d_conv", "mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_ssm", "mamba_num_heads",
    "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "mamba_expand", "state_size", "mamba_ssm_dtype",
    "mamba_ssm_cache_dtype"})
"""Attributes of configuration classes that the readers of this room use."""

SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder", "generator", "text_encoder")
"""Keys under which a multimodal config has that of its text model; `thinker_config` has a section of its own."""

_MARKS = frozenset({"num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size",
                    *_OTHER_NAMES["num_hidden_layers"], *_OTHER_NAMES["hidden_size"]})
"""Keys of a text model: a section without any is not one."""

DEFAULT_PATTERN = "default_layer_types"
"""Key of the types of the first layers, which repeat, as the configuration class computes them."""

_INHERITED = ("torch_dtype", "dtype", "tie_word_embeddings")


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text model's section as config.json has it; the whole config where it has none."""
    return _section(config)[0]


def read_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text model's config under the common key names, complete."""
    section, model_type = _section(config)
    text = dict(section)
    known = _recorded().get(model_type, {})
    if model_type:
        text["model_type"] = model_type
    for key, value in known.get("defaults", {}).items():
        if key not in text or (text[key] is None and key in _COMMON_FIRST - {"head_dim"}):
            text[key] = value
    if pattern := known.get("layers"):
        text[DEFAULT_PATTERN] = pattern
    if section is not config:
        text |= {key: config[key] for key in _INHERITED if key in config and key not in section}
    elif "text_config" in known.get("sections", {}) and _ties(known) and _ties(
            _recorded().get(known["sections"]["text_config"], {})):  # the class takes the default of its text model
        text["tie_word_embeddings"] = True
    sizes = _named(section)
    text |= {common: text[own] for common, own in known.get("names", {}).items()
             if own in text and (own in section or common not in section)}
    for common in _OTHER_NAMES:
        value = sizes.get(common, _size(text.get(common)))
        text[common] = value if value else next(
            (size for name in _OTHER_NAMES[common] if (size := _size(text.get(name)))), None)
    _complete(text, sizes)
    return {key: value for key, value in text.items() if value is not None or key not in _OTHER_NAMES}


def section_types(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the model type of each section of a multimodal config, as given or as its class has it."""
    inner = config.get("thinker_config")
    types = dict(_recorded().get(str(config.get("model_type") or ""), {}).get("sections", {}))
    types |= {key: str(value["model_type"]) for key, value in config.items()
              if isinstance(value, Mapping) and value.get("model_type")}
    return section_types(inner) if isinstance(inner, Mapping) else types


def _ties(known: Mapping[str, Any]) -> bool:
    return known.get("defaults", {}).get("tie_word_embeddings") is True


def _named(section: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes that a config gives, by common name."""
    named = {}
    for common, others in _OTHER_NAMES.items():
        names = (common, *others) if common in _COMMON_FIRST else (*others[:2], common, *others[2:])
        value = next((size for name in names if (size := _size(section.get(name)))), 0)
        if value:
            named[common] = value
    return named


def _complete(text: dict[str, Any], sizes: Mapping[str, int]) -> None:
    """Fill in what vLLM derives from other keys, or reads from keys of one model type."""
    model_type = text.get("model_type")
    for nested in map(text.get, ("attn_config", "ffn_config")):  # DBRX, MPT
        if isinstance(nested, Mapping):
            for common, key in (("num_key_value_heads", "kv_n_heads"), ("num_experts", "moe_num_experts"),
                                ("num_experts_per_tok", "moe_top_k"), ("intermediate_size", "ffn_hidden_size")):
                text[common] = _size(nested.get(key)) or text[common]
    if model_type in ("falcon", "RefinedWeb", "RefinedWebModel", "gpt_bigcode") and text.get("multi_query") and \
            not text.get("new_decoder_architecture"):
        text["num_key_value_heads"] = 1
    if model_type == "longcat_flash":  # counts both attentions of a layer elsewhere
        text["num_hidden_layers"] = sizes.get("num_hidden_layers", text["num_hidden_layers"])
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    if not text["head_dim"] and hidden and heads:
        text.pop("head_dim")


def _section(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the text model's section and its model type, following sections within sections."""
    model_type = str(config.get("model_type") or "")
    known = _recorded().get(model_type, {}).get("sections", {})
    for key in SECTIONS:
        section = config.get(key)
        if section is None and key in known and not _MARKS & config.keys():  # all of it is left to the class
            section = {}
        if isinstance(section, Mapping) and (key == "thinker_config" or _MARKS & section.keys() or (
                key in known and not _MARKS & config.keys())):
            inner = dict(section)
            inner.setdefault("model_type", known.get(key, ""))
            return _section(inner) if key == "thinker_config" else (section, str(inner["model_type"] or ""))
    return config, model_type


def _size(value: object) -> int:
    """Return a positive size, of a list the largest; 0 otherwise."""
    return max(_sizes(value), default=0)


def _sizes(value: object) -> Iterator[int]:
    for each in value if isinstance(value, list) else (value,):
        if type(each) is int and 0 < each < 1 << 40:
            yield each
        elif type(each) is float and each.is_integer() and 0 < each < 1 << 40:
            yield int(each)


@functools.cache
def _recorded() -> Mapping[str, Any]:
    """Return the recording of the configuration classes."""
    path = Path(__file__).with_name("model_defaults.json")
    return dict(json.loads(path.read_text(encoding="utf-8")))
