"""Sizes of states per sequence, from config.json: one rule for each family of layers.

Source: get_mamba_state_shape_from_config of the models of vLLM 0.32.0, and
vllm/model_executor/layers/mamba/mamba_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoehorn.model.layer_caches import StateLayers

_FLOAT32_BYTES = 4


def state_size(text: Mapping[str, Any]) -> StateLayers | None:
    """Return the state of one layer, without layer numbers; None where its family is unknown."""
    try:
        return next((rule(text) for key, rule in _RULES if key in text), None)
    except (KeyError, TypeError):  # a key of the family is missing or null
        return None


def _delta_net(text: Mapping[str, Any]) -> StateLayers:
    """Gated DeltaNet: Qwen3-Next, Qwen3.5, OLMo hybrid."""
    key = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    value = text["linear_num_value_heads"] * text["linear_value_head_dim"]
    wide = text.get("mamba_ssm_dtype") == "float32" and str(text.get("model_type", "")).startswith("qwen3_5")
    return StateLayers((), 2 * key + value, text["linear_conv_kernel_dim"] - 1,
                       recurrent=value * text["linear_key_head_dim"], recurrent_bytes=_FLOAT32_BYTES * wide)


def _kimi(text: Mapping[str, Any]) -> StateLayers:
    """Kimi Delta Attention."""
    linear = text["linear_attn_config"]
    size = linear["num_heads"] * linear["head_dim"]
    return StateLayers((), 3 * size, linear["short_conv_kernel_size"] - 1, recurrent=size * linear["head_dim"],
                       recurrent_bytes=_FLOAT32_BYTES)


def _short_convolution(text: Mapping[str, Any]) -> StateLayers:
    """LFM2."""
    return StateLayers((), text.get("conv_dim") or text["hidden_size"], text["conv_L_cache"] - 1, keeps_drafts=False)


def _mamba2(heads: str, head_dim: str, groups: str, state: str, kernel: str, channels: str = "", wide: bool = False
            ) -> Any:
    """Return the rule of Mamba-2 under a family's key names."""
    def rule(text: Mapping[str, Any]) -> StateLayers:
        inner = text[heads] * text[head_dim]
        is_wide = wide and text.get("mamba_ssm_cache_dtype", "float32") == "float32"
        return StateLayers((), text.get(channels) or inner, text[kernel] - 1, text[groups], 2 * text[state],
                           inner * text[state], _FLOAT32_BYTES * is_wide, checkpoints=1)
    return rule


def _mamba(text: Mapping[str, Any]) -> StateLayers:
    """Mamba and Falcon Mamba."""
    inner = text["intermediate_size"]
    return StateLayers((), inner, text["conv_kernel"] - 1, recurrent=inner * text["state_size"], keeps_drafts=False)


def _jamba(text: Mapping[str, Any]) -> StateLayers:
    inner = text["mamba_expand"] * text["hidden_size"]
    return StateLayers((), inner, text["mamba_d_conv"] - 1, recurrent=inner * text["mamba_d_state"],
                       keeps_drafts=False)


def _linear_attention(text: Mapping[str, Any]) -> StateLayers:
    """Lightning attention of Ling and Ring."""
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return StateLayers((), 0, 0, recurrent=text["num_attention_heads"] * head_dim ** 2)


_RULES = (
    ("linear_num_value_heads", _delta_net),
    ("linear_attn_config", _kimi),
    ("conv_L_cache", _short_convolution),
    ("n_mamba_heads", _mamba2("n_mamba_heads", "mamba_headdim", "mamba_ngroups", "mamba_d_state", "mamba_d_conv")),
    ("mamba_n_heads", _mamba2("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv",
                              "mamba_d_ssm")),
    ("mamba_num_heads", _mamba2("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel",
                                wide=True)),
    ("mamba_d_state", _jamba),
    ("num_heads", _mamba2("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel")),
    ("state_size", _mamba),
    ("layer_group_size", _linear_attention),
)
"""The key that only this family's configs have, and its rule; the first that matches counts."""
