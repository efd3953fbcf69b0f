"""Memory that vLLM's loading adds to the registered parameters: by rule, from its modules.

Rules: MLA layers copy kv_b_proj in the activations' dtype (mla_attention.py, process_weights_after_loading);
bitsandbytes' plugin keeps one absmax in fp32 for 64 weights (vllm_bnb_plugin/bitsandbytes_loader.py); online FP8
registers the checkpoint's dtype and holds one byte a weight in the end (quantization/online/fp8.py). Repacking for
kernels (Marlin, CUTLASS) keeps the bytes but for padding, which is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NF4_BLOCK = 64
_FP8_METHODS = ("Fp8PerTensorOnlineLinearMethod", "Fp8PerTensorOnlineMoEMethod")


def changes(vllm_config: Any, model: Any) -> Mapping[str, int]:
    """Bytes that loading adds, by cause; negative where it frees some."""
    sizes = {"mla_copies": _mla_copies(vllm_config), "bnb_absmax": _absmax(model), "online_fp8": _online_fp8(model)}
    return {cause: size for cause, size in sizes.items() if size}


def _mla_copies(vllm_config: Any) -> int:
    layers = vllm_config.compilation_config.static_forward_context.values()
    entries = sum(layer.num_heads * layer.kv_lora_rank * (layer.qk_nope_head_dim + layer.v_head_dim)
                  for layer in layers if type(layer).__name__ == "MLAAttention")
    return int(entries * vllm_config.model_config.dtype.itemsize)


def _absmax(model: Any) -> int:
    packed = sum(parameter.numel() for parameter in model.parameters()
                 if type(parameter).__name__ == "BitsAndBytes4bitParameter")
    return packed * 2 // _NF4_BLOCK * 4


def _online_fp8(model: Any) -> int:
    saved = 0
    for module in model.modules():
        if type(getattr(module, "quant_method", None)).__name__ in _FP8_METHODS:
            saved += sum(parameter.numel() * (parameter.element_size() - 1)
                         for name, parameter in module.named_parameters(recurse=False) if "weight" in name)
    return -saved
