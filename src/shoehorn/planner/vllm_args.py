"""Conversion between a serving configuration and vLLM's own options."""

from __future__ import annotations

from shoehorn.common.units import GIB
from shoehorn.model.shape import ModelShape
from shoehorn.planner import serving_config, speculation
from shoehorn.planner.inputs import Draft
from shoehorn.planner.option_set import Options
from shoehorn.planner.serving_config import Choices


def offload_options(choices: Choices) -> dict[str, object]:
    """The engine's options for the choices' offload; what is not used is 0 or left out."""
    options: dict[str, object] = {"cpu-offload-gb": round(choices.offload_bytes / GIB, 1)}
    group, last, steps = choices.prefetch
    if group:
        options |= {"offload-backend": "prefetch", "offload-group-size": group, "offload-num-in-group": last,
                    "offload-prefetch-step": steps}
    if choices.embedding_on_host:
        options["additional-config"] = {"shoehorn": {"embedding": "host"}}
    return options


_ENTRY_BYTES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8_per_token_head": 1, "fp8_per_token_head": 1,
                "int4_per_token_head": 0.5, "nvfp4": 0.5}
FIELDS = {"quantization": "quantization", "cpu-offload-gb": "offload_bytes", "enforce-eager": "eager",
           "max-model-len": "max_model_len", "max-num-seqs": "max_num_seqs",
           "max-num-batched-tokens": "max_num_batched_tokens", "speculative-config": "speculative_tokens",
           "max-cudagraph-capture-size": "capture_limit"}

_UNBOUNDED = 1 << 40


def config_of(options: Options, shape: ModelShape, limit_bytes: int, left_open: frozenset[str],
             draft: Draft | None) -> Choices:
    """The choices that the options make; what is left open has its bound."""
    width = 4 if options.values.get("dtype") in ("float32", "float") else 2
    kv_dtype = str(options.values.get("kv-cache-dtype", "auto"))
    nf4 = "bitsandbytes" in (options.values.get("quantization"), shape.quantization)
    group = options.whole("offload-group-size")
    offload = 0 if group else _UNBOUNDED if "offload_bytes" in left_open else \
        round(options.number("cpu-offload-gb") * GIB)
    return Choices(
        limit_bytes=limit_bytes,
        max_model_len=options.whole("max-model-len", min(shape.max_position, serving_config.LEVELS[0].context)),
        max_num_seqs=options.whole("max-num-seqs", serving_config.LEVELS[0].sequences),
        max_num_batched_tokens=options.whole("max-num-batched-tokens", serving_config.LEVELS[0].tokens),
        quantization="bitsandbytes" if nf4 else None,
        tensor_parallel=options.whole("tensor-parallel-size", 1),
        pipeline_parallel=options.whole("pipeline-parallel-size", 1), offload_bytes=offload,
        prefetch=(group, options.whole("offload-num-in-group", 1), options.whole("offload-prefetch-step", 1))
        if group else (0, 0, 0),
        embedding_on_host=_on_host(options.values.get("additional-config")),
        dtype_bytes=width, kv_dtype_bytes=_ENTRY_BYTES.get(kv_dtype, width),
        block_size=options.whole("block-size", 16), eager=bool(options.values.get("enforce-eager")),
        kv_cache_bytes=options.whole("kv-cache-memory-bytes") or None,
        draft=draft.shape if draft else None, speculative_tokens=speculation.guessed(options),
        capture_limit=options.whole("max-cudagraph-capture-size") or None)


def _on_host(additional: object) -> bool:
    """Whether the engine plugin is asked to hold the embedding in host memory."""
    own = additional.get("shoehorn") if isinstance(additional, dict) else None
    return isinstance(own, dict) and own.get("embedding") == "host"
