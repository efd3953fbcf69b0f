"""The share of each GPU that a plan may use: its limit, `gpu-memory-utilization`, and the allocator's bound."""

from __future__ import annotations

import math

from shoehorn.common.units import format_size
from shoehorn.hardware.types import Gpu
from shoehorn.planner.memory.model import CONTEXT_BYTES, MARGIN_BYTES
from shoehorn.planner.option_set import OptionSet
from shoehorn.planner.reasons import MACHINE, SETTING

OPTION = "gpu-memory-utilization"
ALLOCATOR = "PYTORCH_ALLOC_CONF"

DEFAULT_SHARE = 0.92
"""vLLM's own default."""

WHOLE_SHARE = 0.97
"""Share that is used where the default would mean offload: what CUDA context and margin leave of 20 GiB."""


def limits(options: OptionSet, gpus: tuple[Gpu, ...], vram_limit: int | None) -> tuple[OptionSet, tuple[int, ...]]:
    """Determine the bytes of each GPU that may be used, as NVML counts, and lower vLLM's share to them.

    vLLM counts from after the CUDA context was made, so the context comes on top of its share. It refuses to start
    where less than its share is free on any GPU, and the context differs by some MiB: the margin stays out of it.
    """
    share = options.number(OPTION, DEFAULT_SHARE)
    requested = tuple(math.ceil(gpu.total_bytes * share) + CONTEXT_BYTES for gpu in gpus)
    setting = [(vram_limit, SETTING, "vram-limit")] if vram_limit else []
    caps = [min([(gpu.free_bytes, MACHINE, "free-memory"), *setting]) for gpu in gpus]
    tightest = min(range(len(gpus)), key=lambda number: caps[number][0] / gpus[number].total_bytes)
    cap, source, code = caps[tightest]
    exceeds = any(size > bound for size, (bound, *_) in zip(requested, caps, strict=True))
    if OPTION in options.fixed:
        if exceeds:
            options = options.note(OPTION, f"exceeds-{code}", limit=format_size(cap))
        return options, requested
    if not exceeds and OPTION in options.values:
        return options, requested
    lowered = min(share, max(0.0, (cap - CONTEXT_BYTES - MARGIN_BYTES) / gpus[tightest].total_bytes))
    options = options.set(OPTION, _floor(lowered), source, code, limit=format_size(cap),
                          context=format_size(CONTEXT_BYTES))
    return options, tuple(min(bound, size) for size, (bound, *_) in zip(requested, caps, strict=True))


def allocator(gpus: tuple[Gpu, ...], limit_bytes: tuple[int, ...]) -> dict[str, str]:
    """Configure PyTorch's allocator: no holes that the KV cache cannot use, and never more than the largest share.

    Quantizing and compiling leave blocks that are free but reserved; at the bound the allocator frees them.
    Source: measured, see docs/estimator.md.

    Args:
        limit_bytes: of each GPU.
    """
    share = _floor(max((limit - CONTEXT_BYTES) / gpu.total_bytes for gpu, limit in zip(gpus, limit_bytes, strict=True)))
    return {ALLOCATOR: f"expandable_segments:True,per_process_memory_fraction:{min(1.0, share)}"}


def _floor(share: float) -> float:
    """Round a share down to four digits."""
    return math.floor(share * 10_000) / 10_000
