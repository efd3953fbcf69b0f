"""Tensors of multi-token prediction, which checkpoints hold with the model and which the engine does not load.

Rules: DeepSeek's form is one more numbered layer with the last one's tensors, two norms, a projection and a head of its
own; Qwen's is `mtp.` with the tensors of a full attention layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Headers = dict[str, tuple[str, tuple[int, ...]]]

_NUMBERED = ("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa")


def layers(headers: Headers, config: Mapping[str, Any]) -> Headers:
    """The tensors that come in addition to the model's headers."""
    text = config.get("text_config", config)
    if config.get("model_type") in _NUMBERED and config.get("num_nextn_predict_layers"):
        return _numbered(headers, config)
    if text.get("mtp_num_hidden_layers") or config.get("model_type") == "qwen3_next":
        return _qwen(headers, text)
    return {}


def _numbered(headers: Headers, config: Mapping[str, Any]) -> Headers:
    last, hidden, vocab = config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
    start = f"model.layers.{last - 1}."
    own = f"model.layers.{last}."
    dtype = headers["model.embed_tokens.weight"][0]
    added = {own + name.removeprefix(start): kind for name, kind in headers.items() if name.startswith(start)}
    return added | {
        f"{own}enorm.weight": (dtype, (hidden,)), f"{own}hnorm.weight": (dtype, (hidden,)),
        f"{own}eh_proj.weight": (dtype, (hidden, 2 * hidden)), f"{own}shared_head.norm.weight": (dtype, (hidden,)),
        f"{own}shared_head.head.weight": (dtype, (vocab, hidden)),
        f"{own}embed_tokens.weight": (dtype, (vocab, hidden))}


def _qwen(headers: Headers, text: Mapping[str, Any]) -> Headers:
    hidden, last = text["hidden_size"], text["num_hidden_layers"] - 1
    layer = re.compile(rf".*layers\.{last}\.(.+)")
    added = {f"mtp.layers.0.{match[1]}": kind for name, kind in headers.items()
             if "visual" not in name and (match := layer.fullmatch(name))}
    dtype = next(kind[0] for kind in headers.values())
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    return added | {f"mtp.{norm}.weight": (dtype, (hidden,)) for norm in norms} | {
        "mtp.fc.weight": (dtype, (hidden, 2 * hidden))}
