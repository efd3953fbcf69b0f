"""Context length of a model, from config.json.

Source: vllm/config/model.py (_get_and_verify_max_len), vllm/transformers_utils/model_arch_config_convertor.py and
vllm/model_executor/layers/rotary_embedding of vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
         "max_target_positions", "max_sequence_length", "max_seq_length", "seq_len")
"""Keys of the longest input; the smallest value counts."""

GEMMA3_DEFAULT = 131_072
"""Tokens of Gemma 3 where config.json does not say."""

_DEFAULT, _NO_LIMIT = 2048, 1 << 40

_SCALED_ALREADY = frozenset({"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"})
"""Kinds of rotary scaling whose factor `max_position_embeddings` includes."""


@dataclass(frozen=True)
class ContextLimits:
    """Tokens of a request.

    Attributes:
        default: unless the user sets another length; LongRoPE models are better without their long factors.
        longest: that the user may set.
    """

    default: int
    longest: int


def context_limits(text: Mapping[str, Any], notes: list[str]) -> ContextLimits:
    """Derive the limits; a default that config.json does not give is noted."""
    lengths = [value for value in map(text.get, _KEYS) if type(value) is int and value > 0]
    longest = _integer(text, "model_max_length") or min(lengths, default=0)
    if not longest:
        longest = GEMMA3_DEFAULT if is_gemma3(text) else _DEFAULT
        if not is_gemma3(text):
            notes.append(f"max_position_embeddings missing in config.json: {longest} assumed")
    scaled = list(scalings(text))
    if not is_gemma3(text):
        factors = [scaling_factor(scaling) for scaling in scaled if scaling_kind(scaling) not in _SCALED_ALREADY]
        longest = int(longest * (factors[-1] if factors else 1))
    default = longest
    if any(scaling_kind(scaling) in ("longrope", "su") for scaling in scaled):
        default = min(longest, _integer(text, "original_max_position_embeddings") or longest)
        if default < longest:
            notes.append(f"LongRoPE: a context above {default}, up to {longest}, needs MAX_MODEL_LEN, because its "
                         "factors weaken short requests")
    return ContextLimits(default, longest)


def longest_position(text: Mapping[str, Any]) -> int:
    """Return the largest number of positions that config.json gives under any of its keys; 0 without one."""
    return max((value for value in map(text.get, _KEYS) if type(value) is int and 0 < value < _NO_LIMIT), default=0)


def scalings(text: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the rotary scaling, or that of each type of layer."""
    for key in ("rope_scaling", "rope_parameters"):
        scaling = text.get(key)
        if isinstance(scaling, Mapping) and scaling:
            inner = [value for value in scaling.values() if isinstance(value, Mapping)]
            yield from inner or [scaling]
            return


def scaling_kind(scaling: Mapping[str, Any]) -> str:
    """Return the name of a rotary scaling."""
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def scaling_factor(scaling: Mapping[str, Any]) -> float:
    """Return the factor of a rotary scaling; 1 without one."""
    factor = scaling.get("factor")
    return float(factor) if isinstance(factor, int | float) and factor > 0 else 1.0


def is_gemma3(text: Mapping[str, Any]) -> bool:
    """Return whether the model is a Gemma 3."""
    return str(text.get("model_type", "")).startswith("gemma3")


def _integer(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    return value if type(value) is int and value > 0 else 0
