"""One table of knobs: fields of the serving configuration and vLLM's options, both ways.

Rules: options are read into a configuration once, before the search, and derived from it once, after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from shoehorn.common.units import GIB
from shoehorn.planner.serving_config import (
    BITSANDBYTES,
    ComputeLevel,
    ExpertCacheOffload,
    HybridOffload,
    NoOffload,
    PrefetchOffload,
    ServingConfig,
    Speculation,
    UvaOffload,
)

NGRAM = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
"""N-gram lookup, as vLLM's `speculative-config`."""

DECODE_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""CUDA graphs of whole forward passes without torch.compile, as vLLM's `compilation-config`."""

CACHE_FORMATS: Mapping[str, tuple[float, int]] = {
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2"), (1, 0)), "nvfp4": (9 / 16, 0), "float16": (2, 0),
    "bfloat16": (2, 0), **dict.fromkeys(("int8_per_token_head", "fp8_per_token_head"), (1, 8)),
    "int4_per_token_head": (0.5, 8)}
"""By `kv-cache-dtype`: bytes of one entry, scales of its block included, and of the scales of one head and token.

Others are counted as the model's own dtype. Source: customize_spec of vLLM's attention backends.
"""


_ONLINE_BYTES = {"fp8": 1, "fp8_per_tensor": 1, "fp8_per_block": 1, "fp8_per_channel": 1, "mxfp8": 1 + 1 / 32,
                 "int8_per_channel_weight_only": 1, "nvfp4_per_token": 1 / 2 + 1 / 16}
"""Bytes of a weight that vLLM quantizes while it loads an unquantized checkpoint, scales included, by `quantization`.

Source: vllm/config/quantization.py; embeddings, output head and norms keep the model's dtype.
"""


class Field(Enum):
    """A part of the serving configuration that the search may choose."""

    QUANTIZATION = "quantization"
    EAGER = "eager"
    CONTEXT = "context"
    SEQUENCES = "sequences"
    BATCH = "batch"
    SPECULATION = "speculation"
    CAPTURE = "capture"
    OFFLOAD = "offload"


@dataclass(frozen=True)
class Knob:
    """One of vLLM's options, and its field of the configuration.

    Attributes:
        field: None where planning derives the option otherwise.
        to_option: value for vLLM; None leaves the option out.
        from_option: configuration with vLLM's value; `options` holds all other options.
        opens: the field is open where this option is unset.
        keeps: a step down keeps the value for the next plans.
    """

    option: str
    field: Field | None
    to_option: Callable[[ServingConfig], object]
    from_option: Callable[[ServingConfig, Any, Mapping[str, object]], ServingConfig]
    opens: bool = True
    keeps: bool = True


def _limit(name: str) -> Callable[[ServingConfig, Any, Mapping[str, object]], ServingConfig]:
    return lambda config, value, options: config.with_limits(**{name: int(value)})


def _prefetch(config: ServingConfig, value: Any, options: Mapping[str, object]) -> ServingConfig:
    """Read prefetch offload, which `offload-group-size` switches on; it then replaces `cpu-offload-gb`."""
    if not value:
        return config
    last, steps = (int(str(options.get(f"offload-{name}", 1))) for name in ("num-in-group", "prefetch-step"))
    return replace(config, offload=PrefetchOffload(int(value), last, steps))


def _own_options(config: ServingConfig) -> object:
    """Options of the engine plugin, in vLLM's `additional-config`."""
    own: dict[str, object] = {"embedding": "host"} if config.embedding_on_host else {}
    if isinstance(config.offload, ExpertCacheOffload):
        computed = {"computed": config.offload.computed} if config.offload.computed else {}
        own["experts"] = {"slots": config.offload.slots, "scratch": config.offload.scratch,
                          "divided": config.offload.divided, **computed}
    if isinstance(config.offload, HybridOffload):
        own["hybrid"] = {"group": config.offload.group, "last": config.offload.last, "buffers": config.offload.buffers,
                         "levels": [[level.tokens, level.streamed] for level in config.offload.levels]}
    return {"shoehorn": own} if own else None


def _read_own_options(config: ServingConfig, value: Any, options: Mapping[str, object]) -> ServingConfig:
    own = value.get("shoehorn") if isinstance(value, dict) else None
    own = own if isinstance(own, dict) else {}
    config = replace(config, embedding_on_host=own.get("embedding") == "host")
    experts, hybrid = own.get("experts"), own.get("hybrid")
    if isinstance(hybrid, dict):
        levels = tuple(ComputeLevel(int(tokens), float(share)) for tokens, share in hybrid["levels"])
        return replace(config, offload=HybridOffload(int(hybrid["group"]), int(hybrid["last"]), levels,
                                                     int(hybrid.get("buffers", 2))))
    if not isinstance(experts, dict):
        return config
    slots = int(experts["slots"])
    return replace(config, offload=ExpertCacheOffload(slots, int(experts.get("scratch", 16)), *(
        int(experts.get(name, 0)) for name in ("divided", "computed"))))


def _with_expert_cache(value: object) -> Callable[[ServingConfig], object]:
    return lambda config: value if isinstance(config.offload, ExpertCacheOffload) else None


def _speculation(config: ServingConfig, value: Any, options: Mapping[str, object]) -> ServingConfig:
    tokens = value.get("num_speculative_tokens") if isinstance(value, dict) else 0
    return replace(config, speculation=Speculation(tokens if isinstance(tokens, int) else 0, config.speculation.draft))


def _offload_part(name: str) -> Callable[[ServingConfig], object]:
    return lambda config: getattr(config.offload, name) if isinstance(config.offload, PrefetchOffload) else None


def _items(name: str, read: Callable[[Any], Any]) -> Callable[[ServingConfig, Any, Mapping[str, object]],
                                                             ServingConfig]:
    return lambda config, value, options: replace(config, items=replace(config.items, **{name: read(value)}))


def _item_limits(value: Any) -> tuple[tuple[str, int], ...]:
    """Read `limit-mm-per-prompt`, whose values are numbers or objects with a `count`."""
    counts = {modality: each.get("count") if isinstance(each, dict) else each
              for modality, each in (value.items() if isinstance(value, dict) else ())}
    return tuple((modality, count) for modality, count in counts.items() if type(count) is int)


def _max_pixels(value: Any) -> int:
    """Read the limit of pixels from `mm-processor-kwargs`, under its names in transformers' processors."""
    size = value.get("size") if isinstance(value, dict) else None
    limits = (value.get("max_pixels") if isinstance(value, dict) else None,
              size.get("longest_edge") if isinstance(size, dict) else None)
    return next((limit for limit in limits if type(limit) is int and limit > 0), 0)


def _cache(name: str, read: Callable[[Any], Any]) -> Callable[[ServingConfig, Any, Mapping[str, object]],
                                                             ServingConfig]:
    return lambda config, value, options: replace(config, cache=replace(config.cache, **{name: read(value)}))


def _state_bytes(dtype: Any) -> int:
    """Return the bytes of one entry of a state; 0 for the model's own."""
    return {"float32": 4, "float16": 2, "bfloat16": 2}.get(str(dtype), 0)


def _unread(config: ServingConfig, value: Any, options: Mapping[str, object]) -> ServingConfig:
    return config


KNOBS = (
    Knob("quantization", Field.QUANTIZATION, lambda config: BITSANDBYTES if config.nf4 else None,
         lambda config, value, options: replace(config, nf4=config.nf4 or value == BITSANDBYTES,
                                                online_bytes=_ONLINE_BYTES.get(str(value), 0.0))),
    Knob("enforce-eager", Field.EAGER, lambda config: config.eager,
         lambda config, value, options: replace(config, eager=bool(value))),
    Knob("max-model-len", Field.CONTEXT, lambda config: config.limits.max_model_len, _limit("max_model_len")),
    Knob("max-num-seqs", Field.SEQUENCES, lambda config: config.limits.max_num_seqs, _limit("max_num_seqs")),
    Knob("max-num-batched-tokens", Field.BATCH, lambda config: config.limits.max_num_batched_tokens,
         _limit("max_num_batched_tokens")),
    Knob("speculative-config", Field.SPECULATION,
         lambda config: {**NGRAM, "num_speculative_tokens": config.speculation.draft_tokens}
         if config.speculation.draft_tokens else None, _speculation),
    Knob("max-cudagraph-capture-size", Field.CAPTURE, lambda config: None if config.eager else config.capture_limit,
         lambda config, value, options: replace(config, capture_limit=int(value) or None)),
    Knob("cpu-offload-gb", Field.OFFLOAD,
         lambda config: round(config.offload.bytes / GIB, 1) if isinstance(config.offload, UvaOffload) else None,
         lambda config, value, options: replace(config, offload=UvaOffload(round(value * GIB)) if value
                                                else NoOffload())),
    Knob("offload-backend", Field.OFFLOAD,
         lambda config: "prefetch" if isinstance(config.offload, PrefetchOffload) else None, _unread, opens=False),
    Knob("offload-group-size", Field.OFFLOAD, _offload_part("group"), _prefetch, opens=False),
    Knob("offload-num-in-group", Field.OFFLOAD, _offload_part("last"), _unread, opens=False),
    Knob("offload-prefetch-step", Field.OFFLOAD, _offload_part("steps"), _unread, opens=False),
    Knob("additional-config", Field.OFFLOAD, _own_options, _read_own_options, opens=False),
    Knob("moe-backend", Field.OFFLOAD, _with_expert_cache("marlin"), _unread, opens=False),
    Knob("compilation-config", Field.OFFLOAD,
         lambda config: dict(DECODE_GRAPHS) if isinstance(config.offload, ExpertCacheOffload | HybridOffload)
         and not config.eager else None, _unread, opens=False),
    Knob("block-size", None, lambda config: config.cache.block_size, _cache("block_size", int), keeps=False),
    Knob("enable-prefix-caching", None, lambda config: None, _cache("caches_prefixes", bool), keeps=False),
    Knob("disable-hybrid-kv-cache-manager", None, lambda config: None,
         _cache("frees_windows", lambda disabled: not disabled), keeps=False),
    Knob("limit-mm-per-prompt", None, lambda config: None, _items("limits", _item_limits), keeps=False),
    Knob("language-model-only", None, lambda config: None, _items("text_only", bool), keeps=False),
    Knob("mm-processor-kwargs", None, lambda config: None, _items("max_pixels", _max_pixels), keeps=False),
    Knob("mm-encoder-tp-mode", None, lambda config: None, _items("whole_towers", lambda mode: mode == "data"),
         keeps=False),
    Knob("mamba-cache-dtype", None, lambda config: None, _cache("convolution_bytes", _state_bytes), keeps=False),
    Knob("mamba-ssm-cache-dtype", None, lambda config: None, _cache("recurrent_bytes", _state_bytes), keeps=False),
    Knob("tensor-parallel-size", None, lambda config: None,
         lambda config, value, options: replace(config, parallelism=replace(config.parallelism, tensor=int(value)))),
    Knob("pipeline-parallel-size", None, lambda config: None,
         lambda config, value, options: replace(config, parallelism=replace(config.parallelism, pipeline=int(value)))),
    Knob("kv-cache-memory-bytes", None, lambda config: None,
         lambda config, value, options: replace(config, kv_cache_bytes=int(value) or None), keeps=False),
    Knob("dtype", None, lambda config: None,
         lambda config, value, options: replace(config, dtype_bytes=4 if value in ("float32", "float") else 2),
         keeps=False),
)
"""In the order in which options are derived."""


def with_options(config: ServingConfig, options: Mapping[str, object], kv_cache_dtype: str = "auto") -> ServingConfig:
    """Read vLLM's options into a configuration.

    Args:
        kv_cache_dtype: of the checkpoint, where no option sets another.
    """
    for knob in KNOBS:
        if options.get(knob.option) is not None:
            config = knob.from_option(config, options[knob.option], options)
    chosen = str(options.get("kv-cache-dtype") or "auto")
    entry, scales = CACHE_FORMATS.get(kv_cache_dtype if chosen == "auto" else chosen, (config.dtype_bytes, 0))
    return replace(config, cache=replace(config.cache, kv_dtype_bytes=entry, head_bytes=scales))


def offload_options(config: ServingConfig) -> dict[str, object]:
    """Derive all options of the offload; unlike in a plan, `cpu-offload-gb` is 0 where it is not used."""
    derived = {knob.option: knob.to_option(config) for knob in KNOBS if knob.field is Field.OFFLOAD}
    return {"cpu-offload-gb": 0.0, **{option: value for option, value in derived.items() if value is not None}}
