"""Placement of layers: which layers are offloaded to host memory, with the least offload that fits."""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import replace

from shoehorn.common.units import GIB
from shoehorn.model.shape import ModelShape
from shoehorn.planner.memory.fit import missing_bytes
from shoehorn.planner.memory.offload import offloaded_bytes
from shoehorn.planner.memory.weights import layer_bytes
from shoehorn.planner.serving_config import Choices

OFFLOAD_STEP_BYTES = GIB // 10
"""UVA offload is counted in these, as a person would write it."""

BUFFERS = 2
"""Layers that the card holds of those in host memory: one is worked with while the next one arrives."""


def least_offload(shape: ModelShape, choices: Choices, requests: int, uva: bool = False) -> Choices:
    """The choices with no more layers in host memory than leaves room for that many requests.

    `offload_bytes` bounds it; as many layers as that allows where even those do not make enough room.
    """
    none = replace(choices, offload_bytes=0)
    needed = missing_bytes(shape, none, requests)
    if needed <= 0:
        return none
    if uva or not shape.understood:
        steps = math.ceil(needed * choices.pipeline_parallel / OFFLOAD_STEP_BYTES) * OFFLOAD_STEP_BYTES
        return replace(choices, offload_bytes=min(choices.offload_bytes, steps, _whole(shape, choices)))

    def enough(layers: int) -> bool:
        more = with_offload(shape, none, layers)
        return offloaded_bytes(shape, more) > choices.offload_bytes or missing_bytes(shape, more, requests) <= 0

    counts = range(1, shape.layers + 1)
    layers = min(1 + bisect.bisect_left(counts, True, key=enough), shape.layers)
    while layers and offloaded_bytes(shape, with_offload(shape, none, layers)) > choices.offload_bytes:
        layers -= 1
    return with_offload(shape, none, layers) if layers else none


def with_offload(shape: ModelShape, choices: Choices, layers: int) -> Choices:
    """The choices with that many layers, or a few more, in host memory.

    By prefetch, and the embedding with them, of which a token needs one row; by UVA where the architecture is not
    known, since prefetch wants one stack of layers.
    """
    if not shape.understood:
        size = _whole(shape, choices) * layers / shape.layers
        return replace(choices, offload_bytes=math.ceil(size / OFFLOAD_STEP_BYTES) * OFFLOAD_STEP_BYTES)
    stages = choices.pipeline_parallel
    pattern = spread(-(-shape.layers // stages), -(-layers // stages))
    return replace(choices, offload_bytes=0, prefetch=(*pattern, BUFFERS), embedding_on_host=not shape.tied_embeddings)


def _whole(shape: ModelShape, choices: Choices) -> int:
    """All layers, in whole steps of UVA offload."""
    return math.ceil(layer_bytes(shape, choices)[0] / OFFLOAD_STEP_BYTES) * OFFLOAD_STEP_BYTES


@functools.cache
def spread(layers: int, wanted: int) -> tuple[int, int]:
    """(group size, last layers of each) that take `wanted` of the layers, or a twentieth more: the smallest groups.

    The smaller the groups, the more evenly the copies spread over a pass.
    """
    most = wanted + wanted // 20
    return next((group, last) for group in range(1, layers + 1) for last in range(1, group + 1)
                if wanted <= layers // group * last + max(0, layers % group - group + last) <= most)
