"""Rotary tables of a model, from config.json: the engine computes cosines and sines of all positions in advance.

Rules: layers with the same rotary parameters share one table; a scaled table has more rows; positions in images and
videos (M-RoPE) need four times the rows; architectures that run in transformers' code have no tables.

Source: vllm/model_executor/layers/rotary_embedding and the models of vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shoehorn.model.context import GEMMA3_DEFAULT, is_gemma3, longest_position, scaling_factor, scaling_kind, scalings
from shoehorn.model.transformers_models import runs_in_transformers

_DEFAULT = 2048
_UNROTATED = frozenset({
    "nemotron_h", "jamba", "mamba", "mamba2", "falcon_mamba", "kimi_linear", "bert", "roberta", "xlm-roberta", "opt",
    "gpt2", "gpt_bigcode", "bloom", "whisper"})
"""Model types without rotary embedding."""

_SECOND_TABLE = ("rope_local_base_freq", "local_rope_theta", "swa_rope_theta", "compress_rope_theta", "index_topk")
"""Keys of models whose windowed or compressed layers, or whose indexer, have a table of their own."""

_PARTIAL = ("partial_rotary_factor", "rotary_pct", "rope_pct")
_HALF = frozenset({"chatglm", "glm", "glm4"})
"""Model types that rotate half of a head unless they say otherwise."""

_IN_FLOAT32 = frozenset({"gpt_oss", "deepseek_v4"})
_ONE_TABLE_OF_POSITIONS = ("qwen3_vl", "qwen3_5", "qwen3_omni")
"""Model types, by their start, whose positions in images never exceed the number of tokens."""


def rotary_entries(text: Mapping[str, Any], architecture: str, head_dim: int) -> int:
    """Count the entries of all tables, each as large as one of the activations.

    Args:
        head_dim: width of a head, or of its rotated part where compressed attention separates it.
    """
    model_type = str(text.get("model_type", ""))
    if runs_in_transformers(architecture) or model_type in _UNROTATED or \
            text.get("position_embedding_type") in ("nope", "absolute"):
        return 0
    tables = sum(rows * width for rows, width in _tables(text, head_dim))
    return tables * (2 if model_type in _IN_FLOAT32 else 1)


def _tables(text: Mapping[str, Any], head_dim: int) -> Iterator[tuple[int, int]]:
    """Yield rows and width of each table."""
    longest = text.get("max_trained_positions") or longest_position(text) or (
        GEMMA3_DEFAULT if is_gemma3(text) else _DEFAULT)
    scaled = list(scalings(text)) or [{}]
    for scaling in scaled:
        proportional = scaling_kind(scaling) == "proportional"  # of a global layer, and as wide as its head
        width = text.get("global_head_dim") or head_dim if proportional else _width(text, scaling, head_dim)
        yield _rows(text, scaling, longest), width
    if len(scaled) == 1 and (is_gemma3(text) or any(text.get(key) for key in _SECOND_TABLE)):
        yield longest, _width(text, scaled[0], head_dim)


def _rows(text: Mapping[str, Any], scaling: Mapping[str, Any], longest: int) -> int:
    kind, factor, original = scaling_kind(scaling), scaling_factor(scaling), scaling.get(
        "original_max_position_embeddings", text.get("original_max_position_embeddings"))
    original = original if type(original) is int and original > 0 else 0
    rows = longest
    if kind in ("longrope", "su"):  # one table for short and one for long requests
        rows += original
    elif kind in ("linear", "yarn", "deepseek_yarn") and factor >= 1:
        rows = round((original if original and kind.endswith("yarn") else longest) * factor)
    pictures = "mrope_section" in scaling and not str(text.get("model_type", "")).startswith(_ONE_TABLE_OF_POSITIONS)
    return rows * 4 if pictures else rows


def _width(text: Mapping[str, Any], scaling: Mapping[str, Any], head_dim: int) -> int:
    """Return the rotated entries of a head."""
    rotated = text.get("rotary_dim")
    if type(rotated) is int and rotated > 0:
        return rotated
    default = 0.5 if text.get("model_type") in _HALF else 1.0
    partial = next((value for value in (*(scaling.get(key) for key in _PARTIAL), *(text.get(key) for key in _PARTIAL))
                    if isinstance(value, int | float) and 0 < value <= 1), default)
    return int((text.get("qk_rope_head_dim") or head_dim) * partial)
