"""Bytes of weights that are offloaded to host memory."""

from __future__ import annotations

from shoehorn.model.shape import ModelShape
from shoehorn.planner.memory.weights import embedding_bytes, layer_bytes, stage_share
from shoehorn.planner.serving_config import Choices


def offloaded_bytes(shape: ModelShape, choices: Choices, stage: int = 0) -> int:
    """Weights of one GPU that lie in host memory instead."""
    weights = round(layer_bytes(shape, choices)[0] * stage_share(shape, choices, stage))
    if choices.prefetch[0]:
        return weights * offloaded_layers(shape, choices.prefetch) // shape.layers
    return min(weights, choices.offload_bytes)


def offloaded_layers(shape: ModelShape, prefetch: tuple[int, int, int]) -> int:
    """How many layers such a prefetch offload takes: the last ones of each group."""
    group, in_group, _ = prefetch
    return sum(1 for layer in range(shape.layers) if layer % group >= group - in_group) if group else 0


def pinned_bytes(shape: ModelShape, choices: Choices) -> int:
    """Host memory that offload pins, all GPUs together."""
    offloaded = sum(offloaded_bytes(shape, choices, stage) for stage in range(choices.pipeline_parallel))
    return (offloaded + embedding_bytes(shape, choices) * choices.embedding_on_host) * choices.tensor_parallel
