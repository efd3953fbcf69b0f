"""Format of the KV cache that a quantized checkpoint asks for.

Source: get_kv_cache_quant_algo_string in vllm/utils/torch_utils.py, and
vllm/model_executor/layers/attention/attention.py of vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MODELOPT = {"fp8": "fp8_e4m3", "nvfp4": "nvfp4"}


def kv_cache_dtype(quantization: Mapping[str, Any]) -> str:
    """Return the value of `kv-cache-dtype` that the engine uses unless it is set; "auto" for the model's own dtype.

    Args:
        quantization: `quantization_config` of the checkpoint; empty for an unquantized one.
    """
    method = str(quantization.get("quant_method", ""))
    if method == "compressed-tensors":
        return "fp8" if quantization.get("kv_cache_scheme") else "auto"
    if not method.startswith("modelopt"):
        return "auto"
    inner = quantization.get("quantization")
    sections = [section for section in (inner, quantization) if isinstance(section, Mapping)]
    scheme = next((section[key] for key in ("kv_cache_scheme", "kv_cache_quant_algo") for section in sections
                   if section.get(key)), None)
    if isinstance(scheme, Mapping):
        bits, is_float = scheme.get("num_bits"), scheme.get("type") == "float"
        name = "fp8" if bits == 8 and scheme.get("dynamic") is False else "nvfp4" if bits == 4 else ""
        return _MODELOPT.get(name, "auto") if is_float else "auto"
    return _MODELOPT.get(str(scheme).lower(), "auto")
