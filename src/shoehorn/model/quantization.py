"""Quantization of a checkpoint, from every place where vLLM 0.32.0 looks for it, and from the tensors' dtypes.

Rules: the places count in vLLM's order; a checkpoint whose headers hold packed weights is never unquantized: without a
description its format follows from the tensors' names, and its stored bytes count.

Source: vllm/transformers_utils/config.py (get_config), model_arch_config_convertor.py (get_quantization_config) and the
get_config_filenames of vllm/model_executor/layers/quantization.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from shoehorn.model.files import Files, read_json
from shoehorn.model.safetensors import Tensor

OTHER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files besides config.json that describe a quantization; vLLM reads all but the first only for `--quantization`."""

_MODELOPT = "hf_quant_config.json"
_PACKED_DTYPES = frozenset({"U8", "I8", "I32", "U32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"})
_BY_SUFFIX = (("weight.absmax", "bitsandbytes"), ("SCB", "bitsandbytes"), ("weight_packed", "compressed-tensors"),
              ("weight_scale_2", "modelopt_fp4"), ("weight_scale_inv", "fp8"), ("_blocks", "mxfp4"), ("g_idx", "gptq"),
              ("qzeros", "awq"), ("qweight", "gptq"), ("weight_scale", "fp8"))
"""Formats by the tensors that only they have; the first that matches counts."""

PACKED = "packed"
"""Method of packed weights whose format is not recognized."""


def other_files(files: Files, names: Mapping[str, int]) -> dict[str, Mapping[str, Any]]:
    """Read the files besides config.json that describe a quantization.

    Raises:
        ModelUnavailableError: a file is damaged; names the file.
    """
    return {name: read_json(files, names, name) for name in OTHER_FILES if name in names}


def read_quantization(config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]], tensors: Iterable[Tensor],
                      notes: list[str]) -> Mapping[str, Any]:
    """Return the description of the quantization with `quant_method`; empty for an unquantized checkpoint.

    Args:
        files: content of the other files, by name.
        notes: receives the contradictions of description and tensors.
    """
    described = _described(config, files)
    stored = _stored(tensors)
    if described.get("quant_method") or not stored:
        return described if described.get("quant_method") else {}
    beside = [file for name, file in files.items() if name != _MODELOPT]
    notes.append(f"the weights are packed ({stored}), but no quantization_config describes them: vLLM loads them only "
                 f"with --quantization in VLLM_EXTRA_ARGS{'' if beside else ' and a file that describes them'}")
    return {**(beside[0] if beside else {}), "quant_method": stored}


def _described(config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the description that vLLM takes, with its method."""
    sections = [config.get("quantization_config"), files.get(_MODELOPT), config.get("compression_config")]
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        inner = config.get(key)
        if isinstance(inner, Mapping):
            sections += [inner.get("quantization_config"), inner.get("compression_config")]
            deeper = inner.get("text_config")
            sections += [deeper.get("quantization_config")] if isinstance(deeper, Mapping) else []
    section = next((each for each in sections if isinstance(each, Mapping) and each), {})
    method = str(section.get("quant_method") or _modelopt(section)).lower().replace("compressed_tensors",
                                                                                    "compressed-tensors")
    return {**section, "quant_method": method} if method else section


def _modelopt(section: Mapping[str, Any]) -> str:
    """Return vLLM's name of a ModelOpt algorithm; empty for other descriptions."""
    inner = section.get("quantization")
    algorithm = (inner if isinstance(inner, Mapping) else section).get("quant_algo")
    if not algorithm:
        return ""
    name = str(algorithm).upper()
    if "MIXED" in name:
        return "modelopt_mixed"
    return {"NVFP4": "modelopt_fp4", "MXFP8": "modelopt_mxfp8"}.get(name, "modelopt")


def _stored(tensors: Iterable[Tensor]) -> str:
    """Return the format of packed weights by the tensors' names; empty where the weights are not packed."""
    packed = [tensor for tensor in tensors if len(tensor.shape) >= 2 and tensor.dtype in _PACKED_DTYPES]
    if not packed:
        return ""
    suffixes = {suffix for tensor in tensors for suffix, _ in _BY_SUFFIX if tensor.name.endswith(suffix)}
    return next((method for suffix, method in _BY_SUFFIX if suffix in suffixes), PACKED)
