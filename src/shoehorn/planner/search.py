"""Automatic configuration: quantization, offload, context and batch for the fields that are left open.

Rules: pure; the first candidate that fits wins, in the order of `PlacementTier`; a given value is a bound of the search
and never overruled; host memory that does not exist is never promised.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from shoehorn.common.units import GIB, MIB, ceil_div
from shoehorn.model.shape import Experts, ModelShape
from shoehorn.planner.least_offload import least_offload
from shoehorn.planner.load_tiers import (
    COMFORTABLE_TIERS,
    CONTEXT_4K,
    CONTEXT_8K,
    RESIDENT_TIERS,
    SMALL_TIERS,
    SMALLEST,
    TIGHT_TIER,
    LoadTier,
)
from shoehorn.planner.memory.activations import captured_sizes
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.serving_config import ComputeLevel, ExpertCacheOffload, HybridOffload, ServingConfig, Speculation
from shoehorn.planner.throughput import divided_tokens, least_slots
from shoehorn.planner.vllm_args import NGRAM, Field

DRAFT_TOKENS = int(str(NGRAM["num_speculative_tokens"]))
"""Draft tokens of n-gram lookup per request, at most."""

_VERIFIED = 128
"""Tokens of all requests together that a forward pass verifies, at most: as many as a small GPU hides behind PCIe."""

_WAVE_BYTES = 64 * MIB
"""Experts that a large forward pass copies at a time: the host takes 0.8 ms to start a wave (an H100 host,
bench/results/expert-cache-h100.json), in which PCIe 5 copies 44 MiB."""

_LARGE_BYTES = 20 * GIB
"""GPUs that hold this much together are offered the longer of the useful contexts."""


class PlacementTier(Enum):
    """Placement of the weights, the best first."""

    RESIDENT = "resident"
    """On the GPUs, as the checkpoint is."""
    RESIDENT_NF4 = "resident-nf4"
    """On the GPUs, quantized while loading."""
    EXPERT_CACHE = "expert-cache"
    """Experts in host memory, and as many of them on the GPU too as it has memory for."""
    USEFUL_OFFLOAD = "useful-offload"
    """The least offload that leaves memory for a useful context."""
    ANY_OFFLOAD = "any-offload"
    """Whatever still runs, with a short context."""


@dataclass(frozen=True)
class Candidate:
    """A configuration to try; it has to fit with `requests` of full length."""

    config: ServingConfig
    tier: PlacementTier
    requests: int


@dataclass(frozen=True)
class SearchSpace:
    """Bounds of a search.

    Attributes:
        start: what is given; of a field that is open, its upper bound. It offloads nothing where that is open.
        open_fields: that may be chosen.
        offload_bound_bytes: upper bound of the offload on each GPU.
        host_memory_bytes: 0 where unknown; it then bounds nothing.
        may_quantize: the model can be quantized while it is loaded.
        may_cache_experts: options and GPUs permit the cache of experts.
        computed_tokens: of the largest forward pass whose experts in host memory the CPU computes; 0 for none.
        levels: of hybrid execution; empty where options and machine do not permit it.
        draft_tokens: of n-gram lookup per request, at most: what a forward pass of that size costs decides it.
    """

    shape: ModelShape
    start: ServingConfig
    open_fields: frozenset[Field]
    offload_bound_bytes: int
    host_memory_bytes: int
    may_quantize: bool
    may_cache_experts: bool = False
    computed_tokens: int = 0
    levels: tuple[ComputeLevel, ...] = ()
    draft_tokens: int = DRAFT_TOKENS

    @property
    def quantizes(self) -> bool:
        """Return whether candidates in NF4 are tried as well as those with the checkpoint's format."""
        return self.may_quantize and Field.QUANTIZATION in self.open_fields and not self.start.nf4

    @property
    def smallest_weights(self) -> ServingConfig:
        """The start with the smallest weights that it may have."""
        return replace(self.start, nf4=True) if self.quantizes else self.start

    def fits(self, candidate: Candidate) -> bool:
        """Return whether a candidate fits on GPUs and host."""
        model = MemoryModel(self.shape, candidate.config)
        return model.missing_bytes(candidate.requests) <= 0 and (
            not self.host_memory_bytes or model.host_beside_gpus().total_bytes <= self.host_memory_bytes)


def search(space: SearchSpace) -> Candidate | None:
    """Find the best configuration that fits within the bounds; None when nothing fits."""
    for tier in (resident, resident_nf4, tight, expert_cache, useful_offload, any_offload):
        for each in tier(space):
            candidate = replace(each, config=within_states(MemoryModel(space.shape, each.config), space.open_fields))
            if space.fits(candidate):
                return candidate
    return None


def resident(space: SearchSpace) -> Iterator[Candidate]:
    """Everything on the GPUs as the checkpoint is: only with a comfortable load where NF4 is the alternative."""
    for load in COMFORTABLE_TIERS if space.quantizes else RESIDENT_TIERS:
        yield Candidate(at_load(space.start, load, space.open_fields), PlacementTier.RESIDENT, 2)


def resident_nf4(space: SearchSpace) -> Iterator[Candidate]:
    """Everything on the GPUs in NF4."""
    for load in RESIDENT_TIERS if space.quantizes else ():
        yield Candidate(at_load(space.smallest_weights, load, space.open_fields), PlacementTier.RESIDENT_NF4, 2)


def tight(space: SearchSpace) -> Iterator[Candidate]:
    """Everything on the GPUs for one request, with fewer CUDA graphs and at last none."""
    config = at_load(space.smallest_weights, TIGHT_TIER, space.open_fields)
    configs = [config]
    if Field.CAPTURE in space.open_fields:
        configs += with_fewer_graphs(config)
    if Field.EAGER in space.open_fields:
        configs.append(replace(config, eager=True))
    tier = PlacementTier.RESIDENT_NF4 if space.quantizes else PlacementTier.RESIDENT
    for each in configs:
        yield Candidate(each, tier, 1)


def expert_cache(space: SearchSpace) -> Iterator[Candidate]:
    """All experts in host memory, and as many of them on the GPU as fit next to two requests, at last next to one."""
    experts = space.shape.experts
    if Field.OFFLOAD not in space.open_fields or not space.may_cache_experts or not experts or \
            space.shape.tensor_bytes.experts.bytes > space.offload_bound_bytes:
        return
    start = replace(space.start, embedding_on_host=not space.shape.tied_embeddings)
    fewest = least_slots(experts, space.computed_tokens)
    for scratch, load in itertools.product(_wave_sizes(space, experts), (CONTEXT_4K, *SMALL_TIERS)):
        config = at_load(start, load, space.open_fields)
        least = MemoryModel(space.shape, _cached(space, config, experts, fewest, scratch))
        slot_bytes = max(1, least.weights.expert_layers * least.weights.expert_bytes)
        for requests in (2, 1):
            more = max(0, -least.missing_bytes(requests)) // slot_bytes
            slots = min(experts.count, fewest + more)
            cached = _cached(space, config, experts, slots, scratch)
            while slots > fewest and least.with_config(cached).missing_bytes(requests) > 0:
                slots -= 1  # more graphs are captured than with the fewest slots
                cached = _cached(space, config, experts, slots, scratch)
            yield Candidate(cached, PlacementTier.EXPERT_CACHE, requests)


def _wave_sizes(space: SearchSpace, experts: Experts) -> tuple[int, ...]:
    """Experts of a wave, and fewer where memory for so many is missing."""
    config = replace(space.start, offload=ExpertCacheOffload(1, 1, 0))
    each = max(1, MemoryModel(space.shape, config).weights.expert_bytes)
    most = max(1, min(ceil_div(_WAVE_BYTES, each), experts.count // 4))
    return tuple(dict.fromkeys(max(1, most // part) for part in (1, 2, 4, 6, 8)))


def _cached(space: SearchSpace, config: ServingConfig, experts: Experts, slots: int, scratch: int) -> ServingConfig:
    """Copy with that many slots of every layer; CUDA graphs of forward passes that do not copy all experts."""
    computed = space.computed_tokens
    divided = 0 if computed else divided_tokens(experts, slots)
    cached = replace(config, offload=ExpertCacheOffload(slots, scratch, divided, computed))
    if Field.CAPTURE in space.open_fields:
        cached = replace(cached, capture_limit=captured_sizes(replace(
            cached, capture_limit=min(computed or divided, 2 * config.limits.max_num_seqs)))[-1])
    return cached


def useful_offload(space: SearchSpace) -> Iterator[Candidate]:
    """The least offload that leaves memory for two requests of a useful context."""
    if Field.OFFLOAD not in space.open_fields:
        return
    large = space.start.limit_bytes * space.start.parallelism.gpus >= _LARGE_BYTES
    for load in (CONTEXT_8K, CONTEXT_4K) if large else (CONTEXT_4K,):
        config = at_load(space.smallest_weights, load, space.open_fields)
        yield Candidate(_with_least_offload(space, config, 2), PlacementTier.USEFUL_OFFLOAD, 2)


def any_offload(space: SearchSpace) -> Iterator[Candidate]:
    """The least offload for a short context; then by UVA, without buffers on the GPU.

    Not by UVA for packed experts: vLLM's Humming backend repacks them onto the GPU and still reports them as offloaded.
    """
    experts = space.shape.experts
    for uva in (False,) if experts and experts.cacheable else (False, True):
        for load in SMALL_TIERS:
            for requests in (2, 1):
                config = at_load(space.smallest_weights, load, space.open_fields)
                yield Candidate(_with_least_offload(space, config, requests, uva), PlacementTier.ANY_OFFLOAD, requests)


def smallest(space: SearchSpace) -> ServingConfig:
    """The smallest configuration within the bounds, which a refusal is explained with."""
    config = at_load(replace(space.start, nf4=space.start.nf4 or space.quantizes), SMALLEST, space.open_fields)
    if Field.EAGER in space.open_fields:
        config = replace(config, eager=True)
    if Field.OFFLOAD not in space.open_fields:
        return config
    return least_offload(MemoryModel(space.shape, config), 1, space.offload_bound_bytes, levels=space.levels)


def _with_least_offload(space: SearchSpace, start: ServingConfig, requests: int, uva: bool = False) -> ServingConfig:
    """Offload as little as possible, with draft tokens, and without CUDA graphs where most of a pass waits for PCIe."""
    whole_bytes = MemoryModel(space.shape, start).weights.layers_bytes

    def least(config: ServingConfig) -> MemoryModel:
        model = MemoryModel(space.shape, config)
        if Field.OFFLOAD not in space.open_fields:
            return model
        changed = least_offload(model, requests, space.offload_bound_bytes, uva, space.levels)
        return model.with_config(_with_decode_graphs(space, changed))

    def mostly_waits(model: MemoryModel) -> bool:
        return 2 * model.offloaded.stage_bytes(0) > whole_bytes

    drafting = start
    if Field.SPECULATION in space.open_fields and not uva and not space.shape.experts:
        tokens = max(0, min(space.draft_tokens, _VERIFIED // start.limits.max_num_seqs - 1))
        drafting = replace(start, speculation=Speculation(tokens))
        if Field.CAPTURE in space.open_fields:  # graphs as without draft tokens, so that these take no memory
            drafting = replace(drafting, capture_limit=2 * start.limits.max_num_seqs)
    model = least(drafting)
    if isinstance(model.config.offload, HybridOffload):
        return model.config
    if Field.EAGER in space.open_fields and mostly_waits(model):
        return least(replace(drafting, eager=True)).config
    verifies_for_free = mostly_waits(model) or (not model.config.nf4 and model.offloaded.stage_bytes(0))
    return model.config if verifies_for_free else least(start).config


def within_states(model: MemoryModel, open_fields: frozenset[Field]) -> ServingConfig:
    """Lower the sequences to those that the KV cache has states for at a time, where their number is open."""
    upper = model.config.limits.max_num_seqs

    def served(sequences: int) -> int:
        fewer = model.with_config(model.config.with_limits(max_num_seqs=sequences))
        return fewer.served_sequences(fewer.gpus[0].kv_cache_bytes)

    least = served(upper)
    if not model.shape.state_layers or Field.SEQUENCES not in open_fields or least >= upper:
        return model.config
    most = min(upper, served(least))  # fewer sequences leave the cache more memory
    return model.config.with_limits(max_num_seqs=next(
        (sequences for sequences in range(most, least, -1) if served(sequences) >= sequences), least))


def _with_decode_graphs(space: SearchSpace, config: ServingConfig) -> ServingConfig:
    """Capture CUDA graphs of the forward passes that hybrid execution leaves to the CPU alone; of no other one."""
    offload = config.offload
    if not isinstance(offload, HybridOffload) or config.eager:
        return config
    if not offload.captured and Field.EAGER in space.open_fields:
        return replace(config, eager=True)
    return replace(config, capture_limit=offload.captured) if Field.CAPTURE in space.open_fields else config


def with_fewer_graphs(config: ServingConfig) -> Iterator[ServingConfig]:
    """Copies with CUDA graphs for smaller and smaller batches only, down to a single request."""
    if not config.eager:
        yield from (replace(config, capture_limit=most) for most in reversed(captured_sizes(config)[:-1]))


def at_load(config: ServingConfig, load: LoadTier, open_fields: frozenset[Field]) -> ServingConfig:
    """Copy with a tier's load for the open fields; the configuration's own limits are upper bounds."""
    limits = config.limits
    sequences = min(load.sequences, limits.max_num_seqs) if Field.SEQUENCES in open_fields else limits.max_num_seqs
    context = min(load.context, limits.max_model_len) if Field.CONTEXT in open_fields else limits.max_model_len
    batch = limits.max_num_batched_tokens
    if Field.BATCH in open_fields:
        batch = max(min(load.tokens, batch, sequences * context), sequences)
    return config.with_limits(max_model_len=context, max_num_seqs=sequences, max_num_batched_tokens=batch)


