"""Placement: where each group of layers is stored, and where it is executed.

A layer is executed on the GPUs that hold its pipeline stage, on the CPU, or, in hybrid execution, on both: small
forward passes on the CPU, where its weights are, and large ones on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoehorn.common.units import ceil_div
from shoehorn.planner.memory.device import CPU, gpu_name
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.serving_config import ExpertCacheOffload, HybridOffload, PrefetchOffload, UvaOffload


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are stored on the same devices and executed on the same devices.

    Attributes:
        layers: their numbers, from 0 on.
        stored, executed: names of devices; several share every layer (tensor parallelism).
        part: of the layers, `all`, `experts`, or `rest`: all but the experts.
    """

    layers: tuple[int, ...]
    stored: tuple[str, ...]
    executed: tuple[str, ...]
    part: str = "all"

    def to_json(self) -> dict[str, Any]:
        """An entry of `placement` in `plan --json`; the layers as in `0-39,41`."""
        runs: list[list[int]] = []
        for layer in self.layers:
            if runs and layer == runs[-1][1] + 1:
                runs[-1][1] = layer
            else:
                runs.append([layer, layer])
        layers = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
        part = {} if self.part == "all" else {"part": self.part}
        return {"layers": layers, **part, "stored": list(self.stored), "executed": list(self.executed)}


@dataclass(frozen=True)
class Placement:
    """Placement of all layers: each part of each is in exactly one group."""

    groups: tuple[LayerGroup, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """`placement` in `plan --json`."""
        return [group.to_json() for group in self.groups]


def place_on_cpu(model: MemoryModel) -> Placement:
    """Store and execute all layers on the CPU."""
    return Placement((LayerGroup(tuple(range(model.shape.layers)), (CPU,), (CPU,)),))


def place_on_gpus(model: MemoryModel) -> Placement:
    """Execute all layers on the GPUs, hybrid ones on the CPU too; offloaded ones are stored in host memory.

    UVA offload takes bytes, not layers: the last of its layers may be stored in both places.
    """
    if isinstance(model.config.offload, ExpertCacheOffload):
        everywhere, gpu = tuple(range(model.shape.layers)), (gpu_name(0),)
        mixtures = everywhere[len(everywhere) - model.weights.expert_layers:]
        both = (CPU, *gpu)
        return Placement((LayerGroup(everywhere, gpu, gpu, "rest"), LayerGroup(
            mixtures, both, both if model.config.offload.computed else gpu, "experts")))
    tensor, groups = model.config.parallelism.tensor, []
    for stage in range(model.config.parallelism.pipeline):
        gpus = tuple(gpu_name(stage * tensor + rank) for rank in range(tensor))
        layers = model.weights.stage_range(stage)
        offloaded = _offloaded(model, stage, layers)
        resident = tuple(layer for layer in layers if layer not in offloaded)
        executed = (CPU, *gpus) if isinstance(model.config.offload, HybridOffload) else gpus
        groups += [LayerGroup(numbers, stored, devices) for numbers, stored, devices in
                   ((resident, gpus, gpus), (tuple(sorted(offloaded)), (CPU,), executed)) if numbers]
    return Placement(tuple(groups))


def _offloaded(model: MemoryModel, stage: int, layers: range) -> frozenset[int]:
    """Numbers of the layers of a stage that are stored in host memory; vLLM counts them from each stage's first."""
    offload = model.config.offload
    if isinstance(offload, PrefetchOffload | HybridOffload):
        return frozenset(layer for layer in layers if offload.offloads(layer - layers.start))
    if isinstance(offload, UvaOffload) and model.weights.layers_bytes:
        size = model.offloaded.stage_bytes(stage) * model.shape.layers
        return frozenset(layers[:ceil_div(size, model.weights.layers_bytes)])
    return frozenset()
