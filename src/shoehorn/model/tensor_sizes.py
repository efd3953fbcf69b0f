"""Sizes of a model from the shapes of its tensors, which count before config.json.

Rules: a size that config.json lacks follows from the tensors where they show it; KV heads that contradict the key
projection are corrected and noted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from shoehorn.model.files import not_understood
from shoehorn.model.safetensors import Tensor
from shoehorn.model.tensor_groups import layer_list

_KEY = re.compile(r"(?:.*\.)?(?:self_attn|attn|attention)\.(?:k_proj|wk)\.weight(_packed)?")
_TABLE = re.compile(r"(?:.*\.)?(?:embed\w*|wte|tok_embeddings|word_embeddings)\.weight")
_STORED_WHOLE = frozenset({"BF16", "F16", "F32", "F8_E4M3", "F8_E5M2"})


def complete_from_tensors(text: Mapping[str, Any], tensors: Sequence[Tensor], notes: list[str]) -> dict[str, Any]:
    """Return the text model's config with the sizes that the tensors show.

    Raises:
        ModelUnavailableError: neither config.json nor the tensors show the number of layers and their width.
    """
    text = dict(text)
    prefix, number = layer_list(tensors, text.get("num_hidden_layers") or 0)
    table = next((tensor for tensor in tensors if _TABLE.fullmatch(tensor.name) and len(tensor.shape) == 2), None)
    guessed = {"num_hidden_layers": number or None, "hidden_size": table.shape[1] if table else None,
               "vocab_size": table.shape[0] if table else None}
    for key, value in guessed.items():
        if not text.get(key) and value:
            notes.append(f"{key} missing in config.json: {value} by the tensors")
            text[key] = value
    for key in guessed:
        if not text.get(key):
            raise not_understood(f"{key} is missing, and the tensors do not show it")
    if not text.get("num_attention_heads"):
        text["num_attention_heads"] = max(1, text["hidden_size"] // (text.get("head_dim") or 128))
        if str(text.get("model_type", "")) not in ("mamba", "mamba2", "falcon_mamba"):
            notes.append(f"num_attention_heads missing in config.json: {text['num_attention_heads']} assumed")
    _check_keys(text, tensors, prefix, notes)
    return text


def _check_keys(text: dict[str, Any], tensors: Sequence[Tensor], prefix: str, notes: list[str]) -> None:
    """Complete head size and KV heads from the key projection of the layers."""
    rows = next((tensor.shape[0] for tensor in tensors if tensor.name.startswith(f"{prefix}.")
                 and len(tensor.shape) == 2 and tensor.shape[1] > 1 and (match := _KEY.fullmatch(tensor.name))
                 and (match[1] or tensor.dtype in _STORED_WHOLE)), 0)
    heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    if not rows or text.get("kv_lora_rank"):
        return
    head_dim = text.get("head_dim")
    if not head_dim:
        if rows % heads == 0:
            text["head_dim"] = rows // heads
        return
    if rows != heads * head_dim and rows % head_dim == 0 and not any(
            text.get(key) for key in ("global_head_dim", "num_global_key_value_heads", "swa_head_dim",
                                      "swa_num_key_value_heads")):
        notes.append(f"config.json gives {heads} KV heads, the key projection has {rows // head_dim}: the projection "
                     "counts")
        text["num_key_value_heads"] = rows // head_dim
