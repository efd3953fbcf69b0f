"""vLLM's options, derived from the configuration that the search chose, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shoehorn.common.units import format_size
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.option_set import OptionSet
from shoehorn.planner.reasons import MACHINE, Reason
from shoehorn.planner.search import Candidate, PlacementTier
from shoehorn.planner.serving_config import ExpertCacheOffload, HybridOffload
from shoehorn.planner.vllm_args import KNOBS, Field

_Code = tuple[str, Mapping[str, object]]


def derive(options: OptionSet, open_fields: frozenset[Field], model: MemoryModel, chosen: Candidate | None,
           code_without_search: str = "smallest") -> OptionSet:
    """Write the open fields of a configuration into the base options.

    Args:
        model: of the configuration.
        chosen: what the search found; None where nothing fits, or nothing was searched for.
        code_without_search: code of the reasons in that case.
    """
    offloads = bool(model.offloaded.stage_bytes(0))
    for knob in KNOBS:
        value = knob.to_option(model.config)
        if knob.option == "block-size" and knob.option not in options.values:
            options = options.set(knob.option, value, MACHINE, "block-size-fixed")
        if knob.field is None or knob.field not in open_fields or value is None or (
                knob.field is Field.QUANTIZATION and model.shape.quantization):
            continue
        if knob.field is not Field.OFFLOAD:
            if options.values.get(knob.option) != value:
                replaces = options.reasons[knob.option] if options.values.get(knob.option) else None
                code, params = _reason(knob.option, model, chosen, code_without_search)
                options = options.apply(Reason(knob.option, value, MACHINE, code, params, replaces))
        elif offloads:
            current = options.values.get(knob.option)
            if isinstance(value, dict) and isinstance(current, dict):  # keep the user's own entries
                value = {**value, **current}
            code, params = _reason(knob.option, model, chosen, code_without_search)
            options = options.apply(Reason(knob.option, value, MACHINE, code, params))
    return options


def without_offload_bound(options: OptionSet, open_fields: frozenset[Field], model: MemoryModel) -> OptionSet:
    """Take away a profile's upper bound of the offload, which the search has respected."""
    if Field.OFFLOAD not in open_fields or "cpu-offload-gb" not in options.values:
        return options
    if model.offloaded.stage_bytes(0):
        return options.without("cpu-offload-gb")
    return options.apply(Reason("cpu-offload-gb", 0.0, MACHINE, "no-offload",
                                replaces=options.reasons["cpu-offload-gb"]))


def _reason(option: str, model: MemoryModel, chosen: Candidate | None, code_without_search: str) -> _Code:
    """Code and parameters of the reason of one option that was left open."""
    if option in _EXPERT_CACHE and isinstance(model.config.offload, ExpertCacheOffload):
        code = _EXPERT_CACHE[option]
        return _COMPUTED.get(code, code) if model.config.offload.computed else code, _cache_params(model)
    if option in _HYBRID and isinstance(model.config.offload, HybridOffload):
        return _HYBRID[option], {"offloaded": format_size(model.offloaded.stage_bytes(0)),
                                 "most": model.config.offload.captured,
                                 "shared": max(level.tokens for level in model.config.offload.levels)}
    if option == "additional-config":
        return "embedding-on-host", {}
    if option == "speculative-config":
        return "ngram", {}
    if option == "max-cudagraph-capture-size":
        return "capture-speculative" if model.config.speculation.draft_tokens else "capture-fewer", {}
    if chosen is None:
        return code_without_search, {}
    return _REASONS[option](model, chosen)


def _cache_params(model: MemoryModel) -> Mapping[str, object]:
    """Parameters of the reasons of the cache of experts."""
    offload, experts = model.config.offload, model.shape.experts
    if not isinstance(offload, ExpertCacheOffload) or not experts:
        return {}
    return {"offloaded": format_size(model.offloaded.stage_bytes(0)), "slots": offload.slots, "experts": experts.count,
            "most": model.config.capture_limit, "computed": offload.computed}


def _quantization(model: MemoryModel, chosen: Candidate) -> _Code:
    groups = model.shape.tensor_bytes
    fits = chosen.tier is PlacementTier.RESIDENT_NF4
    return "nf4-fits" if fits else "nf4-less-offload", {"stored": format_size(groups.linears.bytes
                                                                             + groups.experts.bytes)}


def _eager(model: MemoryModel, chosen: Candidate) -> _Code:
    if not model.config.eager:
        return "graphs", {}
    return "eager-offload" if model.offloaded.stage_bytes(0) else "eager-saves-memory", {}


def _context(model: MemoryModel, chosen: Candidate) -> _Code:
    codes = {PlacementTier.USEFUL_OFFLOAD: "context-useful", PlacementTier.EXPERT_CACHE: "context-useful",
             PlacementTier.ANY_OFFLOAD: "context-fits"}
    return codes.get(chosen.tier, "context-longest"), {"requests": _requests(chosen)}


def _offload(model: MemoryModel, chosen: Candidate) -> _Code:
    return "offload-least", {"offloaded": format_size(model.offloaded.stage_bytes(0)), "requests": _requests(chosen),
                             "context": model.config.limits.max_model_len}


def _requests(chosen: Candidate) -> str:
    return "two requests" if chosen.requests == 2 else "one request"


_EXPERT_CACHE = {"additional-config": "expert-cache", "moe-backend": "expert-kernel",
                 "compilation-config": "expert-graphs", "max-cudagraph-capture-size": "expert-capture"}
"""Codes of the reasons of options that the cache of experts needs."""

_COMPUTED = {"expert-cache": "expert-sharing", "expert-capture": "expert-sharing-capture"}
"""The same codes where the CPU computes experts."""

_HYBRID = {"additional-config": "hybrid", "compilation-config": "expert-graphs",
           "max-cudagraph-capture-size": "hybrid-capture"}
"""Codes of the reasons of options that hybrid execution needs."""

_REASONS: Mapping[str, Callable[[MemoryModel, Candidate], _Code]] = {
    "quantization": _quantization, "enforce-eager": _eager, "max-model-len": _context,
    "max-num-seqs": lambda model, chosen: ("sequences-states" if model.shape.state_layers else "sequences", {}),
    "max-num-batched-tokens": lambda model, chosen: ("batch", {}),
    "cpu-offload-gb": _offload, "offload-group-size": _offload,
    "offload-backend": lambda model, chosen: ("prefetch", {}),
    "offload-num-in-group": lambda model, chosen: ("prefetch-last", {}),
    "offload-prefetch-step": lambda model, chosen: ("prefetch-steps", {})}
