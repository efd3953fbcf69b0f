"""Changes of config.json by the user (`hf-overrides`), in the form that vLLM 0.32.0 needs.

Rules: what the user gives is never changed, only completed: a rotary scaling replaces all rotary parameters of the
checkpoint, so its base frequency is added; YaRN does not lengthen the context, so the longer limit is added;
of a multimodal model the text model is meant.

Source: vllm/config/model.py (ModelConfig.__post_init__, _apply_dict_overrides, _get_and_verify_max_len).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TEXT_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")
_MODEL_KEYS = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""Rotary parameters that describe the model and not its scaling."""


def complete_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Complete overrides for a model.

    Args:
        config: the checkpoint's config.json.
        overrides: by key of config.json, as the user gave them.
    """
    if not isinstance(config.get("text_config"), Mapping):
        return _complete(config, overrides)
    section = overrides.get("text_config")
    text = dict(section) if isinstance(section, Mapping) else {}
    text |= {key: value for key, value in overrides.items() if key in _TEXT_KEYS and key not in config}
    others = {key: value for key, value in overrides.items() if key not in text and key != "text_config"}
    return {**others, "text_config": _complete(config["text_config"], text)} if text else others


def apply_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with complete overrides: sections are merged, other values replaced."""
    changed = dict(config)
    for key, value in overrides.items():
        section = config.get(key)
        if isinstance(value, Mapping) and isinstance(section, Mapping) and key.endswith("_config"):
            changed[key] = apply_overrides(section, value)
        else:
            changed[key] = value
    if "rope_parameters" in overrides:
        changed.pop("rope_scaling", None)
    return changed


def _complete(text: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    completed = {key: value for key, value in overrides.items() if key not in ("rope_scaling", "rope_theta")}
    before = _rotary(text)
    scaling = overrides.get("rope_parameters", overrides.get("rope_scaling", before))
    if not isinstance(scaling, Mapping):  # null: without scaling
        scaling = {"rope_type": "default"}
    if any(isinstance(value, Mapping) for value in scaling.values()) or not any(
            key in overrides for key in _TEXT_KEYS[:3]):
        return completed
    rotary = {key: value for key, value in before.items() if key in _MODEL_KEYS} | dict(scaling)
    kind = str(rotary.pop("type", rotary.get("rope_type", "default")))
    rotary.setdefault("rope_type", kind)
    if "rope_theta" in overrides:
        rotary["rope_theta"] = overrides["rope_theta"]
    longest, factor = text.get("max_position_embeddings"), rotary.get("factor")
    if "yarn" in kind and isinstance(factor, int | float) and type(longest) is int:
        original = rotary.setdefault("original_max_position_embeddings", longest)
        if type(original) is int and original * factor > longest:
            completed.setdefault("max_position_embeddings", round(original * factor))
    return {**completed, "rope_parameters": rotary}


def _rotary(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checkpoint's rotary parameters in their present form."""
    rotary = {key: text[key] for key in _MODEL_KEYS if text.get(key) is not None}
    for key in ("rope_scaling", "rope_parameters"):
        section = text.get(key)
        if isinstance(section, Mapping):
            rotary |= section
    return rotary
