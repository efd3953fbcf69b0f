"""Quantized variants of stored models: configuration as their quantizers write it, headers by the packing rules.

`PYTHONPATH=tests python -m contract.oracle.quantized` writes those of `VARIANTS` whose base has headers; the records
come from `contract.oracle` as for any model.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

from contract.oracle import packing, store
from contract.oracle.patterns import compact, expand_all

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "llama-3.1-8b-instruct": ("awq", "gptq", "w4a16", "fp8-dynamic", "nvfp4", "modelopt-fp8", "modelopt-nvfp4", "bnb",
                              "online-fp8", "online-bnb"),
    "llama-3.3-70b-instruct": ("w4a16", "modelopt-fp8", "awq"),
    "llama-4-scout": ("w4a16", "fp8-dynamic"),
    "qwen2.5-7b-instruct": ("awq", "gptq"),
    "qwen2.5-vl-7b-instruct": ("awq",),
    "qwen3-8b": ("awq", "fp8"),
    "qwen3-30b-a3b": ("awq", "gptq", "fp8", "w4a16", "modelopt-nvfp4"),
    "qwen3-235b-a22b": ("fp8",),
    "qwen3-vl-8b-instruct": ("fp8",),
    "qwen3-next-80b-a3b-instruct": ("fp8",),
    "qwen3.5-35b-a3b": ("fp8",),
    "gemma-3-12b-it": ("w4a16", "bnb"),
    "gemma-2-9b-it": ("bnb",),
    "mistral-small-3.1-24b-instruct": ("fp8-dynamic", "w4a16"),
    "mixtral-8x7b-instruct-v0.1": ("awq", "gptq"),
    "phi-4": ("bnb", "fp8-dynamic"),
    "deepseek-v2-lite-chat": ("fp8-dynamic",),
    "deepseek-v3-bf16": ("fp8",),
    "glm-4.5-air": ("fp8-dynamic",),
    "granite-3.3-8b-instruct": ("fp8-dynamic",),
    "nemotron-nano-9b-v2": ("modelopt-fp8",),
    "seed-oss-36b-instruct": ("awq",),
    "smollm3-3b": ("bnb",),
    "falcon-h1-7b-instruct": ("fp8-dynamic",),
}
_TOWERS = ("visual", "vision_tower", "multi_modal_projector")
_ONLINE = {"online-fp8": "fp8", "online-bnb": "bitsandbytes"}


def variant(base: Mapping[str, Any], name: str, kind: str) -> dict[str, Any]:
    """The document of a base model in a format."""
    document: dict[str, Any] = {"source": f"{name} as {kind}", "base": name,
                                "config": copy.deepcopy(base["config"])}
    if "capability" in base:
        document["capability"] = base["capability"]
    if kind in _ONLINE:
        return document | {"options": {"quantization": _ONLINE[kind]}, "headers": "packed", "tensors": base["tensors"]}
    headers = {key: (dtype, tuple(shape)) for key, (dtype, shape) in expand_all(base["tensors"]).items()}
    packed = packing.pack(headers, kind)
    left = [key.removesuffix(".weight") for key, (dtype, shape) in packed.items()
            if key.endswith(".weight") and dtype in ("BF16", "F16", "F32") and len(shape) == 2 and "embed" not in key]
    if kind == "awq":  # compared as parts of names, and written short
        left = sorted({key.partition(".")[0] if key.startswith(_TOWERS) else key for key in left})
    quantization = configuration(kind, left)
    if kind in ("awq", "gptq"):
        document["config"]["torch_dtype"] = "float16"
    if kind == "modelopt-nvfp4":
        document["files"] = {"hf_quant_config.json": quantization}
    else:
        document["config"]["quantization_config"] = quantization
    return document | {"headers": "packed", "tensors": compact(packed.items())}


def configuration(kind: str, left: list[str]) -> dict[str, Any]:
    """`quantization_config` of a format, or the content of hf_quant_config.json.

    Args:
        left: modules that stay unquantized.
    """
    weights: dict[str, Any]
    if kind == "awq":
        return {"bits": 4, "group_size": 128, "modules_to_not_convert": left, "quant_method": "awq",
                "version": "gemm", "zero_point": True}
    if kind == "gptq":
        return {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "damp_percent": 0.01,
                "quant_method": "gptq", "true_sequential": True, "lm_head": False,
                "dynamic": {f"-:{name}$": {} for name in left}}
    if kind == "fp8":
        return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
                "modules_to_not_convert": left}
    if kind == "bnb":
        return {"_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16",
                "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
                "llm_int8_skip_modules": left, "llm_int8_threshold": 6.0, "load_in_4bit": True, "load_in_8bit": False,
                "quant_method": "bitsandbytes"}
    if kind.startswith("modelopt"):
        algorithm = {"quant_algo": "FP8" if kind == "modelopt-fp8" else "NVFP4", "kv_cache_quant_algo": None,
                     "exclude_modules": left}
        return {"producer": {"name": "modelopt", "version": "0.37.0"},
                "quantization": algorithm if kind == "modelopt-fp8" else {**algorithm, "group_size": 16}}
    activations: dict[str, Any] | None = None
    if kind == "w4a16":
        form, weights = "pack-quantized", {"num_bits": 4, "type": "int", "group_size": 128, "strategy": "group"}
    elif kind == "fp8-dynamic":
        form, weights = "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}
        activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    else:
        form = "nvfp4-pack-quantized"
        weights = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
        activations = {**weights, "dynamic": "local", "symmetric": True}
    weights |= {"symmetric": True, "dynamic": False}
    return {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": left,
            "kv_cache_scheme": None, "config_groups": {"group_0": {
                "targets": ["Linear"], "weights": weights, "input_activations": activations,
                "output_activations": None}}}


def main() -> int:
    """Write the variants that are not there yet."""
    present = set(store.names())
    for name, kinds in VARIANTS.items():
        base = store.load(name)
        for kind in kinds:
            own = f"{name}-{kind}"
            if own not in present and "tensors" in base:
                store.save(own, variant(base, name, kind))
    return 0


if __name__ == "__main__":
    sys.exit(main())
