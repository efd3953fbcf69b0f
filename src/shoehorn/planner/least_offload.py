"""The least offload with which a configuration fits: how many layers go to host memory, and which."""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import replace

from shoehorn.common.units import GIB, ceil_div
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.memory.weights import Weights
from shoehorn.planner.serving_config import (
    ComputeLevel,
    HybridOffload,
    NoOffload,
    PrefetchOffload,
    ServingConfig,
    UvaOffload,
)

OFFLOAD_STEP_BYTES = GIB // 10
"""UVA offload is a multiple of this, as a person would write it."""

BUFFERS = 2
"""Buffers on the GPU, of one layer for prefetch and of one matrix for hybrid execution: one executes while the next one
is copied."""


def least_offload(model: MemoryModel, requests: int, bound_bytes: int, uva: bool = False,
                  levels: tuple[ComputeLevel, ...] = ()) -> ServingConfig:
    """Offload no more layers than needed for that many requests of full length.

    Args:
        model: whose configuration offloads nothing yet.
        bound_bytes: upper bound on each GPU; as many layers as it allows where even those are not enough.
        uva: by UVA, without buffers on the GPU.
        levels: of a hybrid execution; empty where the CPU does not take part.
    """
    config = replace(model.config, offload=NoOffload())
    model = model.with_config(config)
    needed = model.missing_bytes(requests)
    if needed <= 0:
        return config
    if uva or not model.shape.plain:
        size = _whole_steps(needed * config.parallelism.pipeline)
        return replace(config, offload=UvaOffload(min(bound_bytes, size, _whole_steps(model.weights.layers_bytes))))

    def offloads_enough(layers: int) -> bool:
        changed = model.with_config(with_offload(model.weights, layers, levels))
        return changed.offloaded.stage_bytes(0) > bound_bytes or changed.missing_bytes(requests) <= 0

    counts = range(1, model.shape.layers + 1)
    layers = min(1 + bisect.bisect_left(counts, True, key=offloads_enough), model.shape.layers)
    while layers and model.with_config(
            with_offload(model.weights, layers, levels)).offloaded.stage_bytes(0) > bound_bytes:
        layers -= 1
    return with_offload(model.weights, layers, levels) if layers else config


def with_offload(weights: Weights, layers: int, levels: tuple[ComputeLevel, ...] = ()) -> ServingConfig:
    """Offload that many layers, or a few more.

    By hybrid execution or prefetch, and the embedding with them, of which a token needs one row. By UVA where the
    architecture is unknown, since prefetch needs one stack of layers.

    Args:
        levels: of a hybrid execution; empty where the CPU does not take part.
    """
    shape, config = weights.shape, weights.config
    if not shape.plain:
        size = _whole_steps(weights.layers_bytes) * layers / shape.layers
        return replace(config, offload=UvaOffload(_whole_steps(size)))
    stages = config.parallelism.pipeline
    group, last = spread(ceil_div(shape.layers, stages), ceil_div(layers, stages))
    offload = HybridOffload(group, last, levels, BUFFERS) if levels else PrefetchOffload(group, last, BUFFERS)
    return replace(config, offload=offload, embedding_on_host=not shape.tied_embeddings)


def _whole_steps(size: float) -> int:
    """Round a size up to whole steps of UVA offload."""
    return math.ceil(size / OFFLOAD_STEP_BYTES) * OFFLOAD_STEP_BYTES


@functools.cache
def spread(layers: int, least: int) -> tuple[int, int]:
    """Find the smallest groups that take at least that many of the layers, or a twentieth more.

    Returns (group size, last layers of each). The smaller the groups, the more evenly the copies spread over a pass.
    """
    most = least + least // 20
    return next((group, last) for group in range(1, layers + 1) for last in range(1, group + 1)
                if least <= layers // group * last + max(0, layers % group - group + last) <= most)
