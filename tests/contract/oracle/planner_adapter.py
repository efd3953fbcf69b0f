"""Figures of Shoehorn's planner for a stored model: the only file here that imports the planner."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from contract.oracle.patterns import expand_all
from shoehorn.common.errors import ShoehornError
from shoehorn.model import checkpoint
from shoehorn.model.safetensors import DTYPE_BITS, Tensor
from shoehorn.model.shape import ModelShape
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.parallelism import divides
from shoehorn.planner.serving_config import BITSANDBYTES, CacheOptions, Limits, Parallelism, ServingConfig
from shoehorn.planner.vllm_args import with_options

Figures = dict[str, Any]

_LIMIT_BYTES = 1 << 50  # more than any model needs
_OPTIONS = {"kv-cache-dtype": "kv_cache_dtype", "enable-prefix-caching": "enable_prefix_caching",
            "quantization": "quantization", "limit-mm-per-prompt": "limit_mm_per_prompt"}
_BATCH_TOKENS = 2048  # of the recorded engine


def plan(document: Mapping[str, Any], gpus: tuple[int, ...]) -> dict[int, Figures]:
    """Return the planner's figures under the oracle's names, for each number of GPUs, or `refused` with the error.

    Args:
        document: a stored model with its `tensors`; of `options`, those that Shoehorn has settings for are passed on.
        gpus: degrees of tensor parallelism.
    """
    try:
        shape = checkpoint.shape_of(document["config"], _tensors(document), 0,
                                    document.get("options", {}).get("hf_overrides", {}), document.get("files", {}),
                                    document.get("options", {}).get("runner") == "pooling")
    except ShoehornError as error:
        return {number: {"refused": str(error)} for number in gpus}
    return {number: _figures(shape, number, document.get("options", {})) for number in gpus}


def _figures(shape: ModelShape, gpus: int, options: Mapping[str, Any]) -> Figures:
    start = ServingConfig(_LIMIT_BYTES, Limits(shape.max_position, 1, _BATCH_TOKENS), kv_cache_bytes=0,
                          parallelism=Parallelism(tensor=gpus), cache=CacheOptions(shape.block_size),
                          nf4=options.get("quantization") == BITSANDBYTES)
    config = with_options(start, {option: options[name] for option, name in _OPTIONS.items() if name in options},
                          shape.kv_cache_dtype)
    kv_entry_bytes = config.cache.kv_dtype_bytes
    model = MemoryModel(shape, config)
    memory, layout = model.gpus[0], model.cache_layouts[0]
    stored = memory.weights_bytes + memory.embeddings_bytes + memory.quant_state_bytes
    return {
        "weights_bytes": stored - model.weights.rounding_bytes,  # the allocator's rounding is in no parameter
        "bytes_per_token": sum(kind.layers * kind.token_bytes(gpus, kv_entry_bytes) for kind in shape.kv_layers
                               if not kind.window and not kind.encoder),
        "state_bytes": sum(kind.layers * kind.bytes(gpus, 0, 2) for kind in shape.state_layers),
        "request_bytes": layout.blocks_per_request * layout.block_bytes,
        "max_model_len": shape.max_position,
        "heads": shape.heads, "kv_heads": shape.kv_heads, "layers": shape.layers,
        "head_size": next((kind.width for kind in shape.kv_layers if kind.latent and not kind.entry_bytes),
                          shape.head_dim),
        "divides": divides(shape, gpus),
        "windows": sorted({kind.window for kind in shape.kv_layers if kind.window}),
    }


def _tensors(document: Mapping[str, Any]) -> Iterator[Tensor]:
    for name, (dtype, shape) in expand_all(document["tensors"]).items():
        yield Tensor(name, dtype, tuple(shape), (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8)
