"""A quantized checkpoint's headers from those of the unquantized one, by the packing rules of each format.

Rules: matrices of decoder layers are packed, named `X.weight` of shape [out, in] or fused experts of three dimensions;
routers, norms, embeddings and towers stay as they are, as the quantizers leave them by default.
Sources: AutoAWQ, GPTQModel, llm-compressor (compressed-tensors), ModelOpt and bitsandbytes as published checkpoints
have them, and the create_weights of each method in vllm/model_executor/layers/quantization.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

Entry = tuple[str, tuple[int, ...]]
Headers = dict[str, Entry]
Rule = Callable[[int, int], dict[str, Entry]]

GROUP = 128
_HALF = ("awq", "gptq")
"""Formats whose quantizers load the model as float16."""

_PACKED = 8  # 4-bit weights in an I32
_IN_LAYER = re.compile(r"(?:^|.*\.)(?:layers|h)\.\d+\..+\.weight")
_UNPACKED = re.compile(r".*(?:norm|router|shared_expert_gate|vision|visual|audio|conv1d|embed|\.gate\.weight|"
                   r"in_proj_[ab]\.|multi_modal|mtp\.).*")


def awq(rows: int, columns: int) -> dict[str, Entry]:
    """AutoAWQ's GEMM format, 4 bits in groups of 128."""
    groups = columns // GROUP
    return {"qweight": ("I32", (columns, rows // _PACKED)), "qzeros": ("I32", (groups, rows // _PACKED)),
            "scales": ("F16", (groups, rows))}


def gptq(rows: int, columns: int) -> dict[str, Entry]:
    """GPTQ, 4 bits in groups of 128, symmetric."""
    groups = columns // GROUP
    return {"qweight": ("I32", (columns // _PACKED, rows)), "qzeros": ("I32", (groups, rows // _PACKED)),
            "scales": ("F16", (groups, rows)), "g_idx": ("I32", (columns,))}


def fp8_block(rows: int, columns: int) -> dict[str, Entry]:
    """FP8 with a scale for each block of 128 x 128 (DeepSeek, Qwen)."""
    blocks = (math.ceil(rows / GROUP), math.ceil(columns / GROUP))
    return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale_inv": ("F32", blocks)}


def ct_w4a16(rows: int, columns: int) -> dict[str, Entry]:
    """compressed-tensors, pack-quantized, 4 bits in groups of 128."""
    return {"weight_packed": ("I32", (rows, columns // _PACKED)), "weight_scale": ("BF16", (rows, columns // GROUP)),
            "weight_shape": ("I64", (2,))}


def ct_fp8_dynamic(rows: int, columns: int) -> dict[str, Entry]:
    """compressed-tensors, FP8 with a scale for each row."""
    return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": ("BF16", (rows, 1))}


def ct_nvfp4(rows: int, columns: int) -> dict[str, Entry]:
    """compressed-tensors, NVFP4."""
    return {"weight_packed": ("U8", (rows, columns // 2)), "weight_scale": ("F8_E4M3", (rows, columns // 16)),
            "weight_global_scale": ("F32", (1,)), "input_global_scale": ("F32", (1,))}


def modelopt_fp8(rows: int, columns: int) -> dict[str, Entry]:
    """ModelOpt FP8, a scale for each tensor."""
    return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": ("F32", ()), "input_scale": ("F32", ())}


def modelopt_nvfp4(rows: int, columns: int) -> dict[str, Entry]:
    """ModelOpt NVFP4."""
    return {"weight": ("U8", (rows, columns // 2)), "weight_scale": ("F8_E4M3", (rows, columns // 16)),
            "weight_scale_2": ("F32", ()), "input_scale": ("F32", ())}


def bnb_nf4(rows: int, columns: int) -> dict[str, Entry]:
    """bitsandbytes NF4, double quantized."""
    elements = rows * columns
    return {"weight": ("U8", (elements // 2, 1)), "weight.absmax": ("U8", (elements // 64,)),
            "weight.nested_absmax": ("F32", (math.ceil(elements / 64 / 256),)),
            "weight.nested_quant_map": ("F32", (256,)), "weight.quant_map": ("F32", (16,)),
            "weight.quant_state.bitsandbytes__nf4": ("U8", (120,))}


RULES: dict[str, Rule] = {
    "awq": awq, "gptq": gptq, "fp8": fp8_block, "w4a16": ct_w4a16, "fp8-dynamic": ct_fp8_dynamic, "nvfp4": ct_nvfp4,
    "modelopt-fp8": modelopt_fp8, "modelopt-nvfp4": modelopt_nvfp4, "bnb": bnb_nf4}


def pack(headers: Headers, kind: str) -> Headers:
    """The headers of the checkpoint in that format."""
    if kind in ("mxfp4", "deepseek-v4"):
        return dict(_mxfp4(headers) if kind == "mxfp4" else _deepseek_v4(headers))
    packed: Headers = {}
    for name, (dtype, shape) in _unfuse(headers):
        if len(shape) != 2 or not _IN_LAYER.fullmatch(name) or _UNPACKED.fullmatch(name):
            packed[name] = ("F16" if kind in _HALF and dtype == "BF16" else dtype, shape)
            continue
        stem = name.removesuffix("weight")
        packed |= {stem + part: entry for part, entry in RULES[kind](*shape).items()}
    return packed


def _unfuse(headers: Headers) -> Iterator[tuple[str, Entry]]:
    """Fused experts one by one, as quantizers write them; all else as it is."""
    hidden = next((shape[1] for name, (_, shape) in headers.items() if "embed" in name and len(shape) == 2), 0)
    for name, (dtype, shape) in headers.items():
        stem, _, part = name.rpartition(".")
        if len(shape) != 3 or not stem.endswith("experts"):
            yield name, (dtype, shape)
            continue
        rows, columns = shape[1:]
        if (part == "down_proj") != (rows == hidden):  # stored transposed
            rows, columns = columns, rows
        for expert in range(shape[0]):
            for each in ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,):
                size = rows // 2 if part == "gate_up_proj" else rows
                yield f"{stem}.{expert}.{each}.weight", (dtype, (size, columns))


def _mxfp4(headers: Headers) -> Iterator[tuple[str, Entry]]:
    """gpt-oss: fused experts as blocks of 32 four-bit weights with a scale each, transposed; all else as it is."""
    for name, (dtype, shape) in headers.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = shape
            yield f"{name}_blocks", ("U8", (experts, rows, columns // 32, 16))
            yield f"{name}_scales", ("U8", (experts, rows, columns // 32))
        else:
            yield name, (dtype, shape)


def _deepseek_v4(headers: Headers) -> Iterator[tuple[str, Entry]]:
    """DeepSeek V4's own names: experts in MXFP4, other matrices in FP8 by blocks, both with E8M0 scales."""
    for long, (dtype, shape) in headers.items():
        name = long.removeprefix("model.").replace("embed_tokens.", "embed.").replace("hc_head.hc_", "hc_head_")
        if re.search(r"hc_|\.ape|attn_sink|gate\.bias", name):
            yield name, ("F32", shape)
        elif len(shape) != 2 or re.search(r"^embed|^head|compressor|weights_proj|ffn\.gate", name):
            yield name, (dtype, shape)
        elif ".experts." in name:
            yield name, ("I8", (shape[0], shape[1] // 2))
            yield name.replace(".weight", ".scale"), ("F8_E8M0", (shape[0], shape[1] // 32))
        else:
            yield name, ("F8_E4M3", shape)
            blocks = (math.ceil(shape[0] / GROUP), math.ceil(shape[1] / GROUP))
            yield name.replace(".weight", ".scale"), ("F8_E8M0", blocks)
