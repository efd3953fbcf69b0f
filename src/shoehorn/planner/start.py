"""Bounds of the search: the fields that it may choose, and the configuration that it starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoehorn.common.units import GIB
from shoehorn.hardware import gpu_specs
from shoehorn.model.shape import ModelShape
from shoehorn.planner import host_compute, speculation
from shoehorn.planner.inputs import PlanInputs
from shoehorn.planner.load_tiers import LARGEST
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.option_set import OptionSet
from shoehorn.planner.reasons import PROFILE
from shoehorn.planner.search import Candidate, PlacementTier, SearchSpace, search, smallest
from shoehorn.planner.serving_config import (
    BITSANDBYTES,
    Adapters,
    CacheOptions,
    Limits,
    NoOffload,
    ServingConfig,
    Speculation,
)
from shoehorn.planner.stages import with_stages
from shoehorn.planner.vllm_args import KNOBS, Field, with_options

_UNBOUNDED = 1 << 40
_MARLIN = (7, 5)
"""Least compute capability of the kernel that multiplies cached experts."""


@dataclass(frozen=True)
class Configured:
    """A configuration, and the options that bound it.

    Attributes:
        chosen: the candidate that fits; None where nothing fits and the configuration is the smallest.
    """

    options: OptionSet
    open_fields: frozenset[Field]
    model: MemoryModel
    chosen: Candidate | None

    @property
    def preference(self) -> int:
        """Rank among other divisions: unquantized, quantized, with offload, and one that does not fit."""
        ranks = {PlacementTier.RESIDENT: 0, PlacementTier.RESIDENT_NF4: 1}
        return 3 if self.chosen is None else ranks.get(self.chosen.tier, 2)

    @property
    def fits_without_offload(self) -> bool:
        """True where all weights are on the GPUs."""
        return not self.model.offloaded.stage_bytes(0) and self.model.missing_bytes() <= 0


def open_fields(options: OptionSet, shape: ModelShape) -> frozenset[Field]:
    """List the fields that the search may choose; a profile's context and offload are upper bounds of theirs.

    So are a profile's sequences for a model with states, of which the KV cache may have fewer.
    """
    fields = {knob.field for knob in KNOBS if knob.field and knob.opens
              and knob.option not in options.values and knob.option not in options.fixed}
    if options.integer("cpu-offload-gb") and "cpu-offload-gb" not in options.fixed:
        fields.add(Field.OFFLOAD)
    if options.integer("offload-group-size"):
        fields.discard(Field.OFFLOAD)
    if "max-model-len" in options.values.keys() - options.fixed and options.source_of("max-model-len") == PROFILE:
        fields.add(Field.CONTEXT)
    if shape.state_layers and "max-num-seqs" in options.values and options.source_of("max-num-seqs") == PROFILE:
        fields.add(Field.SEQUENCES)
    if not speculation.is_possible(options, shape):
        fields.discard(Field.SPECULATION)
    return frozenset(fields)


def start_config(inputs: PlanInputs, options: OptionSet, limit_bytes: int) -> ServingConfig:
    """Read the base options; open fields have their upper bound."""
    shape, draft = inputs.shape, inputs.draft
    limits = Limits(min(shape.max_position, LARGEST.context), LARGEST.sequences, LARGEST.tokens)
    config = ServingConfig(limit_bytes, limits, nf4=shape.quantization == BITSANDBYTES,
                           cache=CacheOptions(block_size=shape.block_size),
                           speculation=Speculation(draft=draft.shape if draft else None))
    return replace(with_options(config, options.values, shape.kv_cache_dtype), adapters=_adapters(options))


def _adapters(options: OptionSet) -> Adapters | None:
    """Read the options of LoRA adapters, with vLLM's defaults (vllm/config/lora.py); None without adapters."""
    if not options.values.get("enable-lora"):
        return None
    targets = options.values.get("lora-target-modules")
    return Adapters(max(1, options.integer("max-loras", 1)), max(1, options.integer("max-lora-rank", 16)),
                    tuple(map(str, targets)) if isinstance(targets, list) else (),
                    bool(options.values.get("fully-sharded-loras")))


def configure(inputs: PlanInputs, options: OptionSet, limits: tuple[int, ...]) -> Configured:
    """Search for the best configuration on GPUs within the base options.

    Args:
        limits: bytes of each GPU that may be used.
    """
    fields, start = open_fields(options, inputs.shape), start_config(inputs, options, min(limits))
    start = with_stages(inputs, start, limits)
    bound = round(options.number("cpu-offload-gb") * GIB) if "cpu-offload-gb" in options.values else _UNBOUNDED
    if Field.OFFLOAD in fields:
        start = replace(start, offload=NoOffload())
    space = SearchSpace(inputs.shape, start, fields, bound, inputs.hardware.host_memory_bytes,
                        may_quantize=inputs.shape.plain and not inputs.shape.quantization,
                        may_cache_experts=_may_cache_experts(inputs, options))
    space = _with_hybrid(_with_computed_experts(space, inputs), inputs, options)
    chosen = search(space)
    config = chosen.config if chosen else smallest(space)
    return Configured(options, fields, MemoryModel(inputs.shape, config), chosen)


def _may_cache_experts(inputs: PlanInputs, options: OptionSet) -> bool:
    """Return whether model, options and GPUs permit the cache of experts: one GPU, and none of its options set."""
    experts = inputs.shape.experts
    own = {"moe-backend", "compilation-config", "quantization", "enable-expert-parallel", "enable-lora"}
    return (experts is not None and experts.cacheable and not inputs.draft
            and options.integer("tensor-parallel-size", 1) * options.integer("pipeline-parallel-size", 1) == 1
            and not own & options.values.keys()
            and all(gpu.compute_capability >= _MARLIN for gpu in inputs.hardware.gpus if any(gpu.compute_capability)))


def _with_computed_experts(space: SearchSpace, inputs: PlanInputs) -> SearchSpace:
    """Let the CPU compute experts in host memory, where it is faster than copying them."""
    compute, gpus, experts = inputs.hardware.host_compute, inputs.hardware.gpus, inputs.shape.experts
    if not space.may_cache_experts or compute is None or experts is None or inputs.settings.cpu_compute != "auto" or \
            not all(host_compute.computes_experts(inputs.shape, inputs.hardware.cpus, gpu) for gpu in gpus):
        return space
    pcie = min(gpu_specs.host_to_device_bandwidth(gpu)[0] for gpu in gpus)
    return replace(space, computed_tokens=host_compute.computed_tokens(compute, pcie, experts))


def _with_hybrid(space: SearchSpace, inputs: PlanInputs, options: OptionSet) -> SearchSpace:
    """Permit hybrid execution where model, options and machine do: one GPU, and no LoRA."""
    compute, gpus = inputs.hardware.host_compute, inputs.hardware.gpus
    compute = compute if inputs.settings.cpu_compute == "auto" else None
    own = {"compilation-config", "quantization", "enable-lora"}
    if compute is None or options.integer("tensor-parallel-size", 1) * options.integer(
            "pipeline-parallel-size", 1) > 1 or own & options.values.keys() or not all(
            host_compute.is_supported(inputs.shape, inputs.hardware.cpus, gpu) for gpu in gpus):
        return space
    pcie = min(gpu_specs.host_to_device_bandwidth(gpu)[0] for gpu in gpus)
    return replace(space, levels=host_compute.levels(compute, pcie),
                   draft_tokens=host_compute.draft_tokens(compute, pcie, space.draft_tokens))


def with_least_batch(model: MemoryModel) -> MemoryModel:
    """Raise the batch to one token per sequence; a draft model takes a second place for each."""
    limits = model.config.limits
    least = limits.max_num_seqs * (2 if model.draft else 1)
    if limits.max_num_batched_tokens >= least:
        return model
    return model.with_config(model.config.with_limits(max_num_batched_tokens=least))
