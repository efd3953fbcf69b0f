"""The CPU's part in forward passes over weights in host memory: rates, and the share that is streamed to the GPU.

A forward pass of few tokens waits for the bytes of the weights, and host memory is read faster than PCIe copies it. One
of many tokens waits for the CPU's arithmetic, so its weights are streamed to the GPU. Between them both work at once.
"""

from __future__ import annotations

from shoehorn.hardware.kernel_probe import LEAST_CPUS
from shoehorn.hardware.types import Gpu, HostCompute
from shoehorn.model.shape import Experts, ModelShape
from shoehorn.planner.serving_config import ComputeLevel, streamed_share

DRAFT_COST = 1.3
"""Time of a forward pass that verifies draft tokens, at most, relative to one of a single token: n-gram lookup drafts
only where the text repeats, and about half of its tokens are accepted there."""

_CAPABILITY = (8, 0)
"""Least compute capability with bfloat16, in which the layers work."""

_STREAM_SHARE = 0.985
"""Share of the PCIe bandwidth that streaming reaches."""

_BOTH_SHARE = 0.65
"""Share of the bound that CPU and PCIe reach together, since they divide whole matrices (an H200 host,
bench/results/hybrid-h200.json)."""

_PASSES = (1, 2, 4, 8, 16, 32)
"""Tokens of forward passes that a level is computed for; larger ones are streamed."""

_EXPERT_PASSES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""The same for experts, of which each token reads few."""

EXPERT_SHARE = 0.8
"""Share of the kernel's rate for large matrices that it reaches with experts, which are small."""

EXPERT_COPY_SHARE = 0.91
"""Share of the PCIe bandwidth that copies of experts reach (an H100, bench/results/expert-cache-h100.json)."""

_STEPS = 20
_NEARLY = 0.97
"""Of shares that are nearly as fast as the best one, the smallest is chosen: it leaves PCIe free, and passes that
stream nothing have CUDA graphs."""


def is_supported(shape: ModelShape, cpus: float, gpu: Gpu) -> bool:
    """Return whether CPU and GPU can share the layers of a model in host memory: dense ones in INT4."""
    return (shape.plain and shape.symmetric_int4 and shape.experts is None and shape.dtype == "bfloat16"
            and cpus >= LEAST_CPUS and gpu.compute_capability >= _CAPABILITY)


def computes_experts(shape: ModelShape, cpus: float, gpu: Gpu) -> bool:
    """Return whether the CPU can compute a mixture's experts in host memory: in the cache's formats and groups."""
    return (shape.plain and shape.experts is not None and shape.experts.cacheable
            and (shape.symmetric_int4 or shape.quantization == "mxfp4") and shape.dtype == "bfloat16"
            and cpus >= LEAST_CPUS and gpu.compute_capability >= _CAPABILITY)


def computed_tokens(compute: HostCompute, pcie: float, experts: Experts) -> int:
    """Choose the largest forward pass whose experts in host memory the CPU computes instead of copying them.

    0 where PCIe is as fast for a single token.

    Args:
        pcie: bandwidth in bytes a second.
    """
    copying = pcie * EXPERT_COPY_SHARE
    if expert_rate(compute, experts, 1) <= copying:
        return 0
    return max(tokens for tokens in _EXPERT_PASSES
               if expert_rate(compute, experts, tokens) >= copying * touched(experts, tokens))


def expert_rate(compute: HostCompute, experts: Experts, tokens: int) -> float:
    """Estimate at how many bytes of chosen experts a second the CPU advances."""
    each = tokens * experts.per_token / (experts.count * touched(experts, tokens))
    return EXPERT_SHARE * cpu_rate(compute, max(1, each))


def touched(experts: Experts, tokens: int) -> float:
    """Share of a layer's experts that some of the tokens choose, if all are chosen equally often."""
    return 1 - (1 - experts.per_token / experts.count) ** tokens


def levels(compute: HostCompute, pcie: float) -> tuple[ComputeLevel, ...]:
    """Choose the streamed share for forward passes of up to 1, 2, 4, ... tokens, by expected time.

    Args:
        pcie: bandwidth in bytes a second.
    """
    chosen: list[ComputeLevel] = []
    for tokens in _PASSES:
        rates = {step / _STEPS: rate(compute, pcie, tokens, step / _STEPS) for step in range(_STEPS + 1)}
        best = min(share for share, reached in rates.items() if reached >= _NEARLY * max(rates.values()))
        if best == 1:
            break
        chosen.append(ComputeLevel(tokens, best))
    return tuple(chosen)


def draft_tokens(compute: HostCompute, pcie: float, most: int) -> int:
    """Choose how many draft tokens a forward pass may verify: as many as cost it no more than `DRAFT_COST`."""
    chosen = levels(compute, pcie)
    rates = [rate(compute, pcie, tokens, streamed_share(chosen, tokens)) for tokens in range(1, most + 2)]
    return max((count for count in range(1, most + 1) if rates[0] <= DRAFT_COST * rates[count]), default=0)


def rate(compute: HostCompute, pcie: float, tokens: int, streamed: float) -> float:
    """Estimate at how many bytes of weights a second a forward pass advances.

    Args:
        pcie: bandwidth in bytes a second.
        streamed: share of the bytes that cross PCIe.
    """
    copying, multiplying = streamed / (pcie * _STREAM_SHARE), (1 - streamed) / cpu_rate(compute, tokens)
    if not streamed or streamed == 1:
        return 1 / (copying + multiplying)
    return _BOTH_SHARE / max(copying, multiplying, 1 / compute.read_bytes_per_second)


def cpu_rate(compute: HostCompute, tokens: float) -> float:
    """Estimate the kernel's bytes of weights a second: limited by host memory, then by arithmetic."""
    return min(compute.bytes_per_second_1, compute.bytes_per_second_8 * 8 / tokens)
