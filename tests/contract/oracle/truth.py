"""Record of what vLLM does with a model, as JSON: weights, KV cache, states, limits.

How each part is obtained: `weights` and `tensors` from the parameters that vLLM's model registers before loading;
`after_loading` by vLLM's rules for what changes afterwards; `kv` from
`get_kv_cache_spec` and `get_kv_cache_groups` after `update_block_size_for_backend`; `architecture` and
`max_model_len` from ModelConfig. All of it on a CUDA platform of stated compute capability (cuda_platform).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from contract.oracle import after_loading
from contract.oracle.build import Built
from contract.oracle.patterns import compact

CACHE_BYTES = 4 << 30
"""The KV cache for which blocks and tokens are recorded."""

LENGTHS = (4096, 32768)
"""Tokens of a request whose cache is recorded, besides one of full length."""


def record(built: Built) -> dict[str, Any]:
    """The truth of one build."""
    model_config = built.vllm_config.model_config
    parameters = {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                  for name, tensor in built.model.named_parameters()}
    return {
        "max_model_len": model_config.max_model_len,
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "quantization": model_config.quantization,
        "runner": model_config.runner_type,
        "class": type(built.model).__name__,
        "architecture": _architecture(built),
        "weights_bytes": sum(_bytes(tensor) for _, tensor in built.model.named_parameters()),
        "after_loading": dict(after_loading.changes(built.vllm_config, built.model)),
        "buffers_bytes": sum(_bytes(tensor) for tensor in _unique(built.model.buffers())),
        "parts": _parts(built.model),
        "kv": _kv(built),
        "tensors": compact(parameters.items()),
    }


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def _unique(tensors: Iterator[Any]) -> Iterator[Any]:
    seen: set[int] = set()
    for tensor in tensors:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _parts(model: Any) -> dict[str, int]:
    """Bytes of parameters by the model's parts: its children, or theirs where there is but one."""
    parts: Counter[str] = Counter()
    for name, tensor in model.named_parameters():
        first, _, rest = name.partition(".")
        second = rest.partition(".")[0]
        parts[f"{first}.{second}" if first in ("model", "language_model") else first] += _bytes(tensor)
    return dict(parts)


def _architecture(built: Built) -> dict[str, Any]:
    """Heads and sizes for one GPU as vLLM reads them, and for the whole model as its convertor does."""
    model_config, parallel = built.vllm_config.model_config, built.vllm_config.parallel_config
    whole = asdict(model_config.model_arch_config)
    whole.pop("quantization_config", None)
    return {
        "whole": {key: value for key, value in whole.items() if isinstance(value, (int, str, bool, float, list))},
        "heads": model_config.get_num_attention_heads(parallel),
        "kv_heads": model_config.get_num_kv_heads(parallel),
        "head_size": model_config.get_head_size(),
        "hybrid": model_config.is_hybrid,
        "mla": model_config.use_mla,
    }


def _kv(built: Built) -> dict[str, Any]:
    from vllm.v1.core import kv_cache_utils

    config = built.vllm_config
    specs = _specs(config)
    cache = config.cache_config
    entries: dict[str, Any] = {
        "block_size": cache.block_size, "block_size_before": built.block_size_before,
        "cache_dtype": cache.cache_dtype, "mamba_cache_mode": cache.mamba_cache_mode,
        "mamba_block_size": cache.mamba_block_size, "prefix_caching": cache.enable_prefix_caching,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "backends": _backends(config),
        "layers": {pattern: _json(kind) for pattern, kind in compact(
            (name, _freeze(_spec(spec))) for name, spec in specs.items()).items()},
        "bytes_per_token": sum(spec.real_page_size_bytes / spec.block_size for spec in specs.values()
                               if _grows(spec)),
        "state_bytes": sum(spec.real_page_size_bytes for spec in specs.values() if type(spec).__name__ == "MambaSpec"),
    }
    groups = kv_cache_utils.get_kv_cache_groups(config, specs)
    entries["groups"] = [{"groups": number, **dict(kind)} for kind, number in Counter(
        _freeze({"layers": len(group.layer_names), **_spec(group.kv_cache_spec)}) for group in groups).items()]
    if not groups:
        return entries
    block = kv_cache_utils._pool_bytes_per_block(config, groups)
    entries |= {"pool_bytes_per_block": block, "cache_bytes": CACHE_BYTES, "cache_blocks": CACHE_BYTES // block,
              "request_blocks": {}}
    longest = config.model_config.max_model_len
    for length in sorted({*(length for length in LENGTHS if length < longest), longest}):
        config.model_config.max_model_len = length
        needed = kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)
        entries["request_blocks"][str(length)] = needed // block
    config.model_config.max_model_len = longest
    return entries


def _specs(config: Any) -> dict[str, Any]:
    """Every layer's cache, asked for as the engine core does (vllm/v1/engine/core.py, _initialize_kv_caches)."""
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec
    from vllm.v1.worker.worker_base import get_current_attn_backends

    register_all_kvcache_specs(config)
    specs: dict[str, Any] = get_kv_cache_spec(config)
    if any(getattr(spec, "non_causal", False) for spec in specs.values()):
        config.scheduler_config.enable_chunked_prefill = config.cache_config.enable_prefix_caching = False
    layouts = [layout.name for layout in get_supported_kv_cache_layouts(get_current_attn_backends(config))]
    layout = resolve_kv_cache_layout(config, [layouts], list(specs.values()))
    config.cache_config.kv_cache_layout = layout.name
    return specs


def _backends(config: Any) -> dict[str, int]:
    layers = config.compilation_config.static_forward_context.values()
    return dict(Counter(layer.get_attn_backend().get_name() for layer in layers if hasattr(layer, "get_attn_backend")))


def _grows(spec: Any) -> bool:
    """Return whether the layer's cache grows with every token."""
    return type(spec).__name__ in ("FullAttentionSpec", "MLAAttentionSpec", "SinkFullAttentionSpec", "RSWASpec")


def _spec(spec: Any) -> dict[str, Any]:
    """A layer's or a group's cache, without what is at its default."""
    kind = type(spec).__name__
    entries: dict[str, Any] = {"kind": kind, "block_size": spec.block_size, "page_bytes": spec.page_size_bytes}
    if kind == "UniformTypeKVCacheSpecs":
        inner: defaultdict[str, int] = defaultdict(int)
        for each in spec.kv_cache_specs.values():
            inner[str(sorted(_spec(each).items()))] += 1
        return entries | {"kinds": dict(inner)}
    for key in ("num_kv_heads", "head_size", "head_size_v", "sliding_window", "attention_chunk_size", "shapes",
                "mamba_type", "compress_ratio", "model_version", "tokens_per_state", "cache_dtype_str"):
        value = getattr(spec, key, None)
        if value is not None:
            entries[key] = value
    if entries.get("head_size_v") == entries.get("head_size"):
        entries.pop("head_size_v", None)
    if spec.real_page_size_bytes != spec.page_size_bytes:
        entries["real_page_bytes"] = spec.real_page_size_bytes
    if kind == "MambaSpec":
        entries["dtypes"] = [str(dtype).removeprefix("torch.") for dtype in spec.dtypes]
        entries["mamba_type"] = str(getattr(spec.mamba_type, "name", spec.mamba_type))
    elif hasattr(spec, "dtype"):
        entries["dtype"] = str(spec.dtype).removeprefix("torch.")
    return entries


def _freeze(value: Any) -> Any:
    """The value as one that can be a key."""
    if isinstance(value, dict):
        return tuple((key, _freeze(inner)) for key, inner in value.items())
    return tuple(_freeze(inner) for inner in value) if isinstance(value, (list, tuple)) else value


def _json(frozen: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return dict(frozen)
