"""A published checkpoint's tensors, derived from transformers' own model on the meta device.

Rules: names and layouts are those that `save_pretrained` writes, that is, transformers' own conversions are reverted;
tensors that share the embedding's memory are left out, as it does; what a checkpoint holds besides (multi-token
prediction) is not known to transformers and comes from `extra`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contract.oracle import multi_token, packing, store
from contract.oracle.patterns import expand_all

_RENAMED = {"PhiMoEForCausalLM": "PhimoeForCausalLM"}
"""vLLM's registry names -> transformers' classes."""

SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64",
               "int32": "I32", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3"}

_TOWER = re.compile(r"((?:^|\.)vision_tower\.)((?:embeddings|encoder|pre_layrnorm|post_layernorm)\.)")
Headers = dict[str, tuple[str, tuple[int, ...]]]


def derive(document: Mapping[str, Any], folder: Path) -> Headers:
    """Name -> (dtype, shape) of the checkpoint that a stored model belongs to.

    Args:
        document: its `headers` may hold `config` (keys that make transformers' class of another one that has the same
            tensors), `without` (keys), `prefix`, `drop` (a regular expression) and `extra` (patterns ->
            [dtype, shape]) for what transformers does not know.
        folder: a new folder.
    """
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    special = document.get("headers", {})
    config = {**document["config"], **special.get("config", {})}
    for key in ("auto_map", "quantization_config", *special.get("without", ())):
        config.pop(key, None)
    store.write_folder({"config": config}, folder)
    model_config = transformers.AutoConfig.from_pretrained(folder)
    dtype = model_config.dtype or model_config.get_text_config().dtype or torch.bfloat16
    name = config["architectures"][0]
    with torch.device("meta"):
        model = getattr(transformers, _RENAMED.get(name, name))(model_config).to(dtype)
    model.tie_weights()
    tied = _tied(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    state = revert_weight_conversion(model, state)
    tensors = {special.get("prefix", "") + _published(name): (
        SAFETENSORS[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)) for name, tensor in state.items()}
    if "drop" in special:
        tensors = {name: kind for name, kind in tensors.items() if not re.search(special["drop"], name)}
    tensors |= multi_token.layers(tensors, config)
    tensors |= {name: (kind[0], tuple(kind[1])) for name, kind in expand_all(special.get("extra", {})).items()}
    method = document["config"].get("quantization_config", {}).get("quant_method")
    kind = "deepseek-v4" if config["model_type"] == "deepseek_v4" else method
    return packing.pack(tensors, kind) if kind else tensors


def _published(name: str) -> str:
    """The name in published files: transformers 5 dropped a level of CLIP's and SigLIP's towers."""
    return _TOWER.sub(r"\1vision_model.\2", name)


def _tied(model: Any) -> set[str]:
    """Names of parameters that are another one."""
    first: dict[int, str] = {}
    tied: set[str] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied.add(name)
        first.setdefault(id(parameter), name)
    return tied
