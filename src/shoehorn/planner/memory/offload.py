"""Bytes of weights that are offloaded to host memory."""

from __future__ import annotations

from dataclasses import dataclass

from shoehorn.common.units import MIB, ceil_div
from shoehorn.planner.memory.weights import Weights
from shoehorn.planner.serving_config import (
    ExpertCacheOffload,
    HybridOffload,
    Offload,
    PrefetchOffload,
    UvaOffload,
)

_UNPACKED_BYTES = 64 * MIB
"""A slice of unpacked weights (shoehorn_vllm/hybrid/offload/stream.py)."""


def offloaded_layers(offload: Offload, layers: int) -> int:
    """Number of layers that are offloaded whole; 0 for the kinds that count bytes."""
    if not isinstance(offload, PrefetchOffload | HybridOffload):
        return 0
    groups, rest = divmod(layers, offload.group)
    return groups * offload.last + max(0, rest - offload.group + offload.last)


@dataclass(frozen=True)
class OffloadedWeights:
    """Weights in host memory, as the configuration offloads them."""

    weights: Weights

    @property
    def layers(self) -> int:
        """Number of layers that are offloaded whole."""
        return offloaded_layers(self.weights.config.offload, self.weights.shape.layers)

    def stage_bytes(self, stage: int) -> int:
        """Layers' weights that one GPU of a stage has in host memory."""
        offload = self.weights.config.offload
        stored = round(self.weights.layers_bytes * self.weights.stage_share(stage))
        if isinstance(offload, PrefetchOffload | HybridOffload):
            return stored * self.layers // self.weights.shape.layers
        if isinstance(offload, ExpertCacheOffload):  # never divided over GPUs
            return self.weights.experts_bytes
        return min(stored, offload.bytes) if isinstance(offload, UvaOffload) else 0

    @property
    def rank_bytes(self) -> int:
        """Layers' weights in host memory of one tensor-parallel rank, all stages together."""
        return sum(map(self.stage_bytes, range(self.weights.config.parallelism.pipeline)))

    @property
    def bytes(self) -> int:
        """Layers' weights in host memory, all GPUs together."""
        return self.rank_bytes * self.weights.config.parallelism.tensor

    @property
    def embedding_bytes(self) -> int:
        """Embedding in host memory, all GPUs together."""
        config = self.weights.config
        return self.weights.embedding_bytes * config.embedding_on_host * config.parallelism.tensor

    @property
    def pinned_bytes(self) -> int:
        """Host memory that offload pins, all GPUs together."""
        return self.bytes + self.embedding_bytes

    @property
    def buffers_bytes(self) -> int:
        """Buffers on each GPU for layers that are copied there, or for cached experts."""
        offload = self.weights.config.offload
        if isinstance(offload, ExpertCacheOffload):
            return (offload.slots * self.weights.expert_layers + 3 * offload.scratch) * self.weights.expert_bytes
        if isinstance(offload, HybridOffload):
            largest = max((*self.weights.fused_tensors_bytes, 0))
            return offload.buffers * largest + _UNPACKED_BYTES if self.layers else 0
        if not isinstance(offload, PrefetchOffload):
            return 0
        return ceil_div(self.weights.layers_bytes, self.weights.shape.layers) * min(offload.steps, self.layers)
