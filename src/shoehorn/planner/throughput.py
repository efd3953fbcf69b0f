"""Expected tokens per second: bytes that a forward pass moves over PCIe and out of the GPU's own memory.

Rules: bandwidths are measured ones where they are known, not those of datasheets; a GPU that is not in the table has no
expectation (None). The shares of the bound that the engine reaches were measured (H200, H100). docs/estimator.md names
the sources and the comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoehorn.hardware.gpu_specs import SLOWEST_BYTES_PER_SECOND, host_to_device_bandwidth, memory_bandwidth
from shoehorn.hardware.types import Gpu, HostCompute
from shoehorn.model.shape import Experts
from shoehorn.planner import host_compute
from shoehorn.planner.memory.activations import captured_sizes
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.serving_config import ExpertCacheOffload, HybridOffload, PrefetchOffload, WeightFormat

ACCEPTED = 3.0
"""Tokens that a forward pass is assumed to yield with a draft model: it depends on the text; most pairs do better."""

COPY_SHARE = 0.904
"""Bandwidth of a copy within the GPU relative to pure reading, which makes the probe's figure comparable (H200)."""

_FEW = 4
"""Requests up to which bitsandbytes' kernel takes the same time as for one (backends/cuda/ops.py)."""

_UVA_SHARE, _UVA_GAIN, _UVA_GAIN_NF4 = 0.91, 8.0, 5.1
"""UVA offload: share of the PCIe bandwidth, and tokens that eight requests get for each of one request."""

_PREFETCH_SHARE = 0.985
"""Prefetch offload: share of the PCIe bandwidth, for eight requests as for one."""

_CACHE_SECONDS = 12e-6
"""Cache of experts: time of its two kernels in every layer (an H100, bench/results/expert-cache-h100.json)."""

_HOP_SECONDS, _EAGER_HOP_SECONDS = 33e-6, 65e-6
"""Hybrid execution: time of a matrix on the CPU besides its bytes: copies, request and answer (an H200 host,
bench/results/hybrid-h200.json)."""

_MATRICES = 4
"""Matrices of a layer as the engine fuses them."""

_WORTHWHILE = 0.9
"""Share of all experts without a slot that the parts of a divided pass copy together, at most."""

_SUMS_SECONDS = 20e-6
"""Time of the two sums over the GPUs of a tensor-parallel layer (two H100s over NVLink)."""

_PREFETCH_SECONDS = 400e-6
"""Time in which the host starts the copies of a layer, where it starts every kernel one by one."""


@dataclass(frozen=True)
class Kernels:
    """Use of a GPU by the kernels of one weight format.

    Attributes:
        share: of the GPU's memory bandwidth that they reach for one request; share_8: for eight together.
        ceiling: bytes a second that they reach however fast the GPU's memory is.
        layer_seconds: spent in every layer whatever the bytes; eager_seconds: the same without CUDA graphs, where the
            host starts every kernel one by one.
    """

    share: float
    share_8: float
    layer_seconds: float
    eager_seconds: float
    ceiling: float = math.inf

    def bytes_per_second(self, device: float, requests: int) -> float:
        """Bandwidth of the GPU's memory that they reach for that many requests together."""
        return min(device * (self.share if requests <= _FEW else self.share_8), self.ceiling)


_NF4 = Kernels(0.27, 0.096, 35e-6, 1070e-6)
_KERNELS = {WeightFormat.UNQUANTIZED: Kernels(0.85, 0.85, 30e-6, 410e-6), WeightFormat.NF4: _NF4,
            WeightFormat.NF4_CHECKPOINT: _NF4, WeightFormat.PACKED: Kernels(0.69, 0.69, 55e-6, 450e-6, 2.41e12)}
"""Fitted to the H200's measurements in docs/estimator.md; packed integers also to an H100's, which is as fast."""


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second of one GPU: its own memory, and host memory over PCIe."""

    device: float
    pcie: float
    host: HostCompute | None = None


def expected(model: MemoryModel, *gpus: Gpu, host: HostCompute | None = None) -> Mapping[str, float | None]:
    """Estimate tokens per second of all requests together, for one and for eight: `batch_1`, `batch_8`.

    Args:
        gpus: in the order of the ranks; one stands for all.
        host: the CPU's part; hybrid execution needs it.
    """
    known = [gpu.device_bytes_per_second or memory_bandwidth(gpu.name) for gpu in gpus]
    if None in known and not moved_bytes(model)[0]:
        return {"batch_1": None, "batch_8": None}
    rates = [round(tokens_per_second(model, gpus, requests, host), 2) for requests in (1, 8)]
    return {"batch_1": rates[0], "batch_8": max(rates)}  # where eight together are slower, they can be served in turn


def tokens_per_second(model: MemoryModel, gpus: Sequence[Gpu], requests: int, host: HostCompute | None = None) -> float:
    """Estimate tokens per second of that many requests together; an unknown GPU counts as the slowest known one.

    Stages work one after the other, each at the speed of its slowest GPU.
    """
    tensor, stages = model.config.parallelism.tensor, model.config.parallelism.pipeline
    requests = min(requests, model.config.limits.max_num_seqs)
    ranks = gpus if len(gpus) == tensor * stages else [gpus[0]] * (tensor * stages)
    seconds = 0.0
    for stage in range(stages):
        own = [_bandwidths(gpu) for gpu in ranks[stage * tensor:(stage + 1) * tensor]]
        speeds = Bandwidths(min(each.device for each in own), min(each.pcie for each in own), host)
        seconds += _token_seconds(model, speeds, requests) * model.weights.stage_share(stage)
    return requests / seconds


def _bandwidths(gpu: Gpu) -> Bandwidths:
    """Measured bandwidths of a GPU, else those of its model."""
    device = gpu.device_bytes_per_second / COPY_SHARE or memory_bandwidth(gpu.name) or SLOWEST_BYTES_PER_SECOND
    return Bandwidths(device, host_to_device_bandwidth(gpu)[0])


def _token_seconds(model: MemoryModel, speeds: Bandwidths, requests: int) -> float:
    """Time in which each of that many requests gets a token: a forward pass, or its part of one with a draft model.

    Accepted tokens of n-gram lookup are not counted.
    """
    draft_tokens = model.config.speculation.draft_tokens
    verification = _pass_seconds(model, speeds, requests * (1 + draft_tokens))
    if model.draft is None:
        return verification
    return (verification + draft_tokens * _pass_seconds(model.draft, speeds, requests)) / ACCEPTED


def _pass_seconds(model: MemoryModel, speeds: Bandwidths, requests: int) -> float:
    """Time of one forward pass with that many requests; pipeline stages work one after the other."""
    config, layers, weights_format = model.config, model.shape.layers, model.weights.format
    streamed, resident = moved_bytes(model, requests)
    kernels = _KERNELS[weights_format]
    bandwidth = kernels.bytes_per_second(speeds.device, requests)
    unpacking = model.activations.unpacked_experts_bytes / speeds.device
    eager = config.eager or requests > captured_sizes(config)[-1]
    per_layer = kernels.eager_seconds if eager else kernels.layer_seconds
    per_layer += _SUMS_SECONDS * (config.parallelism.tensor > 1)
    if isinstance(config.offload, PrefetchOffload):  # copies and kernels run side by side
        computing = (streamed + resident) / bandwidth
        starting = model.offloaded.layers * _PREFETCH_SECONDS * eager
        return max(streamed / speeds.pcie / _PREFETCH_SHARE, computing + unpacking + layers * per_layer + starting)
    if isinstance(config.offload, HybridOffload) and speeds.host:
        share = config.offload.streamed(requests)
        hop = _MATRICES * (_EAGER_HOP_SECONDS if eager else _HOP_SECONDS) * (1 - share)
        waiting = streamed / host_compute.rate(speeds.host, speeds.pcie, requests, share)
        ahead = model.offloaded.layers * (per_layer if eager else 0)  # the host starts kernels while the stream waits
        return (max(waiting + model.offloaded.layers * hop, ahead) + resident / bandwidth
                + (layers - model.offloaded.layers * eager) * per_layer)
    if isinstance(config.offload, ExpertCacheOffload) and model.shape.experts and speeds.host and \
            requests <= config.offload.computed:
        computing = streamed / host_compute.expert_rate(speeds.host, model.shape.experts, requests)
        return (computing + resident / bandwidth + layers * per_layer
                + model.weights.expert_layers * (_EAGER_HOP_SECONDS if eager else _HOP_SECONDS))
    if isinstance(config.offload, ExpertCacheOffload):
        return (streamed / speeds.pcie / host_compute.EXPERT_COPY_SHARE + resident / bandwidth + layers * per_layer
                + model.weights.expert_layers * _CACHE_SECONDS)
    gain = _UVA_GAIN_NF4 if weights_format.is_nf4 else _UVA_GAIN
    copying = streamed / speeds.pcie / _UVA_SHARE * (1 if requests <= _FEW else 8 / gain)
    reading = resident / bandwidth + unpacking
    if streamed and eager:  # while the kernels wait for PCIe, the host runs ahead
        return max(copying + reading, reading + layers * per_layer)
    return copying + reading + layers * per_layer


def moved_bytes(model: MemoryModel, requests: int = 1) -> tuple[int, int]:
    """Count the bytes that one GPU reads for one forward pass: (over PCIe, from its own memory).

    Of a mixture's experts only those that some token passes are read from the GPU's memory; layers that are offloaded
    whole are read whole: over PCIe, or by the CPU in hybrid execution. What the CPU computes counts as over PCIe.
    """
    shape, weights = model.shape, model.weights
    active = 1.0
    if shape.experts and not model.activations.unpacked_experts_bytes:
        groups = shape.tensor_bytes
        touched = 1 - (1 - shape.experts.per_token / shape.experts.count) ** requests
        whole = groups.linears.bytes + groups.experts.bytes
        active = (groups.linears.bytes + touched * groups.experts.bytes) / max(1, whole)
    offloaded = model.offloaded.rank_bytes
    if isinstance(model.config.offload, ExpertCacheOffload) and shape.experts:
        slots, each = model.config.offload.slots, weights.expert_layers * weights.expert_bytes
        chosen = round(shape.experts.count * host_compute.touched(shape.experts, requests))
        there = weights.layers_bytes - offloaded + weights.head_bytes + weights.other_bytes
        if requests <= model.config.offload.computed:
            absent = 1 - slots / shape.experts.count
            return round(chosen * absent * each), there + round(chosen * (1 - absent) * each)
        return round(copied_experts(shape.experts, slots, requests) * each), there + chosen * each
    whole = isinstance(model.config.offload, PrefetchOffload | HybridOffload)
    streamed = offloaded if whole else round(offloaded * active)
    resident = round((weights.layers_bytes - offloaded + weights.quant_state_bytes) * active)
    return streamed, resident + weights.head_bytes + weights.other_bytes


def copied_experts(experts: Experts, slots: int, tokens: int) -> float:
    """Estimate how many experts of a layer a forward pass copies to the GPU, if all are chosen equally often.

    A pass of more tokens than the slots hold the choices of is divided, or copies every expert without a slot
    (shoehorn_vllm/hybrid/expert_cache.py). Trained models choose some experts more often than others.
    """
    most, absent = max(1, slots // experts.per_token), experts.count - slots
    if tokens > divided_tokens(experts, slots):
        return absent
    whole, rest = divmod(tokens, most)
    return min(absent, absent * (whole * host_compute.touched(experts, most) + host_compute.touched(experts, rest)))


def divided_tokens(experts: Experts, slots: int) -> int:
    """Choose the largest forward pass that is worth dividing into parts whose choices fit into the slots.

    Its parts together copy less than `_WORTHWHILE` of what a pass copies that takes every expert without a slot.
    """
    most = max(1, slots // experts.per_token)
    return most * max(1, math.floor(_WORTHWHILE / host_compute.touched(experts, most)))


def least_slots(experts: Experts, computed: int) -> int:
    """Fewest slots of a layer: the choices of a token where absent experts are copied, else one."""
    return 1 if computed else experts.per_token
